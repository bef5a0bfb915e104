"""Environment copies: the independent units that samples come in."""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from gradlab.engine.part import batch_axes


def split_copies(
    batch: Mapping[str, Tensor],
    copy: Int[Tensor, " sample"],
    *,
    random: RandomGenerator | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a batch into two halves that have no environment copy in common.

    Samples of one copy depend on each other, and so do agents in one copy; other copies are the
    nearest independent samples.

    Args:
        batch: Tensors [agent, sample, ...] by name; a mask can be among them.
        copy: The environment copy that each sample comes from.
        random: Draws which copies make up the first half; by default every other one does.

    Returns:
        Both halves, each with its samples in order; the first has one copy more if they are odd.

    Raises:
        UsageError: If there are fewer than two copies, or not one for each sample.

    >>> batch = {"x": torch.tensor([[10, 20, 30, 11, 21, 31]])}
    >>> ours, held_out = split_copies(batch, torch.tensor([0, 1, 2, 0, 1, 2]))
    >>> ours["x"], held_out["x"]
    (tensor([[10, 30, 11, 31]]), tensor([[20, 21]]))
    """
    _, samples = batch_axes(batch)
    check(
        copy.shape == (samples,),
        "copy",
        f"have shape {(samples,)} as the batch has samples",
        tuple(copy.shape),
    )
    copies, number = copy.unique(return_inverse=True)
    check(len(copies) >= 2, "copy", "name at least 2 copies, one for each half", copies.tolist())
    order = torch.arange(len(copies))
    if random is not None:
        order = torch.randperm(len(copies), generator=random, device=random.device)
    first = (order % 2 == 0).to(copy.device)[number]
    ours, others = (
        {name: tensor[:, half.to(tensor.device)] for name, tensor in batch.items()}
        for half in (first, ~first)
    )
    return ours, others
