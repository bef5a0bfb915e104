r"""What agents make of gradients in theta-space: their contributions :math:`g_i = J_i^\top Z_i`."""

import math
from collections.abc import Mapping
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from gradlab.checks import UsageError
from gradlab.engine.accumulate import DEFAULT_BUDGET
from gradlab.engine.clusters import FactoredSums, Products
from gradlab.engine.moments import Moments
from gradlab.engine.part import Part
from gradlab.engine.per_sample import Lookup, Outer, PerSample, Rows
from gradlab.engine.plan import planned_gradients
from gradlab.engine.surrogate import Theta
from gradlab.factorisation import reads_observation


@runtime_checkable
class PullsBack(Protocol):
    """A generator that applies its own J^T, which is faster than having it found out."""

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> Mapping[str, PerSample]:
        """Apply every row's agent's J_i^T.

        Args:
            z: Gradients [row, ...] by policy parameter.
            agents: The agent of each row.

        Returns:
            The products by trained parameter, of a single "agent" whose samples are the rows.
        """


def policy_parameters(generator: nn.Module, agents: int) -> Theta:
    """Generate every agent's policy parameters, detached.

    Args:
        generator: As for `gradlab.decompose`.
        agents: Number of agents.

    Returns:
        Tensors by name, [agent, ...], or [1, ...] where the agents share one.

    Raises:
        UsageError: If it makes none for one of the agents, or other ones for each sample.
    """
    if reads_observation(generator):
        raise UsageError(
            "`generator` must not read the observation here: it has other parameters, and another "
            "J_i, for each sample. Use gradlab.factorise."
        )
    try:
        with torch.no_grad():
            theta = generator(agent_numbers(generator, agents))
    except IndexError as error:
        raise UsageError(
            f"`generator` must make parameters for all of the batch's {agents} agents, 0 to "
            f"{agents - 1}. Got for one of them: {error}."
        ) from error
    return {name: tensor.detach() for name, tensor in theta.items()}


def contributions(
    generator: nn.Module, z: Theta, agents: int | None = None
) -> dict[str, PerSample]:
    r"""Apply every agent's :math:`J_i^\top`, as the gradient of :math:`\theta_i \cdot Z_i`.

    By the generator's own `pull_back` if it has one. Otherwise the engine sees a generator as one
    network whose samples are the agents. Either way, what a hypernetwork's linear heads make of
    them is kept as outer products, so that memory grows by the size of theta with each agent, not
    by that of psi.

    Args:
        generator: As for `gradlab.decompose`.
        z: Tensors [agent, ...] by name; or several of these, one after the other.
        agents: Number of agents, if there are several.

    Returns:
        The products by trained parameter; of one "agent", whose samples are the rows of `z`.
    """
    psi = {n: p.detach()[None] for n, p in generator.named_parameters() if p.requires_grad}
    dtype = next(iter(psi.values())).dtype
    z = {name: tensor.to(dtype) for name, tensor in z.items()}
    rows = len(next(iter(z.values())))
    numbers = agent_numbers(generator, agents or rows).repeat(rows // (agents or rows))
    found = (
        generator.pull_back(z, numbers)
        if isinstance(generator, PullsBack)
        else _by_engine(generator, psi, z, numbers)
    )
    return {  # what no policy parameter is made of has no part in the gradient
        name: found.get(name, Rows(tensor.new_zeros(()).expand(1, rows, *tensor.shape[1:])))
        for name, tensor in psi.items()
    }


def _by_engine(
    generator: nn.Module, psi: Theta, z: Theta, agents: Int[Tensor, " row"]
) -> dict[str, PerSample]:
    batch = {f"z/{name}": tensor[None] for name, tensor in z.items()}
    part = Part(batch=batch | {"agent": agents[None]})

    def product(psi: Theta, sample: dict[str, Tensor]) -> Tensor:
        theta: Theta = functional_call(generator, psi, (sample["agent"][None],))
        return torch.stack([
            (t.squeeze(0) * sample[f"z/{n}"]).sum() for n, t in theta.items()
        ]).sum()

    return planned_gradients(product, psi, part, owner=generator, warn=False)


def agent_numbers(generator: nn.Module, agents: int) -> Int[Tensor, " agent"]:
    """Numbers of the first agents, where the generator is.

    Args:
        generator: As for `gradlab.decompose`.
        agents: Number of agents.

    Returns:
        0 to agents - 1.
    """
    return torch.arange(agents, device=next((p.device for p in generator.parameters()), None))


def psi_products(
    generator: nn.Module,
    moments: Moments,
    of_theta: Mapping[str, Products],
    means: Mapping[str, PerSample],
    budget: int = DEFAULT_BUDGET,
) -> dict[str, Products]:
    r"""Inner products between what the agents make of their sums over clusters.

    Where a linear layer reads a trained parameter, :math:`J_i^\top s_i^e` is an outer product of
    what agent i's layer reads, the same in all clusters, and of a vector at its output; of a head
    that vector is :math:`s_i^e` itself, whose products are known. No vector in psi-space is formed
    for these. Where the generator reads its parameters otherwise, as many vectors are formed at
    once as fit the budget.

    Args:
        generator: As for `gradlab.decompose`.
        moments: Moments in theta-space that tell clusters apart.
        of_theta: Their products by policy parameter.
        means: What `contributions` makes of the agents' means, in any precision.
        budget: Bytes that what is kept for one stretch of clusters may take.

    Returns:
        The products by trained parameter.
    """
    sums, agents = moments.by_copy(), len(moments.count)
    dtype = next(p.dtype for p in generator.parameters() if p.requires_grad)
    whole = {name: part.to(dtype) for name, part in means.items()}
    kept = sum(part.nbytes for part in means.values())
    kept += sum(s.like.element_size() * agents * math.prod(s.shape) for s in sums.values())
    most = max(1, budget // kept)
    # Sums that are kept as factors can only be formed in stretches of how they were added up.
    bound = next((s for s in sums.values() if isinstance(s, FactoredSums)), None)
    stretches = (bound or next(iter(sums.values()))).stretches(most)
    found: dict[str, list[Products]] = {name: [] for name in means}
    last: dict[str, PerSample] = {}
    for clusters in stretches:
        number = clusters.stop - clusters.start
        z = {}
        for name, of_cluster in sums.items():
            room = of_cluster.like.new_empty(agents, number, *of_cluster.shape)
            z[name] = of_cluster.form(clusters, room).transpose(0, 1).flatten(0, 1).to(dtype)
        pulled = contributions(generator, z, agents)
        vectors = _Vectors(moments.count, z, of_theta, clusters)
        for name, rows in pulled.items():
            found[name].append(vectors.products(rows, whole[name], last.get(name)))
        last = {
            name: rows.some(slice((number - 1) * agents, number * agents))
            for name, rows in pulled.items()
        }
    return {
        name: Products(*map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()
    }


_Place: TypeAlias = tuple[int, torch.Size, tuple[int, ...]]


def _place(vectors: Tensor) -> _Place:
    return vectors.data_ptr(), vectors.shape, vectors.stride()


class _Vectors:
    """Products of one stretch of clusters; those of vectors that parameters share, once."""

    def __init__(
        self,
        count: Int[Tensor, " agent"],
        z: Theta,
        of_theta: Mapping[str, Products],
        clusters: slice,
    ) -> None:
        self._count = count
        self._clusters = clusters.stop - clusters.start
        first = clusters.start
        self._known: dict[_Place, tuple[Tensor, Products]] = {}
        for name, rows in z.items():
            flat = rows.flatten(1)[None]
            within, across, following = of_theta[name]
            products = Products(
                within[clusters],
                across[clusters],
                following[max(0, first - 1) : clusters.stop - 1],
            )
            self._known[_place(flat)] = flat, products

    def products(self, rows: PerSample, mean: PerSample, last: PerSample | None) -> Products:
        """Products of rows [cluster * agent], with the sums over all clusters, and the row before.

        Args:
            rows: What the agents make of their sums over clusters.
            mean: What they make of their means.
            last: What they make of the cluster before.

        Returns:
            The products in float64.
        """
        vectors, of_mean = _vectors_of(rows), _vectors_of(mean)
        if vectors is None or of_mean is None:
            return self._of(rows, mean, last)
        place = _place(vectors.values)
        if place not in self._known:
            before = None if last is None else _vectors_of(last)
            # with the vectors, so that no others come to lie in their place
            self._known[place] = vectors.values, self._of(vectors, of_mean, before)
        known, scale = self._known[place][1], _scale_of(mean)
        return known if scale is None else Products(*(products * scale for products in known))

    def _of(self, rows: PerSample, mean: PerSample, last: PerSample | None) -> Products:
        by_cluster = rows.regrouped(self._clusters)
        agents, following = mean.samples, []
        if last is not None:
            following.append(last.inner(rows.some(slice(0, agents))))
        if self._clusters > 1:
            earlier, later = (
                rows.some(slice(start, start + (self._clusters - 1) * agents))
                for start in (0, agents)
            )
            following.append(
                earlier.regrouped(self._clusters - 1).inner(later.regrouped(self._clusters - 1))
            )
        within = by_cluster.inner(by_cluster)
        return Products(
            within=within.double(),
            across=by_cluster.inner(mean).double() * self._count,  # from means to sums
            following=torch.cat(following or [within[:0]]).double(),
        )


def _vectors_of(part: PerSample) -> Rows | None:
    """What a linear layer's or a table's gradients have at its output; None for other gradients."""
    if isinstance(part, Rows):
        return Rows(part.values.flatten(2))
    if isinstance(part, Outer) and part.inputs.shape[2] == 1:
        return Rows(part.output_gradients[:, :, 0])
    if isinstance(part, Lookup) and part.index.shape[2] == 1:
        return Rows(part.output_gradients[:, :, 0].flatten(2))
    return None


def _scale_of(part: PerSample) -> Float[Tensor, "agent agent"] | None:
    """By what the vectors' products are multiplied, for the agents are told apart by it alone."""
    if isinstance(part, Outer):
        read = part.inputs[0, :, 0].double()
        return read @ read.mT
    if isinstance(part, Lookup):
        index = part.index[0, :, 0]
        return (index[:, None] == index).double()
    return None
