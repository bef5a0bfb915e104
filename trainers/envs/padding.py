"""One action space in which agents with unequal spaces all have room."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from trainers.envs.vector_env import Box, Discrete


def common_space(spaces: Sequence[Discrete | Box]) -> tuple[Discrete | Box, list[int]]:
    """Find the smallest space that holds all agents' own.

    Args:
        spaces: Of each agent, all of one kind.

    Returns:
        The space, with bounds of each agent's own where they differ (-1 and 1 for components that
        an agent has not), and the sizes of the agents' own spaces.
    """
    sizes = [space.n if isinstance(space, Discrete) else space.size for space in spaces]
    boxes = [space for space in spaces if isinstance(space, Box)]
    if not boxes:
        return Discrete(n=max(sizes)), sizes
    low, high = (
        torch.stack([functional.pad(x, (0, max(sizes) - len(x)), value=end) for x in bounds])
        for bounds, end in (([s.low for s in boxes], -1.0), ([s.high for s in boxes], 1.0))
    )
    if low.eq(low[0]).all() and high.eq(high[0]).all():
        low, high = low[0], high[0]
    return Box(low=low, high=high), sizes


def if_they_differ(sizes: Sequence[int]) -> tuple[int, ...] | None:
    """What `EnvSpec` takes of the agents' own sizes.

    Args:
        sizes: Of each agent.

    Returns:
        The sizes; None if all are the same.
    """
    return tuple(sizes) if len(set(sizes)) > 1 else None
