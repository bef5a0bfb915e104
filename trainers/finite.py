"""Finding what is not finite before a training learns from it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gradlab.checks import TrainingFailed


class NotFinite(TrainingFailed):
    """A number that is infinite or NaN; the message names its tensor, agent and place."""


def check_finite(
    name: str, tensor: Float[Tensor, "..."], axes: tuple[str, ...], *, first: int = 0
) -> None:
    """Raise unless all numbers are finite.

    Args:
        name: What the tensor is called.
        tensor: The numbers.
        axes: What its leading axes number, e.g. ("agent", "copy").
        first: Number of what the first axis begins with.

    Raises:
        NotFinite: If a number is infinite or NaN. The message names the first.
    """
    if math.isfinite(tensor.sum().item()):  # the cheap question; a sum may also just overflow
        return
    bad = (~tensor.isfinite()).nonzero()
    if len(bad):
        place = bad[0].tolist()
        number = tensor[tuple(place)].item()
        if place:
            place[0] += first
        where = ", ".join(f"{axis} {at}" for axis, at in zip(axes, place, strict=False))
        raise NotFinite(f"{name} is {number}{where and f' ({where})'}")


def finite_mean(
    name: str, losses: Float[Tensor, "agent sample"], first: int = 0
) -> Float[Tensor, ""]:
    """Take the mean of the samples' losses.

    Args:
        name: What the loss is called.
        losses: Loss of every sample.
        first: Number of the first agent.

    Returns:
        The mean over agents and samples.

    Raises:
        NotFinite: If it is not finite. The message names the first agent where it is not.
    """
    mean = losses.mean()
    if not math.isfinite(mean.item()):
        check_finite(name, losses.detach(), ("agent",), first=first)
        raise NotFinite(f"{name} is {mean.item()} (mean over all agents)")
    return mean


def check_gradient(network: str, norm: Tensor, first: int = 0) -> None:
    """Raise unless a gradient is finite.

    Args:
        network: Whose gradient it is.
        norm: Its norm, or those of its agents' own parts.
        first: Number of the first agent.

    Raises:
        NotFinite: If it is not finite.
    """
    axes = ("agent",) * norm.dim()
    name = f"the norm of the {network}'s gradient"
    check_finite(name, torch.atleast_1d(norm), axes, first=first)
