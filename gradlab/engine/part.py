"""The part of a batch that one pass works on, and what the engines have in common."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gradlab.checks import UsageError, check
from gradlab.engine.rewrites import Rewrites

Theta: TypeAlias = dict[str, Tensor]
Surrogate: TypeAlias = Callable[[Theta, dict[str, Tensor]], Tensor]
"""A per-sample loss: one agent's parameters and one sample in, a scalar that is minimised out."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some samples of every agent.

    Attributes:
        batch: Tensors [agent, sample, ...] by name.
        context: Tensors [agent, ...] by name, which every sample of the agent reads as well.
        mask: Which samples exist; None if all do.
    """

    batch: Mapping[str, Tensor]
    context: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Bool[Tensor, "agent sample"] | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of agents and of samples."""
        agents, samples = next(iter(self.batch.values())).shape[:2]
        return agents, samples

    def span(self, start: int, stop: int) -> "Part":
        """A stretch of every agent's samples.

        Args:
            start: The first.
            stop: One past the last.

        Returns:
            A part that shares their memory.
        """
        return Part(
            batch={name: tensor[:, start:stop] for name, tensor in self.batch.items()},
            context=self.context,
            mask=None if self.mask is None else self.mask[:, start:stop],
        )

    def picked(self, samples: Int[Tensor, " sample"], exist: Bool[Tensor, " sample"]) -> "Part":
        """Some samples of every agent, copied.

        Args:
            samples: Their numbers.
            exist: Which of them stand for a sample; the others only fill up.

        Returns:
            The part.
        """
        mask = None if self.mask is None else self.mask[:, samples]
        if not exist.all():
            mask = exist.expand(self.sizes[0], -1) if mask is None else mask & exist
        return Part(
            batch={name: tensor[:, samples] for name, tensor in self.batch.items()},
            context=self.context,
            mask=mask,
        )

    def counts(self, clusters: int = 1) -> Int[Tensor, "agent cluster"]:
        """Number of samples in clusters of equally many successive ones.

        Args:
            clusters: How many clusters.

        Returns:
            Counts of those that exist.
        """
        agents, samples = self.sizes
        if self.mask is None:
            device = next(iter(self.batch.values())).device
            return torch.full((agents, clusters), samples // clusters, device=device)
        return self.mask.reshape(agents, clusters, -1).sum(2)


def checked_loss(
    surrogate: Surrogate, theta: Theta, sample: dict[str, Tensor], rewrites: Rewrites
) -> Tensor:
    """Call a per-sample loss and insist on a scalar.

    Args:
        surrogate: The loss.
        theta: One agent's parameters.
        sample: One sample.
        rewrites: The mode to call it under.

    Returns:
        The loss.

    Raises:
        UsageError: If it is not a scalar, or not a tensor.
    """
    with rewrites:
        loss = surrogate(theta, sample)
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            f"`surrogate` must return one scalar for one sample. Got {got}; sum or average over "
            "the extra axes."
        )
    return loss


_EXPLAINED = {
    "randomness": (
        "`surrogate` must not draw random numbers. Dropout (or another random operation) was "
        "called; put the module into eval mode, or hand fixed masks in with the batch."
    ),
    "batch norm": (
        "`surrogate` must give each sample a loss of its own. Batch norm in training mode mixes "
        "samples; put the module into eval mode, or use layer norm."
    ),
    "inplace": (
        "`surrogate` must not write in place. An in-place operation met per-sample gradients; "
        "use its out-of-place form, e.g. `x = x + y` for `x += y`."
    ),
    "data-dependent": (
        "`surrogate` must not branch on a tensor's value. Use torch.where instead of `if`, and no "
        "`.item()`."
    ),
}
_SIGNS = {
    "randomness error mode": "randomness",
    "batch norm got a batched tensor": "batch norm",
    "running_mean": "batch norm",
    "expected more than 1 value per channel": "batch norm",
    "doesn't match the broadcast shape": "inplace",
    "inplace": "inplace",
    "in-place": "inplace",
    "data-dependent control flow": "data-dependent",
    ".item() on a tensor": "data-dependent",
}


@contextmanager
def explained() -> Iterator[None]:
    """Say what is wrong with a surrogate in its user's words, where torch's are about `vmap`.

    Yields:
        Nothing.

    Raises:
        UsageError: In place of torch's error, where its cause is known.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        message = str(error).lower()
        for sign, cause in _SIGNS.items():
            if sign in message:
                first = str(error).strip().splitlines()[0]
                raise UsageError(f"{_EXPLAINED[cause]} Torch says: {first}") from error
        raise


def agent_axes(theta: Mapping[str, Tensor], agents: int) -> dict[str, int | None]:
    """Where `vmap` finds each parameter's agent axis.

    Args:
        theta: Parameters [agent, ...] by name, or [1, ...] where the agents share them.
        agents: Number of agents.

    Returns:
        0, or None for a parameter that the agents share.

    Raises:
        UsageError: If a parameter has neither as many rows as there are agents, nor one.
    """
    for name, tensor in theta.items():
        if tensor.dim() == 0 or tensor.shape[0] not in (1, agents):
            raise UsageError(
                f"Parameter {name!r} must have a leading axis of 1 or {agents}, the batch's number "
                f"of agents. Got shape {tuple(tensor.shape)}."
            )
    return {name: 0 if tensor.shape[0] == agents else None for name, tensor in theta.items()}


def without_agent_axis(theta: Mapping[str, Tensor], axes: Mapping[str, int | None]) -> Theta:
    """Detach parameters and drop the axis of those that agents share.

    Args:
        theta: Parameters with their agent axis.
        axes: What `agent_axes` returned.

    Returns:
        Tensors as `vmap` with those axes takes them.
    """
    return {
        name: tensor.detach() if axes[name] == 0 else tensor.detach()[0]
        for name, tensor in theta.items()
    }


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Put 0 where a sample does not exist, whatever was computed there.

    Args:
        values: Tensor [agent, sample, ...].
        mask: Which samples exist, [agent, sample]; None if all do.

    Returns:
        A tensor of the same shape.
    """
    if mask is None:
        return values
    mask = mask.view(*mask.shape, *[1] * (values.dim() - 2))
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def batch_axes(batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of agents and of samples in a batch.

    Args:
        batch: Tensors [agent, sample, ...] by name.

    Returns:
        Both numbers.

    Raises:
        UsageError: If the tensors disagree, or there is nothing in them.
    """
    kinds = {name: type(tensor).__name__ for name, tensor in batch.items()}
    tensors = all(isinstance(tensor, Tensor) for tensor in batch.values())
    check(tensors and len(batch) > 0, "batch", "hold tensors by name, at least one", kinds)
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    leading = {shape[:2] for shape in shapes.values()}
    check(
        len(leading) == 1 and all(len(shape) == 2 and 0 not in shape for shape in leading),
        "batch",
        "hold tensors with the same two leading axes [agent, sample], neither of size 0",
        shapes,
    )
    ((agents, samples),) = leading
    return agents, samples
