"""The general engine: `torch.func.vmap` of `torch.func.grad`, for any module and any loss."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import grad, vmap

from gradlab.engine.part import Part, agent_axes, masked, without_agent_axis
from gradlab.engine.per_sample import PerSample, Rows
from gradlab.engine.rewrites import Rewrites
from gradlab.engine.surrogate import Surrogate, Theta, checked_loss, explained, unwritten


def general_gradients(
    surrogate: Surrogate, theta: Mapping[str, Tensor], part: Part
) -> dict[str, PerSample]:
    """Form every sample's gradient.

    Args:
        surrogate: The per-sample loss.
        theta: Parameters [agent, ...] or [1, ...] by name.
        part: The samples.

    Returns:
        The gradients of every parameter, by name.
    """
    agents, _ = part.sizes
    axes = agent_axes(theta, agents)

    def loss(theta: Theta, sample: dict[str, Tensor], context: dict[str, Tensor]) -> Tensor:
        return checked_loss(surrogate, dict(theta), {**sample, **context}, Rewrites())

    per_sample = vmap(vmap(grad(loss), in_dims=(None, 0, None)), in_dims=(axes, 0, 0))
    given = {**theta, **part.batch, **part.context}
    with torch.no_grad(), explained(), unwritten(given):  # no graph above the one of `grad`
        rows = per_sample(without_agent_axis(theta, axes), dict(part.batch), dict(part.context))
    return {name: Rows(masked(values, part.mask)) for name, values in rows.items()}
