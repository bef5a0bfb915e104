r"""Per-sample gradients of one parameter, kept in the smallest form that gives their reductions.

A linear layer's weight has, for one sample, the gradient :math:`\sum_t d_t a_t^\top` with the
layer's inputs :math:`a_t` and the loss's gradients :math:`d_t` with respect to its outputs; t runs
over the layer's uses (several calls, a time axis). Sums, squared norms and inner products of such
gradients follow from the factors (Goodfellow, "Efficient per-example gradient computations",
2015, for one use; the double sum over t for more).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class PerSample(ABC):
    """Gradients of all samples of all agents with respect to one parameter.

    Attributes:
        shape: The parameter's shape, without agent and sample axes.
    """

    shape: torch.Size

    @property
    @abstractmethod
    def samples(self) -> int:
        """Number of samples of each agent."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are kept."""

    @abstractmethod
    def some(self, samples: slice | Int[Tensor, " sample"]) -> "PerSample":
        """The gradients of some of every agent's samples.

        Args:
            samples: Which samples.

        Returns:
            Gradients that share these ones' memory, if it is a slice.
        """

    @abstractmethod
    def rows(self) -> Float[Tensor, "agent sample *shape"]:
        """Form the gradients."""

    @abstractmethod
    def sum(self) -> Float[Tensor, " agent *shape"]:
        """Sum over samples."""

    @abstractmethod
    def add_sums(self, out: Float[Tensor, "agent cluster *shape"], *, fresh: bool = False) -> None:
        """Add sums over clusters of equally many successive samples, in place.

        Args:
            out: What to add to.
            fresh: Whether to overwrite it instead.
        """

    @abstractmethod
    def squared_norms(self) -> Float[Tensor, "agent sample"]:
        """Squared Euclidean norm of each sample's gradient."""

    @abstractmethod
    def squares(self) -> Float[Tensor, " agent *shape"]:
        """Sum over samples of the squared coordinates."""

    def _squares_of_formed(self, agents: int, samples: int) -> Float[Tensor, " agent *shape"]:
        """The same by forming the gradients, no more at once than fit the memory of what is kept.

        They may be far larger than their factors.
        """
        each = max(1, self.nbytes // (agents * samples))  # bytes kept of one gradient
        formed = self.some(slice(0, 1)).rows()
        size = _bytes(formed) // agents
        step = max(1, samples * each // max(1, size))
        total = formed.square().sum(1)
        for start in range(1, samples, step):
            total += self.some(slice(start, start + step)).rows().square().sum(1)
        return total

    @abstractmethod
    def to(self, dtype: torch.dtype) -> "PerSample":
        """The same in a precision.

        Args:
            dtype: The precision.

        Returns:
            Gradients that share these ones' memory if they have it already.
        """

    @abstractmethod
    def regrouped(self, agents: int) -> "PerSample":
        """The same gradients in the same order, as of another number of agents.

        Args:
            agents: How many agents the samples are to be cut into.

        Returns:
            Gradients that share these ones' memory where they can.
        """

    @abstractmethod
    def inner(self, other: "PerSample") -> Float[Tensor, "agent sample sample_other"]:
        """Inner products of each agent's gradients with another's of the same agent.

        Args:
            other: Gradients of the same parameter, kept in the same form, of equally many agents
                or of a single one that stands for all.

        Returns:
            The products.
        """

    @abstractmethod
    def mapped(self, function: Callable[[Tensor], Tensor]) -> "PerSample":
        """Apply a function with f(x y) = f(x) f(y) to every coordinate: sign, absolute value.

        Args:
            function: The function, of tensors.

        Returns:
            The results.
        """

    @abstractmethod
    def coordinate_sums(self) -> Float[Tensor, "agent sample"]:
        """Sum of each gradient's coordinates."""

    def gram(self) -> Float[Tensor, "row row_other"]:
        """Inner products between all gradients; a row is agent * samples + sample."""
        rows = self.regrouped(1)
        return rows.inner(rows)[0]


class Taken(NamedTuple):
    """What one pass of an engine takes.

    Attributes:
        per_sample: Every sample's gradient, of every parameter that the loss reads.
        plain: If asked for, the sums over each agent's samples as autograd makes them, with no
            sample told from another: tensors [agent, ...], what `per_sample` must add up to.
    """

    per_sample: dict[str, PerSample]
    plain: dict[str, Tensor]


class SquaredLengths:
    """Vectors, and their squared lengths, computed at most once.

    Attributes:
        vectors: Tensor [agent, sample, *use, size].
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self._values: Tensor | None = None

    def __call__(self) -> Tensor:
        """The squared lengths [agent, sample, *use]."""
        if self._values is None:
            self._values = _squared_length(self.vectors)
        return self._values


class Rows(PerSample):
    """The gradients themselves.

    Attributes:
        values: Tensor [agent, sample, *shape].
    """

    def __init__(
        self,
        values: Float[Tensor, "agent sample *shape"],
        lengths: SquaredLengths | None = None,
    ) -> None:
        self.values = values
        self.shape = values.shape[2:]
        self._lengths = lengths

    @property
    def samples(self) -> int:
        """See `PerSample.samples`."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """See `PerSample.nbytes`."""
        return _bytes(self.values)

    def some(self, samples: slice | Int[Tensor, " sample"]) -> "Rows":
        """See `PerSample.some`."""
        return Rows(self.values[:, samples])

    def rows(self) -> Float[Tensor, "agent sample *shape"]:
        """See `PerSample.rows`."""
        return self.values

    def sum(self) -> Float[Tensor, " agent *shape"]:
        """See `PerSample.sum`."""
        return self.values.sum(1)

    def add_sums(self, out: Float[Tensor, "agent cluster *shape"], *, fresh: bool = False) -> None:
        """See `PerSample.add_sums`."""
        sums = self.values.unflatten(1, (out.shape[1], -1)).sum(2)
        if fresh:
            out.copy_(sums)
        else:
            out += sums

    def squared_norms(self) -> Float[Tensor, "agent sample"]:
        """See `PerSample.squared_norms`."""
        if self._lengths is not None:
            return self._lengths()
        return _squared_length(self.values.reshape(*self.values.shape[:2], math.prod(self.shape)))

    def squares(self) -> Float[Tensor, " agent *shape"]:
        """See `PerSample.squares`."""
        return self.values.square().sum(1)

    def to(self, dtype: torch.dtype) -> "Rows":
        """See `PerSample.to`."""
        return Rows(self.values.to(dtype))

    def regrouped(self, agents: int) -> "Rows":
        """See `PerSample.regrouped`."""
        return Rows(_regrouped(self.values, agents))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """See `PerSample.mapped`."""
        return Rows(function(self.values))

    def coordinate_sums(self) -> Float[Tensor, "agent sample"]:
        """See `PerSample.coordinate_sums`."""
        return self.values.reshape(*self.values.shape[:2], math.prod(self.shape)).sum(2)

    def inner(self, other: PerSample) -> Float[Tensor, "agent sample sample_other"]:
        """See `PerSample.inner`."""
        assert isinstance(other, Rows)
        size = math.prod(self.shape)
        ours, theirs = (t.reshape(*t.shape[:2], size) for t in (self.values, other.values))
        return _matrix_products(ours, theirs)


class Outer(PerSample):
    r"""Gradients :math:`\sum_t d_t a_t^\top` of a linear layer's weight.

    Attributes:
        inputs: What the layer read, [agent, sample, use, in].
        output_gradients: The loss's gradients at its outputs, [agent, sample, use, out].
    """

    def __init__(
        self,
        inputs: Float[Tensor, "agent sample use in"],
        output_gradients: Float[Tensor, "agent sample use out"],
        lengths: SquaredLengths | None = None,
    ) -> None:
        self.inputs = inputs
        self.output_gradients = output_gradients
        self._lengths = lengths
        self.shape = torch.Size((output_gradients.shape[-1], inputs.shape[-1]))

    @property
    def samples(self) -> int:
        """See `PerSample.samples`."""
        return self.inputs.shape[1]

    @property
    def numbers_per_sample(self) -> int:
        """How many numbers are kept of one sample of one agent."""
        return self.inputs.shape[2] * sum(self.shape)

    @property
    def nbytes(self) -> int:
        """See `PerSample.nbytes`."""
        return _bytes(self.inputs) + _bytes(self.output_gradients)

    def some(self, samples: slice | Int[Tensor, " sample"]) -> "Outer":
        """See `PerSample.some`."""
        return Outer(self.inputs[:, samples], self.output_gradients[:, samples])

    def rows(self) -> Float[Tensor, "agent sample *shape"]:
        """See `PerSample.rows`."""
        return self.output_gradients.mT @ self.inputs

    def sum(self) -> Float[Tensor, " agent *shape"]:
        """See `PerSample.sum`."""
        return self.output_gradients.flatten(1, 2).mT @ self.inputs.flatten(1, 2)

    def add_sums(self, out: Float[Tensor, "agent cluster *shape"], *, fresh: bool = False) -> None:
        """See `PerSample.add_sums`."""
        a, d = (
            factor.unflatten(1, (out.shape[1], -1)).flatten(2, 3)
            for factor in (self.inputs, self.output_gradients)
        )
        if out.is_contiguous():  # one product of all agents
            into, d, a = (t.flatten(0, 1) for t in (out, d, a))
            if fresh:
                torch.bmm(d.mT, a, out=into)
            else:
                into.baddbmm_(d.mT, a)
            return
        for agent, sums in enumerate(out):  # contiguous, so that one batched product fills it
            if fresh:
                torch.bmm(d[agent].mT, a[agent], out=sums)
            else:
                sums.baddbmm_(d[agent].mT, a[agent])

    def squared_norms(self) -> Float[Tensor, "agent sample"]:
        """See `PerSample.squared_norms`."""
        a, d = self.inputs, self.output_gradients
        uses, outputs, inputs = a.shape[2], d.shape[3], a.shape[3]
        if uses == 1:
            of_outputs = self._lengths() if self._lengths else _squared_length(d[:, :, 0])
            return _squared_length(a[:, :, 0]) * of_outputs
        if uses * (inputs + outputs) < inputs * outputs:
            return ((a @ a.mT) * (d @ d.mT)).sum((-2, -1)).clamp(min=0)  # rounding may go below
        return _squared_length(self.rows().flatten(2))

    def squares(self) -> Float[Tensor, " agent *shape"]:
        """See `PerSample.squares`."""
        if self.inputs.shape[2] > 1:
            return self._squares_of_formed(*self.inputs.shape[:2])
        return self.output_gradients[:, :, 0].square().mT @ self.inputs[:, :, 0].square()

    def to(self, dtype: torch.dtype) -> "Outer":
        """See `PerSample.to`."""
        return Outer(self.inputs.to(dtype), self.output_gradients.to(dtype))

    def regrouped(self, agents: int) -> "Outer":
        """See `PerSample.regrouped`."""
        return Outer(_regrouped(self.inputs, agents), _regrouped(self.output_gradients, agents))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> PerSample:
        """See `PerSample.mapped`."""
        if self.inputs.shape[2] > 1:
            return Rows(function(self.rows()))
        return Outer(function(self.inputs), function(self.output_gradients))

    def coordinate_sums(self) -> Float[Tensor, "agent sample"]:
        """See `PerSample.coordinate_sums`."""
        return (self.inputs.sum(3) * self.output_gradients.sum(3)).sum(2)

    def inner(self, other: PerSample) -> Float[Tensor, "agent sample sample_other"]:
        """See `PerSample.inner`."""
        assert isinstance(other, Outer)
        a, d, b, e = (
            t.flatten(1, 2)
            for t in (self.inputs, self.output_gradients, other.inputs, other.output_gradients)
        )
        products = _matrix_products(a, b) * _matrix_products(d, e)
        return _sum_uses(products, self.inputs.shape[2], other.inputs.shape[2])


class Lookup(PerSample):
    """Gradients of a table of which a sample reads some rows: an embedding.

    Attributes:
        index: Which row is read, [agent, sample, use].
        output_gradients: The loss's gradients at what was read, [agent, sample, use, *row].
    """

    def __init__(
        self,
        index: Int[Tensor, "agent sample use"],
        output_gradients: Float[Tensor, "agent sample use *row"],
        shape: torch.Size,
    ) -> None:
        self.index = index
        self.output_gradients = output_gradients
        self.shape = shape

    @property
    def samples(self) -> int:
        """See `PerSample.samples`."""
        return self.index.shape[1]

    @property
    def nbytes(self) -> int:
        """See `PerSample.nbytes`."""
        return _bytes(self.index) + _bytes(self.output_gradients)

    def some(self, samples: slice | Int[Tensor, " sample"]) -> "Lookup":
        """See `PerSample.some`."""
        return Lookup(self.index[:, samples], self.output_gradients[:, samples], self.shape)

    def rows(self) -> Float[Tensor, "agent sample *shape"]:
        """See `PerSample.rows`."""
        return self._scatter(self.index.flatten(0, 1), self.output_gradients.flatten(0, 1)).view(
            *self.index.shape[:2], *self.shape
        )

    def sum(self) -> Float[Tensor, " agent *shape"]:
        """See `PerSample.sum`."""
        return self._scatter(self.index.flatten(1), self.output_gradients.flatten(1, 2))

    def add_sums(self, out: Float[Tensor, "agent cluster *shape"], *, fresh: bool = False) -> None:
        """See `PerSample.add_sums`."""
        clusters = out.shape[1]
        index, d = (
            tensor.unflatten(1, (clusters, -1)).flatten(2, 3).flatten(0, 1)
            for tensor in (self.index, self.output_gradients)
        )
        sums = self._scatter(index, d).view_as(out)
        if fresh:
            out.copy_(sums)
        else:
            out += sums

    def squared_norms(self) -> Float[Tensor, "agent sample"]:
        """See `PerSample.squared_norms`."""
        d = self.output_gradients.reshape(*self.index.shape, math.prod(self.shape[1:]))
        uses = d.shape[2]
        if uses == 1:
            return _squared_length(d[:, :, 0])
        if uses**2 > math.prod(self.shape):
            return _squared_length(self.rows().flatten(2))
        same = self.index[..., :, None] == self.index[..., None, :]
        return (same * (d @ d.mT)).sum((-2, -1)).clamp(min=0)

    def squares(self) -> Float[Tensor, " agent *shape"]:
        """See `PerSample.squares`."""
        if self.index.shape[2] > 1:
            return self._squares_of_formed(*self.index.shape[:2])
        d = self.output_gradients.square()
        return self._scatter(self.index.flatten(1), d.flatten(1, 2))

    def to(self, dtype: torch.dtype) -> "Lookup":
        """See `PerSample.to`."""
        return Lookup(self.index, self.output_gradients.to(dtype), self.shape)

    def regrouped(self, agents: int) -> "Lookup":
        """See `PerSample.regrouped`."""
        index, d = (_regrouped(t, agents) for t in (self.index, self.output_gradients))
        return Lookup(index, d, self.shape)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> PerSample:
        """See `PerSample.mapped`."""
        if self.index.shape[2] > 1:
            return Rows(function(self.rows()))
        return Lookup(self.index, function(self.output_gradients), self.shape)

    def coordinate_sums(self) -> Float[Tensor, "agent sample"]:
        """See `PerSample.coordinate_sums`."""
        return self.output_gradients.flatten(2).sum(2)

    def inner(self, other: PerSample) -> Float[Tensor, "agent sample sample_other"]:
        """See `PerSample.inner`."""
        assert isinstance(other, Lookup)
        size = math.prod(self.shape[1:])
        (i, d), (k, e) = (
            (t.index.flatten(1), t.output_gradients.reshape(len(t.index), -1, size))
            for t in (self, other)
        )
        products = (i[:, :, None] == k[:, None, :]) * _matrix_products(d, e)
        return _sum_uses(products, self.index.shape[2], other.index.shape[2])

    def _scatter(self, index: Tensor, values: Tensor) -> Tensor:
        """Add values [batch, use, *row] into tables [batch, *shape]."""
        batch, length = len(index), self.shape[0]
        tables = values.new_zeros(batch * length, *self.shape[1:])
        offset = torch.arange(batch, device=index.device)[:, None] * length
        tables.index_add_(0, (index + offset).flatten(), values.flatten(0, 1))
        return tables.view(batch, *self.shape)


def _squared_length(vectors: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch"]:
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths.square()


def _matrix_products(
    rows: Float[Tensor, "agent row size"],
    others: Float[Tensor, "agent_other other size"],
) -> Float[Tensor, "agent row other"]:
    """Inner products within each agent; a single other agent stands for all."""
    products: Tensor = rows @ (others[0] if len(others) == 1 else others).mT
    return products


def _sum_uses(
    products: Float[Tensor, "agent use use_other"], uses: int, uses_other: int
) -> Float[Tensor, "agent sample sample_other"]:
    """Inner products between samples' uses, summed to those between samples."""
    if uses == uses_other == 1:
        return products
    by_use: Tensor = products.unflatten(2, (-1, uses_other)).unflatten(1, (-1, uses))
    return by_use.sum((2, 4))


def _regrouped(tensor: Tensor, agents: int) -> Tensor:
    regrouped: Tensor = tensor.flatten(0, 1).unflatten(0, (agents, -1))
    return regrouped


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
