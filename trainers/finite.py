"""Finding what is not finite before a training learns from it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gradlab.checks import TrainingFailed


class NotFinite(TrainingFailed):
    """A number that is infinite or NaN; the message names its tensor, agent and place."""


def check_finite(name: str, tensor: Float[Tensor, "..."], axes: tuple[str, ...]) -> None:
    """Raise unless all numbers are finite.

    Args:
        name: What the tensor is called.
        tensor: The numbers.
        axes: What its leading axes number, e.g. ("agent", "copy").

    Raises:
        NotFinite: If a number is infinite or NaN. The message names the first.
    """
    if math.isfinite(tensor.sum().item()):  # the cheap question; a sum may also just overflow
        return
    bad = (~tensor.isfinite()).nonzero()
    if len(bad):
        first = bad[0].tolist()
        where = ", ".join(f"{axis} {place}" for axis, place in zip(axes, first, strict=False))
        raise NotFinite(f"{name} is {tensor[tuple(first)].item()}{where and f' ({where})'}")


def finite_mean(name: str, losses: Float[Tensor, "agent sample"]) -> Float[Tensor, ""]:
    """Take the mean of the samples' losses.

    Args:
        name: What the loss is called.
        losses: Loss of every sample.

    Returns:
        The mean over agents and samples.

    Raises:
        NotFinite: If it is not finite. The message names the first agent where it is not.
    """
    mean = losses.mean()
    if not math.isfinite(mean.item()):
        check_finite(name, losses.detach(), ("agent",))
        raise NotFinite(f"{name} is {mean.item()} (mean over all agents)")
    return mean


def check_gradient(network: str, norm: Tensor) -> None:
    """Raise unless a gradient is finite.

    Args:
        network: Whose gradient it is.
        norm: Its norm, or those of its agents' own parts.

    Raises:
        NotFinite: If it is not finite.
    """
    axes = ("agent",) * norm.dim()
    check_finite(f"the norm of the {network}'s gradient", torch.atleast_1d(norm), axes)
