"""What one pass of an engine works on: some samples of every agent, and the parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gradlab.checks import UsageError, check
from gradlab.engine.surrogate import Theta


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

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return next(iter(self.batch.values())).device

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

    def picked(
        self, samples: Int[Tensor, " sample"], exist: Bool[Tensor, " sample"] | None = None
    ) -> "Part":
        """Some samples of every agent, copied.

        Args:
            samples: Their numbers.
            exist: Which of them stand for a sample, the others only filling up; all by default.

        Returns:
            The part.
        """
        mask = None if self.mask is None else self.mask[:, samples]
        if exist is not None:
            mask = exist.expand(self.sizes[0], -1) if mask is None else mask & exist
        return Part(
            batch={name: tensor[:, samples] for name, tensor in self.batch.items()},
            context=self.context,
            mask=mask,
        )

    def filled(self) -> "Part":
        """Another sample's content in place of that of samples that do not exist.

        For functions of the whole batch, whose derivatives may not be finite for any content.

        Returns:
            A part with the same mask; itself if all samples exist, or none does.
        """
        if self.mask is None or self.mask.all() or not self.mask.any():
            return self
        agent, sample = self.mask.nonzero()[0]

        def of_existing(tensor: Tensor) -> Tensor:
            assert self.mask is not None
            exist = self.mask.view(*self.mask.shape, *[1] * (tensor.dim() - 2))
            return torch.where(exist, tensor, tensor[agent, sample])

        batch = {name: of_existing(tensor) for name, tensor in self.batch.items()}
        return replace(self, batch=batch)

    def counts(self, clusters: int = 1) -> Int[Tensor, "agent cluster"]:
        """Number of samples in clusters of equally many successive ones.

        Args:
            clusters: How many clusters.

        Returns:
            Counts of those that exist.
        """
        agents, samples = self.sizes
        if self.mask is None:
            return torch.full((agents, clusters), samples // clusters, device=self.device)
        return self.mask.reshape(agents, clusters, -1).sum(2)


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


def in_precision(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert what are not whole numbers.

    Args:
        tensors: Tensors by name.
        dtype: Their type.

    Returns:
        Tensors of the same shapes.
    """
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


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


def checked_part(
    theta: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    *,
    mask: Bool[Tensor, "agent sample"] | None = None,
    context: Mapping[str, Tensor] | None = None,
) -> Part:
    """Check what the engine is given.

    Args:
        theta: Parameters [agent, ...] or [1, ...] by name.
        batch: Tensors [agent, sample, ...] by name.
        mask: Which samples exist; all by default.
        context: Tensors [agent, ...] by name.

    Returns:
        The whole batch as one part.

    Raises:
        UsageError: If something is not as it must be, or no gradient can be taken here.
    """
    agents, samples = batch_axes(batch)
    _check_tensors("theta", theta)
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in theta.items()}
    check(
        set(kinds.values()) in ({"float32"}, {"float64"}),
        "theta",
        "hold tensors all of float32 or all of float64, at least one; convert with .float()",
        kinds,
    )
    agent_axes(theta, agents)
    if mask is not None:
        check(isinstance(mask, Tensor), "mask", "be a tensor", type(mask).__name__)
        got = (mask.dtype, tuple(mask.shape))
        rule = f"hold booleans and have shape {(agents, samples)} as the batch has"
        check(got == (torch.bool, (agents, samples)), "mask", rule, got)
    context = {} if context is None else context
    if context:
        _check_tensors("context", context)
    for name, tensor in context.items():
        where = f"context[{name!r}]"
        check(name not in batch, where, "have a name that the batch has not", name)
        rule = f"have a leading axis of {agents}, the batch's number of agents; expand what is one"
        check(tensor.shape[:1] == (agents,), where, rule, tuple(tensor.shape))
    _check_surroundings({**theta, **batch, **context})
    return Part(batch=batch, context=context, mask=mask)


def _check_tensors(name: str, tensors: object) -> None:
    kinds: object = type(tensors).__name__
    if isinstance(tensors, Mapping):
        kinds = {key: type(value).__name__ for key, value in tensors.items()}
        if kinds and all(isinstance(value, Tensor) for value in tensors.values()):
            return
    check(False, name, "hold tensors by name, at least one", kinds)


def _check_surroundings(tensors: Mapping[str, Tensor]) -> None:
    """Refuse modes in which there are no gradients, or sums would be rounded."""
    without = torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors.values())
    if without:
        made = [name for name, tensor in tensors.items() if tensor.is_inference()]
        raise UsageError(
            "Per-sample gradients cannot be taken under torch.inference_mode, nor of tensors made "
            f"there. Got {', '.join(made) or 'the mode enabled'}; use torch.no_grad instead."
        )
    device = next(iter(tensors.values())).device.type
    if torch.is_autocast_enabled(device):
        raise UsageError(
            "Per-sample gradients must not be summed under torch.autocast, which would round the "
            f"sums. Got autocast enabled for {device}; enter it inside `surrogate`."
        )


def batch_axes(batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of agents and of samples in a batch.

    Args:
        batch: Tensors [agent, sample, ...] by name.

    Returns:
        Both numbers.

    Raises:
        UsageError: If the tensors disagree, or there is nothing in them.
    """
    _check_tensors("batch", batch)
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
