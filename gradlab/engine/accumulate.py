"""From a batch to moments: cut into parts that fit the memory, each part's gradients summed up."""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gradlab.checks import UsageError, check
from gradlab.engine.clusters import EXACT, ClusterSums, FactoredSums, FormedSums, RunningSum
from gradlab.engine.moments import Moments
from gradlab.engine.part import Part, checked_part
from gradlab.engine.per_sample import Outer, PerSample, Taken
from gradlab.engine.plan import Engine, Plan, forget, gradients, plan_for
from gradlab.engine.structured import Unstructured
from gradlab.engine.surrogate import Surrogate
from gradlab.parameters import ParameterLayout

DEFAULT_BUDGET = 32 * 2**20
"""Bytes that what is kept for one part's gradients may take."""


_FORMED = 16 * 2**20
"""Bytes of a parameter's sums by copy that are kept formed even if their factors are smaller."""

_NONE = 2**62  # greater than any sample's number


def gradient_moments(
    surrogate: Surrogate,
    theta: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    *,
    mask: Bool[Tensor, "agent sample"] | None = None,
    context: Mapping[str, Tensor] | None = None,
    copy: Int[Tensor, " sample"] | None = None,
    coordinates: bool = False,
    plain: bool = False,
    engine: Engine = "auto",
    budget: int = DEFAULT_BUDGET,
) -> Moments:
    r"""First and second moments of the per-sample gradients :math:`\nabla_{\theta_i} \ell`.

    Exact for any loss. A sample is whatever the surrogate takes as one: one decision or, for a
    recurrent policy, a whole segment of a trajectory.

    Args:
        surrogate: Loss of one sample, given one agent's parameters (without the agent axis) and
            the sample (without agent and sample axes). Must work under `torch.func.vmap`.
        theta: Policy parameters [agent, ...] by name, or [1, ...] where the agents share one.
        batch: Tensors [agent, sample, ...] by name, what `surrogate` reads.
        mask: Which samples exist; all by default.
        context: Tensors [agent, ...] by name that each of the agent's samples holds as well, e.g.
            a critic's fixed parameters.
        copy: The environment copy that each sample comes from; if given, gradients are also
            summed by copy.
        coordinates: Whether to sum squared coordinates too.
        plain: Whether to sum up, too, what autograd makes of the losses' sum over each agent's
            samples, with no sample told from another: the check of all the rest.
        engine: "auto": structured wherever a known layer reads a parameter; "general": per-sample
            gradients of everything by `vmap` of `grad`.
        budget: Bytes that what is kept for one part's gradients may take; a batch that needs more
            is streamed in parts.

    Returns:
        The moments; all but the sums by copy are added up in float64.

    Raises:
        UsageError: If axes disagree, or the surrogate's gradient cannot be taken per sample; the
            message names the cause.
    """
    whole = checked_part(theta, batch, mask=mask, context=context)
    agents, samples = whole.sizes
    if plain:
        theta = {name: tensor.expand(agents, *tensor.shape[1:]) for name, tensor in theta.items()}
        whole = whole.filled()
    check(engine in ("auto", "general"), "engine", "be 'auto' or 'general'", engine)
    check(budget > 0, "budget", "be a positive number of bytes", budget)
    if copy is not None:
        check(isinstance(copy, Tensor), "copy", "be a tensor", type(copy).__name__)
        whole_numbers = not (copy.is_floating_point() or copy.is_complex())
        rule = f"hold whole numbers and have shape {(samples,)} as the batch has"
        got = (copy.dtype, tuple(copy.shape))
        check(whole_numbers and got[1] == (samples,), "copy", rule, got)
    for last in (False, True):
        plan = plan_for(surrogate, theta, whole, engine)
        sums = _Sums(theta, agents, plan, copy, coordinates=coordinates, plain=plain)
        room = max(1, min(EXACT, budget // max(1, plan.bytes_per_sample)))
        try:
            for part, clusters, numbers in _parts(whole, sums.index, room):
                taken = gradients(surrogate, theta, part, plan, plain=plain)
                sums.add(taken, part, clusters, numbers)
        except Unstructured as changed:
            forget(surrogate)
            if last:
                raise UsageError(
                    "`surrogate` must read its parameters in the same way for all samples. Got "
                    f"another use of {changed} in a later part; pass engine='general'."
                ) from changed
        else:
            break
    return sums.moments()


def _parts(
    whole: Part, index: Int[Tensor, "copy place"] | None, room: int
) -> Iterator[tuple[Part, slice, Int[Tensor, " sample"]]]:
    """Cut a batch into parts of at most `room` samples: each with its copies and sample numbers."""
    if index is None:
        device = next(iter(whole.batch.values())).device
        for samples in _even(whole.sizes[1], room):
            numbers = torch.arange(samples.start, samples.stop, device=device)
            yield whole.span(samples.start, samples.stop), slice(0, 1), numbers
        return
    copies, length = index.shape
    filled_up = bool((index < 0).any())
    for some in _even(copies, max(1, room // length)):
        for samples in _even(length, room):
            numbers = index[some, samples].flatten()
            exist = numbers >= 0 if filled_up else None
            yield whole.picked(numbers.clamp(min=0), exist), some, numbers


def _even(total: int, most: int) -> list[slice]:
    """Cut a range into as few stretches of at most `most` as there can be, nearly equal."""
    number = math.ceil(total / most)
    edges = [total * i // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _by_copy(
    copy: Int[Tensor, " sample"],
) -> tuple[Int[Tensor, " copy"], Int[Tensor, "copy place"]]:
    """The copies' labels, and the numbers of each one's samples, filled up with -1."""
    labels, place, counts = torch.unique(copy, return_inverse=True, return_counts=True)
    order = torch.argsort(place, stable=True)
    rank = torch.arange(len(copy), device=copy.device) - (counts.cumsum(0) - counts)[place[order]]
    index = torch.full((len(labels), int(counts.max())), -1, device=copy.device)
    index[place[order], rank] = order
    return labels, index


class _Sums:
    """The sums while they are being added up, by parameter or layer."""

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        agents: int,
        plan: Plan,
        copy: Int[Tensor, " sample"] | None,
        *,
        coordinates: bool,
        plain: bool,
    ) -> None:
        self.layout = ParameterLayout.of(theta, batch_dims=1)
        self.plan = plan
        self.copies: Tensor | None = None
        self.index: Tensor | None = None
        if copy is not None:
            self.copies, self.index = _by_copy(copy)
        self.like = next(iter(theta.values())).detach()
        self.agents = agents
        clusters = 1 if self.copies is None else len(self.copies)
        shapes = self.layout.shapes
        self.sum = {name: RunningSum(self.like, agents, shape) for name, shape in shapes.items()}
        self.by_copy: dict[str, ClusterSums] = {}
        self.square = (
            {
                name: self.like.new_zeros(agents, *shape, dtype=torch.float64)
                for name, shape in shapes.items()
            }
            if coordinates
            else None
        )
        self.plain: dict[str, Tensor] | None = {} if plain else None
        per_layer = (agents, len(self.layout.layers))
        self.squared_norm = self.like.new_zeros(per_layer, dtype=torch.float64)
        self.non_finite = self.like.new_zeros(per_layer, dtype=torch.int64)
        self.first = torch.full_like(self.non_finite, _NONE)
        self.count = self.like.new_zeros(agents, clusters, dtype=torch.int64)

    def add(
        self,
        taken: Taken,
        part: Part,
        clusters: slice,
        numbers: Int[Tensor, " sample"],
    ) -> None:
        """Add the gradients of the numbered samples, which belong to some of the clusters."""
        self.count[:, clusters] += part.counts(clusters.stop - clusters.start)
        by_layer: dict[str, Tensor] = {}
        if self.plain is not None:
            for name, tensor in taken.plain.items():
                total = tensor.double()
                self.plain[name] = self.plain[name] + total if name in self.plain else total
        for name, gradient in taken.per_sample.items():
            if self.index is None:
                self.sum[name].add(gradient, part.sizes[1])
            else:
                if name not in self.by_copy:
                    self.by_copy[name] = self._cluster_sums(gradient, *self.index.shape)
                self.by_copy[name].add(gradient, clusters)
            if self.square is not None:
                self.square[name] += gradient.squares()
            layer = self.layout.layer_of[name]
            norms = gradient.squared_norms()
            by_layer[layer] = by_layer[layer] + norms if layer in by_layer else norms
        if by_layer:
            columns = [self.layout.layers.index(layer) for layer in by_layer]
            squared = torch.stack(list(by_layer.values()))
            self.squared_norm[:, columns] += squared.sum(2, dtype=torch.float64).mT
            bad = ~squared.isfinite()
            self.non_finite[:, columns] += bad.sum(2).mT
            first = torch.where(bad, numbers, _NONE).amin(2).mT
            self.first[:, columns] = torch.minimum(self.first[:, columns], first)

    def _cluster_sums(self, gradient: PerSample, clusters: int, samples: int) -> ClusterSums:
        """The form in which a parameter's sums by copy take less memory."""
        size = math.prod(gradient.shape)
        small = self.agents * clusters * size * self.like.element_size() <= _FORMED
        factors_are_smaller = (
            isinstance(gradient, Outer) and gradient.numbers_per_sample * samples < size
        )
        if factors_are_smaller and not small:
            return FactoredSums(self.like, self.agents, clusters, gradient.shape)
        return FormedSums.empty(self.like, self.agents, clusters, samples, gradient.shape)

    def moments(self) -> Moments:
        """What was added up."""
        if self.index is None:
            sums = {name: running.total() for name, running in self.sum.items()}
        else:
            nothing = self.like.new_zeros(())
            for name, shape in self.layout.shapes.items():
                if name not in self.by_copy:  # not read
                    empty = nothing.expand(self.agents, len(self.index), *shape)
                    self.by_copy[name] = FormedSums(empty)
            self.by_copy = {name: self.by_copy[name] for name in self.layout.shapes}
            sums = {name: by_copy.total() for name, by_copy in self.by_copy.items()}
        plain = self.plain
        if plain is not None:
            nothing = self.like.new_zeros((), dtype=torch.float64)
            plain = {
                name: plain[name] if name in plain else nothing.expand(self.agents, *shape)
                for name, shape in self.layout.shapes.items()
            }
        return Moments(
            layout=self.layout,
            engines=self.plan.engines,
            count=self.count.sum(1),
            sum=self.layout.flatten(sums),
            squared_norm=self.squared_norm,
            non_finite=self.non_finite,
            first_non_finite=torch.where(self.first == _NONE, -1, self.first),
            square=None if self.square is None else self.layout.flatten(self.square),
            plain=None if plain is None else self.layout.flatten(plain),
            copies=self.copies,
            copy_count=None if self.copies is None else self.count,
            copy_sums=None if self.copies is None else self.by_copy,
        )
