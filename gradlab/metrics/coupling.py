r"""How far the sharing scheme ties agents together, whatever they have seen.

A step along agent k's gradient moves agent i's policy by the coupling
:math:`K_{ik} = J_i J_k^\top`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Generator as RandomGenerator
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from gradlab.checks import check
from gradlab.decomposition import policy_parameters
from gradlab.engine.accumulate import DEFAULT_BUDGET
from gradlab.parameters import WHOLE, ParameterLayout
from gradlab.quantity import Quantity, dataset

Traces = Float[np.ndarray, "agent agent_other"]


@runtime_checkable
class KnowsCoupling(Protocol):
    """A generator with a closed form of how its heads tie agents together."""

    def coupling_traces(self) -> dict[str, Tensor]:
        """Traces [agent, agent] of J_i J_k^T by policy parameter, of the heads' share."""

    def head_parameters(self) -> set[str]:
        """Names of the trained parameters whose share that is."""


def coupling(
    generator: nn.Module,
    agents: int,
    *,
    by: Literal["layer", "parameter"] = "layer",
    probes: int = 16,
    random: RandomGenerator | None = None,
    budget: int = DEFAULT_BUDGET,
) -> xr.Dataset:
    r"""Normalised traces of :math:`K_{ik} = J_i J_k^\top`, by part of the policy.

    .. math:: \kappa_{ik} = \frac{\operatorname{tr} K_{ik}}
                                 {\sqrt{\operatorname{tr} K_{ii} \operatorname{tr} K_{kk}}}

    1 where the agents share everything (FuPS), 0 where they share nothing (NoPS), 0.5 for a linear
    hypernetwork with bias on one-hot IDs. The trace of a layer is that of the rows of J that make
    the layer's parameters.

    What the generator makes linearly, by its heads, is known in closed form if it has the methods
    `coupling_traces` and `head_parameters`; the rest is estimated from probes v with independent
    signs, :math:`\langle J_i^\top v, J_k^\top v \rangle` (Hutchinson, 1990), the same v for all
    agents, one for each policy parameter. The traces are unbiased; their ratio has a bias of order
    1 / probes. Touches no parameter, `.grad`, buffer or global random state.

    Args:
        generator: Makes policy parameters, as for `gradlab.decompose`. Optional methods:
            `coupling_traces()` returns, by policy parameter, [agent, agent] traces of what the
            trained parameters named by `head_parameters()` contribute; used where these require
            a gradient.
        agents: Number of agents.
        by: Parts of the policy: its layers, or each weight and bias, which for a hypernetwork is
            each head.
        probes: Number of probes for what has no closed form.
        random: Source of the probes' signs; one with seed 0 by default.
        budget: Bytes that the agents' :math:`J_k^\top v` for one policy parameter may take. Fewer
            probes are taken at once to keep to it; where a single one does not fit, one agent is
            taken at a time, and its coupling to the others is found by forward mode.

    Returns:
        Over (`by`, agent, agent_other): `coupling`, kappa; `coupling_error`, its standard error by
        a jackknife over the probes; `coupling_head`, kappa of the heads alone, NaN without closed
        form. Over (`by`): `coupling_exact`, whether all of kappa is in closed form, its error 0.

    Raises:
        UsageError: If there are no agents, fewer than two probes, or no such parts; or if
            `coupling_traces` does not fit the generator.
    """
    return dataset(
        measure_coupling(generator, agents, by=by, probes=probes, random=random, budget=budget)
    )


def measure_coupling(
    generator: nn.Module,
    agents: int,
    *,
    by: Literal["layer", "parameter"] = "layer",
    probes: int = 16,
    random: RandomGenerator | None = None,
    budget: int = DEFAULT_BUDGET,
) -> dict[str, Quantity]:
    """What `coupling` labels.

    Args:
        generator: As for `coupling`.
        agents: As for `coupling`.
        by: As for `coupling`.
        probes: As for `coupling`.
        random: As for `coupling`.
        budget: As for `coupling`.

    Returns:
        The quantities by name.

    Raises:
        UsageError: As for `coupling`.
    """
    check(by in {"layer", "parameter"}, "by", "be 'layer' or 'parameter'", by)
    check(agents >= 1, "agents", "be at least 1", agents)
    check(probes >= 2, "probes", "be at least 2", probes)
    random = torch.Generator().manual_seed(0) if random is None else random
    layout = ParameterLayout.of(policy_parameters(generator, agents), batch_dims=1)
    shares = _shares(generator, agents, layout)
    closed = all(not share.others for share in shares.values())
    # [probe, theta parameter, agent, agent]; a single "probe" where nothing is left to estimate
    rest = np.zeros((1 if closed else probes, len(shares), agents, agents))
    for position, (name, share) in enumerate(shares.items()):
        if share.others:
            part = _Part(generator, agents, name, share.others)
            rest[:, position] = _estimates(part, layout.shapes[name], probes, random, budget)

    groups: dict[str, list[int]] = {WHOLE: list(range(len(shares)))}
    for position, name in enumerate(shares):
        groups.setdefault(layout.layer_of[name] if by == "layer" else name, []).append(position)

    def grouped(traces: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([traces[..., own, :, :].sum(-3) for own in groups.values()], axis=-3)

    head = np.stack([share.head for share in shares.values()])
    samples = grouped(rest + np.nan_to_num(head, nan=0.0))
    others = [share.others for share in shares.values()]
    exact = np.array([not any(others[position] for position in own) for own in groups.values()])
    error = np.where(exact[:, None, None], 0.0, _jackknife(samples))
    labels: Mapping[str, Sequence[Any]] = {
        by: list(groups),
        "agent": range(agents),
        "agent_other": range(agents),
    }

    def quantity(values: NDArray[Any], estimator: str) -> Quantity:
        dims = tuple(labels)[: values.ndim]
        coords = {dim: labels[dim] for dim in dims}
        return Quantity(values=values, dims=dims, coords=coords, unit="1", estimator=estimator)

    how = "closed form" if closed else f"{probes} probes"
    return {
        "coupling": quantity(_normalised(samples.mean(0)), f"normalised trace, {how}"),
        "coupling_error": quantity(error, "standard error, jackknife over probes"),
        "coupling_exact": quantity(exact, "whether the coupling is in closed form"),
        "coupling_head": quantity(
            _normalised(grouped(head)), "normalised trace, closed form of the heads"
        ),
    }


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What is known in closed form of one policy parameter's traces.

    Attributes:
        head: The heads' share of the traces; NaN if it is not known.
        others: The trained parameters whose share is not known.
    """

    head: Traces
    others: frozenset[str]


def _shares(generator: nn.Module, agents: int, layout: ParameterLayout) -> dict[str, _Share]:
    closed: dict[str, Tensor] = {}
    heads: set[str] = set()
    if isinstance(generator, KnowsCoupling):
        closed, heads = generator.coupling_traces(), set(generator.head_parameters())
    check(
        set(closed) <= set(layout.shapes),
        "coupling_traces",
        f"name policy parameters ({', '.join(layout.shapes)})",
        list(closed),
    )
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    shares = {}
    for name, makers in _makers(generator, agents).items():
        of_heads = makers & heads
        head, others = np.zeros((agents, agents)), makers & trained
        if name in closed and of_heads <= trained:  # a frozen head's share would be too large
            own = min(closed[name].shape)
            check(agents <= own, "agents", f"be at most {own}, the generator's own", agents)
            head = closed[name][:agents, :agents].detach().double().cpu().numpy()
            others -= of_heads
        elif of_heads:
            head = np.full_like(head, np.nan)
        shares[name] = _Share(head=head, others=frozenset(others))
    return shares


def _makers(generator: nn.Module, agents: int) -> dict[str, set[str]]:
    """By policy parameter, the generator's parameters that it depends on, trained or not."""
    leaves = {name: p.detach().requires_grad_() for name, p in generator.named_parameters()}
    numbers = torch.arange(agents, device=next(iter(leaves.values())).device)
    makers: dict[str, set[str]] = {}
    with torch.enable_grad():
        theta = functional_call(generator, leaves, (numbers,))
        for name, tensor in theta.items():
            found = (
                torch.autograd.grad(
                    tensor.sum(), list(leaves.values()), allow_unused=True, retain_graph=True
                )
                if tensor.requires_grad
                else [None] * len(leaves)
            )
            makers[name] = {n for n, g in zip(leaves, found, strict=True) if g is not None}
    return makers


class _Part:
    """One policy parameter of every agent, as a function of some trained parameters.

    Attributes:
        moving: The trained parameters.
        numbers: The agents' numbers.
    """

    def __init__(
        self, generator: nn.Module, agents: int, name: str, moving: frozenset[str]
    ) -> None:
        state = {**dict(generator.named_parameters()), **dict(generator.named_buffers())}
        self._generator, self._name = generator, name
        self._fixed = {n: t.detach() for n, t in state.items() if n not in moving}
        self.moving = {n: t.detach() for n, t in state.items() if n in moving}
        self.numbers = torch.arange(agents, device=next(iter(self.moving.values())).device)

    @property
    def nbytes(self) -> int:
        """Bytes of one vector in the space of the trained parameters."""
        return sum(t.numel() * t.element_size() for t in self.moving.values())

    def make(self, number: Tensor, moving: dict[str, Tensor]) -> Tensor:
        """The policy parameter of one agent."""
        theta = functional_call(self._generator, {**self._fixed, **moving}, (number[None],))
        made: Tensor = theta[self._name].squeeze(0)
        return made

    def gram(self, vectors: Float[Tensor, " probe *shape"]) -> NDArray[np.float64]:
        """Inner products of all agents' J_k^T v, [probe, agent, agent], for several v."""

        def pull(number: Tensor) -> dict[str, Tensor]:
            back = vjp(partial(self.make, number), self.moving)[1]
            pulled: dict[str, Tensor] = vmap(lambda vector: back(vector)[0])(vectors)
            return pulled

        found = torch.zeros(len(vectors), len(self.numbers), len(self.numbers), dtype=torch.float64)
        for pulled in vmap(pull)(self.numbers).values():
            flat = pulled.transpose(0, 1).flatten(2)
            found += (flat @ flat.mT).double().cpu()
        return found.numpy()

    def gram_by_agent(self, vector: Float[Tensor, " *shape"]) -> NDArray[np.float64]:
        """The same as v . J_i (J_k^T v), with one J_k^T v at a time."""
        columns = []
        for number in self.numbers:
            (pulled,) = vjp(partial(self.make, number), self.moving)[1](vector)

            def push(other: Tensor, pulled: dict[str, Tensor] = pulled) -> Tensor:
                moved: Tensor = jvp(partial(self.make, other), (self.moving,), (pulled,))[1]
                return moved

            moved = vmap(push)(self.numbers)
            columns.append((moved * vector).flatten(1).double().sum(1))
        return torch.stack(columns, dim=1).cpu().numpy()


def _estimates(
    part: _Part, shape: torch.Size, probes: int, random: RandomGenerator, budget: int
) -> NDArray[np.float64]:
    """Estimates [probe, agent, agent] of one policy parameter's traces."""
    like = next(iter(part.moving.values()))

    def signs() -> Tensor:
        return (2 * torch.randint(2, shape, generator=random, device=random.device) - 1).to(like)

    at_once = min(probes, budget // (len(part.numbers) * part.nbytes))
    if at_once == 0:
        return np.stack([part.gram_by_agent(signs()) for _ in range(probes)])
    # probes are drawn one by one so that the budget does not change them
    return np.concatenate([
        part.gram(torch.stack([signs() for _ in range(min(at_once, probes - first))]))
        for first in range(0, probes, at_once)
    ])


def _normalised(traces: NDArray[np.float64]) -> NDArray[np.float64]:
    own = np.diagonal(traces, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(own[..., :, None] * own[..., None, :])
        normalised: NDArray[np.float64] = np.where(scale > 0, traces / scale, np.nan)
        return normalised


def _jackknife(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard error of the normalised mean over the first axis; 0 for a single, exact one."""
    count = len(samples)
    if count == 1:
        return np.zeros_like(samples[0])
    without = _normalised((samples.sum(0) - samples) / (count - 1))
    variance: NDArray[np.float64] = (count - 1) * without.var(0)
    return np.sqrt(variance)
