r"""What agents make of gradients in theta-space: their contributions :math:`g_i = J_i^\top Z_i`."""

import math
from collections.abc import Collection, Mapping
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


def policy_parameters(generator: nn.Module, agents: int, *, graph: bool = False) -> Theta:
    """Generate every agent's policy parameters.

    Args:
        generator: As for `gradlab.decompose`.
        agents: Number of agents.
        graph: Whether to keep how they come from the generator's parameters, for autograd.

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
        with torch.set_grad_enabled(graph):
            theta: Theta = generator(agent_numbers(generator, agents))
    except IndexError as error:
        raise UsageError(
            f"`generator` must make parameters for all of the batch's {agents} agents, 0 to "
            f"{agents - 1}. Got for one of them: {error}."
        ) from error
    return theta if graph else {name: tensor.detach() for name, tensor in theta.items()}


def contributions(
    generator: nn.Module, z: Theta, agents: Int[Tensor, " row"] | None = None
) -> dict[str, PerSample]:
    r"""Apply every agent's :math:`J_i^\top`, as the gradient of :math:`\theta_i \cdot Z_i`.

    By the generator's own `pull_back` if it has one. Otherwise the engine sees a generator as one
    network whose samples are the agents. Either way, what a hypernetwork's linear heads make of
    them is kept as outer products, so that memory grows by the size of theta with each agent, not
    by that of psi.

    Args:
        generator: As for `gradlab.decompose`.
        z: Tensors [row, ...] by name.
        agents: The agent of each row; by default one for each agent, in order.

    Returns:
        The products by trained parameter; of one "agent", whose samples are the rows of `z`.
    """
    psi = {n: p.detach() for n, p in generator.named_parameters() if p.requires_grad}
    like = next(iter(psi.values()))
    z = {name: tensor.to(like.dtype) for name, tensor in z.items()}
    rows = len(next(iter(z.values())))
    numbers = agent_numbers(generator, rows) if agents is None else agents
    found = (
        generator.pull_back(z, numbers)
        if isinstance(generator, PullsBack)
        else _by_engine(generator, psi, z, numbers)
    )
    nothing = like.new_zeros(())  # what no policy parameter is made of has no part in the gradient
    return {
        name: found[name] if name in found else Rows(nothing.expand(1, rows, *tensor.shape))
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

    shared = {name: tensor[None] for name, tensor in psi.items()}
    return planned_gradients(product, shared, part, owner=generator, warn=False)


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
    after: Theta | None = None,
) -> Products:
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
        after: As for `Moments.parameter_products`.

    Returns:
        The products in float64, with a leading axis of trained parameters, in their order.
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
    numbers, found = agent_numbers(generator, agents), list[Products]()
    last: dict[str, PerSample] = {}
    for clusters in stretches:
        length = clusters.stop - clusters.start
        z = {}  # by agent, then cluster
        for name, of_cluster in sums.items():
            room = of_cluster.like.new_empty(agents, length, *of_cluster.shape)
            z[name] = of_cluster.form(clusters, room).flatten(0, 1).to(dtype)
        pulled = contributions(generator, z, numbers.repeat_interleave(length))
        known = _of_sums(z, of_theta, clusters)
        found.append(_products(pulled, whole, last, moments.count, known))
        last = {name: rows.some(slice(length - 1, None, length)) for name, rows in pulled.items()}
    if after is not None:
        z = {name: sums.flatten(0, 1).to(dtype) for name, sums in after.items()}
        pulled = contributions(generator, z, numbers)
        further = _products(pulled, whole, last, moments.count, {})
        nothing = further.within[:, :0]
        found.append(Products(nothing, nothing, further.following))
    return Products(*(torch.cat(kind, dim=1) for kind in zip(*found, strict=True)))


_Place: TypeAlias = tuple[int, torch.Size, tuple[int, ...]]


def _place(vectors: Tensor) -> _Place:
    return vectors.data_ptr(), vectors.shape, vectors.stride()


def _of_sums(z: Theta, of_theta: Mapping[str, Products], clusters: slice) -> dict[_Place, Products]:
    """Products of one stretch of clusters that are known: of the sums themselves."""
    first = clusters.start
    return {
        _place(rows.flatten(1)): Products(
            of_theta[name].within[clusters],
            of_theta[name].across[clusters],
            of_theta[name].following[max(0, first - 1) : clusters.stop - 1],
        )
        for name, rows in z.items()
    }


def _products(
    rows: Mapping[str, PerSample],
    means: Mapping[str, PerSample],
    last: Mapping[str, PerSample],
    count: Int[Tensor, " agent"],
    known: dict[_Place, Products],
) -> Products:
    """Products of rows [agent * cluster] by trained parameter.

    Vectors that parameters share are multiplied once, all of one length in one go.

    Args:
        rows: What the agents make of their sums over clusters.
        means: What they make of their means.
        last: What they make of the cluster before; empty for the first stretch.
        count: Number of samples of each agent.
        known: Products of vectors by their place in memory.

    Returns:
        The products in float64, with a leading axis of parameters.
    """
    agents, found = len(count), dict[str, Products]()
    factored: dict[str, _Place] = {}
    unknown: dict[int, dict[_Place, tuple[Tensor, ...]]] = {}  # by length
    for name, of_name in rows.items():
        vectors, mean = _vectors_of(of_name), _vectors_of(means[name])
        if vectors is None or mean is None:
            found[name] = _of_forms(of_name, means[name], last.get(name), count)
            continue
        factored[name] = place = _place(vectors)
        if place not in known:
            by_agent = vectors.unflatten(0, (agents, -1))
            before = _vectors_of(last[name]) if last else None
            # The vectors themselves are kept as well: no others may come to lie in their place.
            unknown.setdefault(vectors.shape[1], {})[place] = (
                by_agent,
                mean,
                by_agent if before is None else torch.cat([before[:, None], by_agent], dim=1),
            )
    for of_length in unknown.values():
        vectors, mean, in_order = map(_stacked, zip(*of_length.values(), strict=True))
        by_cluster, chain = (v.transpose(1, 2) for v in (vectors, in_order))
        within = (by_cluster @ by_cluster.mT).double()
        across = (by_cluster @ mean[:, None].mT).double() * count  # from means to sums
        following = (chain[:, :-1] @ chain[:, 1:].mT).double()
        for number, place in enumerate(of_length):
            known[place] = Products(within[number], across[number], following[number])
    found |= {name: known[place] for name, place in factored.items()}
    one = torch.ones(agents, agents, dtype=torch.float64, device=count.device)
    scales = torch.stack([
        one if name not in factored else _scale_of(means[name], one) for name in rows
    ])
    stacked = Products.stacked(found[name] for name in rows)
    return Products(*(kind * scales[:, None] for kind in stacked))


def row_products(rows: Mapping[str, PerSample]) -> Float[Tensor, "parameter row row_other"]:
    """Inner products between all rows, of one "agent", by trained parameter.

    Args:
        rows: What `contributions` returned.

    Returns:
        The products in float64, in the parameters' order; vectors that parameters share are
        multiplied once, all of one length in one go.
    """
    found: dict[str, Tensor] = {}
    by_length: dict[int, dict[_Place, Tensor]] = {}
    places: dict[str, _Place] = {}
    for name, part in rows.items():
        vectors = _vectors_of(part)
        if vectors is None:
            found[name] = part.gram().double()
        else:
            places[name] = _place(vectors)
            by_length.setdefault(vectors.shape[1], {})[places[name]] = vectors
    known: dict[_Place, Tensor] = {}
    for of_length in by_length.values():
        vectors = _stacked(of_length.values())
        known |= zip(of_length, (vectors @ vectors.mT).double(), strict=True)
    for name, place in places.items():
        found[name] = known[place]
    one = torch.ones_like(next(iter(found.values())))
    scales = [_scale_of(part, one) if name in places else one for name, part in rows.items()]
    return torch.stack([found[name] for name in rows]) * torch.stack(scales)


def _stacked(tensors: Collection[Tensor]) -> Tensor:
    """Without a copy if there is only one, which may be large."""
    return next(iter(tensors))[None] if len(tensors) == 1 else torch.stack([*tensors])


def _of_forms(
    rows: PerSample, mean: PerSample, last: PerSample | None, count: Int[Tensor, " agent"]
) -> Products:
    """The same of one parameter whose gradients are not a vector times what the agent reads."""
    agents = len(count)
    clusters = rows.samples // agents
    order = torch.arange(rows.samples, device=count.device).view(agents, -1).mT.flatten()
    rows, following = rows.some(order), []
    by_cluster = rows.regrouped(clusters)
    if last is not None:
        following.append(last.inner(rows.some(slice(0, agents))))
    if clusters > 1:
        earlier, later = (
            rows.some(slice(start, start + (clusters - 1) * agents)).regrouped(clusters - 1)
            for start in (0, agents)
        )
        following.append(earlier.inner(later))
    within = by_cluster.inner(by_cluster)
    return Products(
        within=within.double(),
        across=by_cluster.inner(mean).double() * count,
        following=torch.cat(following or [within[:0]]).double(),
    )


def _vectors_of(part: PerSample) -> Float[Tensor, "row size"] | None:
    """What a linear layer's or a table's gradients have at its output; None for other gradients."""
    if isinstance(part, Rows):
        return part.values[0].reshape(part.samples, -1)
    if isinstance(part, Outer) and part.inputs.shape[2] == 1:
        return part.output_gradients[0, :, 0]
    if isinstance(part, Lookup) and part.index.shape[2] == 1:
        return part.output_gradients[0, :, 0].reshape(part.samples, -1)
    return None


def _scale_of(part: PerSample, one: Float[Tensor, "agent agent"]) -> Float[Tensor, "agent agent"]:
    """By what the vectors' products are multiplied, for the agents are told apart by it alone."""
    if isinstance(part, Outer):
        read = part.inputs[0, :, 0].to(one)
        return read @ read.mT
    if isinstance(part, Lookup):
        index = part.index[0, :, 0]
        return (index[:, None] == index).to(one)
    return one
