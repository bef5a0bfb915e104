r"""How far the sharing scheme ties agents together, whatever they have seen.

A step along agent k's gradient moves agent i's policy by the coupling
:math:`K_{ik} = J_i J_k^\top`.
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.checks import check
from gradlab.decomposition import contributions, policy_parameters
from gradlab.parameters import WHOLE, ParameterLayout
from gradlab.quantity import Quantity, dataset


@runtime_checkable
class KnowsCoupling(Protocol):
    """A generator with a closed form of how its heads tie agents together."""

    def coupling_traces(self) -> dict[str, Tensor]:
        """Traces [agent, agent] of J_i J_k^T by policy parameter, of the heads' share."""

    def head_parameters(self) -> set[str]:
        """Names of the trained parameters whose share that is."""


def coupling(
    generator: nn.Module, agents: int, *, probes: int = 16, random: RandomGenerator | None = None
) -> xr.Dataset:
    r"""Normalised traces of :math:`K_{ik} = J_i J_k^\top`, by policy layer.

    .. math:: \kappa_{ik} = \frac{\operatorname{tr} K_{ik}}
                                 {\sqrt{\operatorname{tr} K_{ii} \operatorname{tr} K_{kk}}}

    1 where the agents share everything (FuPS), 0 where they share nothing (NoPS), 0.5 for a linear
    hypernetwork with bias on one-hot IDs. The trace of a layer is that of the rows of J that make
    the layer's parameters.

    What the generator makes linearly, by its heads, is known in closed form if it has the methods
    `coupling_traces` and `head_parameters`; the rest is estimated from probes v with independent
    signs, :math:`\langle J_i^\top v, J_k^\top v \rangle` (Hutchinson, 1990), the same v for all
    agents, one for each policy parameter. The traces are unbiased; their ratio has a bias of order
    1 / probes.

    Args:
        generator: Makes policy parameters, as for `gradlab.decompose`. Optional methods:
            `coupling_traces()` returns, by policy parameter, [agent, agent] traces of what the
            trained parameters named by `head_parameters()` contribute.
        agents: Number of agents.
        probes: Number of probes for what has no closed form.
        random: Source of the probes' signs; one with seed 0 by default.

    Returns:
        Over (layer, agent, agent_other): `coupling`, kappa; `coupling_error`, its standard error
        by a jackknife over the probes, 0 where all is in closed form; `coupling_head`, kappa of
        the heads alone, NaN without closed form.

    Raises:
        UsageError: If there are no agents, or fewer than two probes.
    """
    check(agents >= 1, "agents", "be at least 1", agents)
    check(probes >= 2, "probes", "be at least 2", probes)
    random = random or torch.Generator().manual_seed(0)
    theta = policy_parameters(generator, agents)
    layout = ParameterLayout.of(theta, batch_dims=1)
    closed: dict[str, Tensor] = {}
    heads: frozenset[str] = frozenset()
    if isinstance(generator, KnowsCoupling):
        closed, heads = generator.coupling_traces(), frozenset(generator.head_parameters())
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    # [probe, layer, agent, agent]; a single "probe" where nothing is left to estimate
    rest = np.zeros((1, len(layout.layers), agents, agents))
    if trained - heads:
        rest = np.stack([
            _traces(generator, agents, theta, layout, heads, random) for _ in range(probes)
        ])
    head = np.zeros_like(rest[0])
    for name, traces in closed.items():
        head[layout.layers.index(layout.layer_of[name])] += traces.double().cpu().numpy()
    known = _with_whole(head)
    samples = _with_whole(rest) + known
    labels = {
        "layer": [WHOLE, *layout.layers],
        "agent": range(agents),
        "agent_other": range(agents),
    }

    def quantity(values: NDArray[np.float64], estimator: str) -> Quantity:
        return Quantity(
            values=values, dims=tuple(labels), coords=labels, unit="1", estimator=estimator
        )

    how = f"{probes} probes" if trained - heads else "closed form"
    return dataset({
        "coupling": quantity(_normalised(samples.mean(0)), f"normalised trace, {how}"),
        "coupling_error": quantity(_jackknife(samples), "jackknife over probes"),
        "coupling_head": quantity(
            _normalised(known) if closed else np.full_like(known, np.nan),
            "closed form of the heads",
        ),
    })


def _traces(
    generator: nn.Module,
    agents: int,
    theta: dict[str, Tensor],
    layout: ParameterLayout,
    known: frozenset[str],
    random: RandomGenerator,
) -> Float[np.ndarray, "layer agent agent_other"]:
    """One probe's estimate of the traces, without the share of the known trained parameters."""
    nothing = {
        name: tensor.new_zeros(1).expand(agents, *layout.shapes[name])
        for name, tensor in theta.items()
    }
    found = np.zeros((len(layout.layers), agents, agents))
    for name, shape in layout.shapes.items():
        signs = 2.0 * torch.randint(2, shape, generator=random) - 1
        probe = signs.to(theta[name]).expand(agents, *shape)
        for trained, contribution in contributions(generator, nothing | {name: probe}).items():
            if trained not in known:
                gram = contribution.gram().double().cpu().numpy()
                found[layout.layers.index(layout.layer_of[name])] += gram
    return found


def _with_whole(traces: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([traces.sum(-3, keepdims=True), traces], axis=-3)


def _normalised(traces: NDArray[np.float64]) -> NDArray[np.float64]:
    own = np.diagonal(traces, axis1=-2, axis2=-1)
    scale = np.sqrt(own[..., :, None] * own[..., None, :])
    with np.errstate(invalid="ignore", divide="ignore"):
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
