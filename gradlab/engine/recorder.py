"""Watching a per-sample function run under `vmap`: which parameters feed which known layers.

The function runs once for all agents and samples, under two nested `torch.func.vmap`. Where a
linear layer, a layer norm or a table's look-up reads a parameter, its inputs and its output are
kept: with the loss's gradient at the output they give every sample's gradient of the parameter. A
parameter that is read in any other way is reported, and its per-sample gradients must be formed.

Known layers are computed with a parameter's twin, equal to it but a tensor of its own. The loss
then depends on the parameter itself only through what was not recorded, so that no use is missed,
not even one that torch does not announce (within scripted code, say, or a nested transform).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from gradlab.engine.rewrites import Rewrites, rewrite_of

Kind: TypeAlias = Literal["linear", "affine", "lookup"]

_Place: TypeAlias = tuple[int | None, int | None]
"""Where the agents' and the samples' axes stand in a tensor below both `vmap`; None if absent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """One call of a known layer that reads parameters.

    Attributes:
        kind: "linear", "affine" (a layer norm's scale and shift) or "lookup".
        weight: Name of the parameter in the weight's place; None if something else stands there.
        bias: The same for the bias's place.
        inputs: What the layer read, [agent, sample, *use, in], or [agent, sample, *use, *shape]
            where a parameter of that shape scales it; for a lookup the rows' numbers
            [agent, sample, *use].
        version: How often their memory had been written when they were read.
        output: What it returned, as a place in the loss's graph: the tensor itself may since have
            been written over.
        place: Where agents and samples stand in what it returned.
    """

    kind: Kind
    weight: str | None
    bias: str | None
    inputs: Tensor
    version: int
    output: GradientEdge
    place: _Place

    def arrange(self, gradient: Tensor, agents: int, samples: int) -> Tensor:
        """Bring a gradient at the output into order.

        Args:
            gradient: A tensor shaped as what the layer returned.
            agents: Number of agents.
            samples: Number of samples of each agent.

        Returns:
            The gradient [agent, sample, *use, ...].
        """
        return _arranged(gradient, self.place, agents, samples)


class Recorder(Rewrites):
    """Records the uses of parameters while a function runs under the agents' and samples' `vmap`.

    Attributes:
        uses: Uses by known layers, in order.
        other: Names of the parameters that are read in another way.
    """

    def __init__(self, agents: int, samples: int) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.other: set[str] = set()
        self._sizes = (agents, samples)
        self._names: dict[int, str] = {}
        self._twins: dict[str, Tensor] = {}
        self._zero: Tensor = torch.empty(0)
        self._inner, self._outer = -1, -1  # levels of the samples' and the agents' `vmap`

    def watch(
        self, parameters: Mapping[str, Tensor], twins: Mapping[str, Tensor], zero: Tensor
    ) -> None:
        """Name the tensors to look out for, as they appear inside both `vmap`.

        Args:
            parameters: The parameters; the tensors must outlive the recording.
            twins: What known layers are to compute with, by the same names.
            zero: The scalar 0 of every agent and sample.
        """
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._twins = dict(twins)
        self._zero = zero
        self._inner = _functorch.maybe_get_level(zero)
        self._outer = _functorch.maybe_get_level(_functorch.get_unwrapped(zero))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        names = self._read(args)
        if kwargs:
            names += self._read(tuple(kwargs.values()))
        constant = not torch.is_grad_enabled()
        if not names or constant or rewrite_of(func, args, kwargs) is not None:
            return super().__torch_function__(func, types, args, kwargs)
        rule = _RULES.get(func)
        if rule is not None:
            output = rule(self, *args, **kwargs)
            if output is not None:
                return output
        output = func(*args, **kwargs)
        if any(self._has_gradient(tensor) for tensor in _tensors(output)):
            self.other.update(names)
        return output

    def _has_gradient(self, tensor: Tensor) -> bool:
        """Whether the loss's gradient may go through a tensor."""
        below = self._below(tensor)
        return below is None or below[0].requires_grad

    def _read(self, arguments: Sequence[Any]) -> list[str]:
        """Names of the parameters among a function's arguments."""
        found: list[str] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                name = self._names.get(id(argument))
                if name is not None:
                    found.append(name)
            elif isinstance(argument, tuple | list):
                found += self._read(argument)
            elif isinstance(argument, dict):
                found += self._read(tuple(argument.values()))
        return found

    def name_of(self, tensor: Tensor | None) -> str | None:
        """Name a parameter.

        Args:
            tensor: Any tensor, as it appears inside both `vmap`.

        Returns:
            The parameter's name; None for another tensor.
        """
        return self._names.get(id(tensor))

    def twin_of(self, tensor: Tensor) -> Tensor:
        """What a known layer computes with.

        Args:
            tensor: What stands in a weight's or a bias's place.

        Returns:
            The twin of a parameter; another tensor itself.
        """
        name = self.name_of(tensor)
        return tensor if name is None else self._twins[name]

    def is_per_sample(self, tensor: Tensor) -> bool:
        """Whether a tensor differs between agents and between samples, as far as `vmap` knows."""
        below = self._below(tensor)
        return below is not None and None not in below[1]

    def record(
        self, kind: Kind, inputs: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor | None:
        """Keep a use.

        Args:
            kind: Kind of the layer.
            inputs: What it read.
            output: What it returned.
            weight: What stood in the weight's place.
            bias: What stood in the bias's place.

        Returns:
            The output to go on with; None if the use cannot be recorded.
        """
        if self.name_of(inputs) is not None:
            return None
        written = self._below(output)
        if written is not None and (None in written[1] or written[0]._is_view()):
            # Equal for all samples (or agents): its gradient would come summed over them. A view's
            # place in the graph is lost when it is written over.
            output = output + self._zero
            written = self._below(output)
        read = self._below(inputs)
        if written is None or read is None or not written[0].requires_grad:
            return None
        self.uses.append(
            Use(
                kind=kind,
                weight=self.name_of(weight),
                bias=self.name_of(bias),
                inputs=_arranged(read[0].detach(), read[1], *self._sizes),
                version=read[0]._version,
                output=get_gradient_edge(written[0]),
                place=written[1],
            )
        )
        return output

    def _below(self, tensor: Tensor) -> tuple[Tensor, _Place] | None:
        """The tensor below both `vmap`; None if yet another transform is at work."""
        places: list[int | None] = [None, None]
        for number, level in ((1, self._inner), (0, self._outer)):
            if _functorch.maybe_get_level(tensor) == level:
                places[number] = _functorch.maybe_get_bdim(tensor)
                tensor = _functorch.get_unwrapped(tensor)
        if _functorch.is_functorch_wrapped_tensor(tensor):
            return None
        return tensor, (places[0], places[1])


def _arranged(tensor: Tensor, place: _Place, agents: int, samples: int) -> Tensor:
    if place == (0, 0):
        return tensor
    agent, sample = place
    if agent is None:
        tensor = tensor[None].expand(agents, *tensor.shape)
    elif agent != 0:
        tensor = tensor.movedim(agent, 0)
    if sample is None:
        return tensor[:, None].expand(agents, samples, *tensor.shape[1:])
    return tensor.movedim(sample + 1, 1)  # counted without the agents' axis


def _tensors(tree: Any) -> Iterator[Tensor]:  # noqa: ANN401
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


def _linear(
    recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    output = functional.linear(input, recorder.twin_of(weight))
    if bias is not None:
        own = recorder.twin_of(bias)
        # Where it can be done, in place: one tensor less to write and to read.
        output = output.add_(own) if recorder.is_per_sample(output) else output + own
    return recorder.record("linear", input, output, weight, bias)


def _layer_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if recorder.name_of(input) is not None or weight is None:
        return None
    normed = functional.layer_norm(input, normalized_shape, eps=eps)
    output = normed * recorder.twin_of(weight)
    if bias is not None:
        output = output + recorder.twin_of(bias)
    return recorder.record("affine", normed, output, weight, bias)


def _index_select(recorder: Recorder, input: Tensor, dim: int, index: Tensor) -> Tensor | None:
    if dim != 0 or recorder.name_of(input) is None:
        return None
    output = torch.index_select(recorder.twin_of(input), 0, index)
    return recorder.record("lookup", index, output, input)


_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.layer_norm: _layer_norm,
    torch.index_select: _index_select,
    Tensor.index_select: _index_select,
}
