r"""How far the sharing scheme ties agents together, whatever they have seen.

A step along agent k's gradient moves agent i's policy by the coupling
:math:`K_{ik} = J_i J_k^\top`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.checks import check
from gradlab.contributions import policy_parameters
from gradlab.engine.accumulate import DEFAULT_BUDGET
from gradlab.metrics.coupling_forms import CouplingForms, KnowsCoupling
from gradlab.metrics.coupling_probes import probe_coupling
from gradlab.parameters import WHOLE, ParameterLayout
from gradlab.quantity import Quantity, dataset


def coupling(
    generator: nn.Module,
    agents: int,
    *,
    by: Literal["layer", "parameter"] = "layer",
    probes: int = 16,
    random: RandomGenerator | None = None,
    budget: int = DEFAULT_BUDGET,
) -> xr.Dataset:
    r"""Normalised traces and Frobenius norms of :math:`K_{ik} = J_i J_k^\top`, by policy part.

    .. math:: \frac{\operatorname{tr} K_{ik}}
                   {\sqrt{\operatorname{tr} K_{ii} \operatorname{tr} K_{kk}}}
              \quad\text{and}\quad
              \frac{\|K_{ik}\|_F}{\sqrt{\|K_{ii}\|_F \|K_{kk}\|_F}}

    Both are 1 where the agents share everything (FuPS), 0 where they share nothing (NoPS), 0.5 for
    a linear hypernetwork with bias on one-hot IDs. The trace compares the two agents' movements
    coordinate by coordinate, and may be negative; the norm, from 0 to 1, says how much any
    direction of one agent's gradient moves the other. For a layer, K has the rows and columns of
    the layer's parameters; the whole has the blocks between layers as well.

    In closed form, exact to rounding, if the generator has a method `coupling_forms`; else
    estimated from probes v with independent signs, by reverse mode and then forward mode:
    :math:`v \cdot K_{ik} v` (Hutchinson, 1990) and :math:`\|K_{ik} v\|^2`. The traces and the
    squared norms are unbiased; what is made of them has a bias of order 1 / probes. Touches no
    parameter, `.grad`, buffer or global random state.

    Args:
        generator: Makes policy parameters, as for `gradlab.decompose`. An optional method
            `coupling_forms()` returns a `gradlab.metrics.coupling_forms.CouplingForms`.
        agents: Number of agents.
        by: Parts of the policy: its layers, or each weight and bias, which for a hypernetwork is
            each head.
        probes: Number of probes for what has no closed form, each a vector for each policy
            parameter.
        random: Source of the probes' signs; one with seed 0 by default.
        budget: Bytes that the products with the probes may take at once. Fewer probes, and then
            fewer agents, are taken at once to keep to it; at the least, one vector in psi-space and
            all agents' policy parameters.

    Returns:
        Over (`by`, agent, agent_other), without unit: `coupling`, the normalised trace;
        `coupling_frobenius`, the normalised Frobenius norm; `coupling_error` and
        `coupling_frobenius_error`, their standard errors by a jackknife over the probes, 0 in
        closed form; `coupling_head`, the normalised trace with respect to the heads alone, NaN
        without closed form. Over (`by`): `coupling_exact`, whether they are in closed form. NaN
        where nothing that is trained makes an agent's part.

    Raises:
        UsageError: If there are no agents, fewer than two probes, or no such parts; or if
            `coupling_forms` does not fit the generator.
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
    layout = ParameterLayout.of(policy_parameters(generator, agents), batch_dims=1)
    parts = layout.layer_of if by == "layer" else {name: name for name in layout.shapes}
    labels = [WHOLE, *dict.fromkeys(parts.values())]
    groups = np.array([[label in {WHOLE, part} for part in parts.values()] for label in labels])
    if isinstance(generator, KnowsCoupling):
        found = _exact(generator.coupling_forms(), layout, agents, groups.astype(float))
        how = "closed form"
    else:
        random = torch.Generator().manual_seed(0) if random is None else random
        traces, squares = probe_coupling(
            generator,
            agents,
            layout,
            groups.astype(float),
            probes=probes,
            random=random,
            budget=budget,
        )
        found = _Blocks(traces=traces, squares=squares, head=np.full_like(traces[0], np.nan))
        how = f"{probes} probes"
    axes: Mapping[str, Sequence[Any]] = {
        by: labels,
        "agent": range(agents),
        "agent_other": range(agents),
    }

    def quantity(values: NDArray[Any], estimator: str) -> Quantity:
        dims = tuple(axes)[: values.ndim]
        coords = {dim: axes[dim] for dim in dims}
        return Quantity(values=values, dims=dims, coords=coords, unit="1", estimator=estimator)

    error = "standard error, jackknife over probes"
    exact = np.full(len(labels), isinstance(generator, KnowsCoupling))
    return {
        "coupling": quantity(_normalised(found.traces.mean(0)), f"normalised trace, {how}"),
        "coupling_error": quantity(_jackknife(found.traces, _normalised), error),
        "coupling_frobenius": quantity(
            _normalised_norm(found.squares.mean(0)), f"normalised Frobenius norm, {how}"
        ),
        "coupling_frobenius_error": quantity(_jackknife(found.squares, _normalised_norm), error),
        "coupling_exact": quantity(exact, "whether the coupling is in closed form"),
        "coupling_head": quantity(
            _normalised(found.head), "normalised trace, closed form of the heads"
        ),
    }


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """What is known of the blocks of K: by each probe, or once if exact.

    Attributes:
        traces: Traces.
        squares: Squared Frobenius norms.
        head: Traces of the heads' share.
    """

    traces: Float[np.ndarray, "sample part agent agent_other"]
    squares: Float[np.ndarray, "sample part agent agent_other"]
    head: Float[np.ndarray, "part agent agent_other"]


def _exact(
    forms: CouplingForms,
    layout: ParameterLayout,
    agents: int,
    groups: Float[np.ndarray, "part parameter"],
) -> _Blocks:
    names, own = tuple(layout.shapes), forms.trace.shape[-1]
    rule = f"name the policy parameters in order ({', '.join(names)})"
    check(forms.names == names, "coupling_forms", rule, list(forms.names))
    check(agents <= own, "agents", f"be at most {own}, the generator's own", agents)

    def of_agents(tensor: Tensor) -> NDArray[np.float64]:
        return tensor[..., :agents, :agents].detach().double().cpu().numpy()

    return _Blocks(
        traces=np.einsum("gp,pik->gik", groups, of_agents(forms.trace))[None],
        squares=np.einsum("gp,gq,pqik->gik", groups, groups, of_agents(forms.squared))[None],
        head=np.einsum("gp,pik->gik", groups, of_agents(forms.head)),
    )


def _normalised(products: NDArray[np.float64]) -> NDArray[np.float64]:
    own = np.diagonal(products, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(own[..., :, None] * own[..., None, :])
        normalised: NDArray[np.float64] = np.where(scale > 0, products / scale, np.nan)
        return normalised


def _normalised_norm(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    normalised: NDArray[np.float64] = np.sqrt(_normalised(squares))
    return normalised


def _jackknife(
    samples: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Standard error of a statistic of the mean over the first axis; 0 for an exact one."""
    count = len(samples)
    if count == 1:
        return 0 * statistic(samples[0])
    without = statistic((samples.sum(0) - samples) / (count - 1))
    variance: NDArray[np.float64] = (count - 1) * without.var(0)
    return np.sqrt(variance)
