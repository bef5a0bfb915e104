"""What interference comes from, and what it comes to.

Coupling, transference, behaviour, and how embeddings are arranged: more than what `NetworkProbe`
measures should cost, and so measured less often.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from gradlab.checks import UsageError
from gradlab.copies import split_copies
from gradlab.engine.part import batch_axes, in_precision
from gradlab.factorisation import reads_observation
from gradlab.metrics.coupling import measure_coupling
from gradlab.metrics.coupling_forms import KnowsCoupling
from gradlab.metrics.diversity import measure_diversity
from gradlab.metrics.geometry import measure_geometry
from gradlab.metrics.transference import measure_transference
from gradlab.parameters import WHOLE
from gradlab.preconditioner import adam_preconditioner
from gradlab.probe import NetworkProbe, embedding_of
from gradlab.quantity import Quantity, join

PERMUTATIONS = 999
"""Random arrangements of the agents that a p-value is made from, where there are more."""

_MASK = "mask"

_ARRANGEMENT = (
    "embedding_cosine",
    "embedding_distance",
    "effective_rank",
    "participation_ratio",
    "rank_ceiling",
    "mantel",
    "mantel_p_value",
    "mantel_agents",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Behaviour:
    """What every agent would do where any agent has been.

    Attributes:
        policies: All agents' action distributions on the same observations, as
            `gradlab.diversity` takes them: `logits`, `probabilities`, or `mean` and `std`.
        copy: The environment copy that each observation comes from.
    """

    policies: Mapping[str, Float[Tensor, "agent observation _"]]
    copy: Int[Tensor, " observation"]


def measure_effects(
    probe: NetworkProbe,
    batches: Mapping[str, Mapping[str, Tensor]],
    copy: Int[Tensor, " sample"],
    *,
    mask: Bool[Tensor, "agent sample"] | None = None,
    context: Mapping[str, Mapping[str, Tensor]] | None = None,
    behaviour: Behaviour,
    diagnosed: Mapping[str, Quantity],
    optimiser: torch.optim.Adam | None = None,
) -> tuple[dict[str, Quantity], list[str]]:
    """Measure what the networks' interference comes from, and what it comes to.

    Parameters, `.grad`, buffers and random states stay as they are.

    Args:
        probe: Knows the networks.
        batches: For each network tensors [agent, sample, ...] by name, as `NetworkProbe.diagnose`
            takes them.
        copy: The environment copy that each sample comes from. Steps are made from every other
            copy, and the losses are those of the rest.
        mask: Which samples exist; all by default.
        context: As `NetworkProbe.diagnose` takes it.
        behaviour: What the agents do.
        diagnosed: What `NetworkProbe.diagnose` found in these batches.
        optimiser: Take the steps that this one would, see `gradlab.adam_preconditioner`; None:
            along the gradients themselves.

    Returns:
        Quantities by name: those of `gradlab.transference`, with a leading `network` axis, unless
        `optimiser` has not taken a step yet; those of `gradlab.diversity`; with a leading `network`
        axis, for generators with a `representation`, those of `gradlab.geometry` but for groups, of
        the rows that `NetworkProbe.diagnose` returns as embeddings, compared with
        `behavioural_distance` and with the cosines of g, debiased where they are known; and
        `coupling` and `coupling_frobenius` of generators that have them in closed form. And a
        sentence for each that could not be measured, as where parameters are not finite; it is left
        out, or NaN where another network's could.
    """
    findings: list[str] = []
    found: dict[str, Quantity] = {}
    policies: dict[str, Any] = dict(behaviour.policies)
    with _noted("behaviour", findings):
        found |= measure_diversity(**policies, copy=behaviour.copy)
    distance = found["behavioural_distance"].values if found else None
    of_networks: dict[str, dict[str, Quantity]] = {}
    for name, network in probe.networks.items():
        of_networks[name] = {}
        if optimiser is None or optimiser.state:
            with _noted(f"{name}, transference", findings):
                held = {} if context is None else context[name]
                of_networks[name] |= _transference(
                    probe, name, batches[name], copy, mask, held, optimiser
                )
        embedding = embedding_of(network.generator)
        if embedding is not None:
            with _noted(f"{name}, geometry", findings):
                of_networks[name] |= _arrangement(embedding, distance, _cosines(diagnosed, name))
        of_networks[name] |= _coupling(network.generator, batch_axes(batches[name])[0])
    return found | join(of_networks, axis="network", union="layer"), findings


@contextmanager
def _noted(place: str, findings: list[str]) -> Iterator[None]:
    """Go on where something can't be measured, as in a training that diverges."""
    try:
        yield
    except UsageError as error:
        findings.append(f"{place}: not measured. {error}")


def _transference(
    probe: NetworkProbe,
    name: str,
    batch: Mapping[str, Tensor],
    copy: Int[Tensor, " sample"],
    mask: Bool[Tensor, "agent sample"] | None,
    context: Mapping[str, Tensor],
    optimiser: torch.optim.Adam | None,
) -> dict[str, Quantity]:
    network = probe.networks[name]
    # A loss's change is small beside the loss: in float32 the shortest would drown in rounding.
    whole = in_precision(batch, torch.float64)
    ours, held_out = split_copies(whole if mask is None else {**whole, _MASK: mask}, copy)
    weights = None if optimiser is None else adam_preconditioner(optimiser, network.generator)
    found = measure_transference(
        probe.precise(name),
        network.surrogate,
        ours,
        held_out,
        mask=ours.pop(_MASK, None),
        held_out_mask=held_out.pop(_MASK, None),
        context=in_precision(context, torch.float64),
        preconditioner=weights,
    )
    if optimiser is None:
        return found
    how = "steps preconditioned as Adam's"
    return {n: replace(q, estimator=f"{q.estimator}; {how}") for n, q in found.items()}


def _arrangement(
    embedding: Quantity, distance: NDArray[Any] | None, cosines: NDArray[Any]
) -> dict[str, Quantity]:
    found = measure_geometry(
        embedding.values,
        behavioural_distance=distance,
        interference=cosines,
        permutations=PERMUTATIONS,
    )
    # A run keeps the first estimator for all updates, so it must not tell what was NaN at one.
    agents = len(embedding.values)
    of_rows = f"plug-in, covariance of {agents} rows; few rows make it smaller; NaN: identical rows"
    how = {
        "effective_rank": of_rows,
        "participation_ratio": of_rows,
        "mantel_p_value": "two-sided; permutation test over all arrangements of the agents, or "
        f"{PERMUTATIONS} random ones",
    }
    return {n: replace(found[n], estimator=how.get(n, found[n].estimator)) for n in _ARRANGEMENT}


def _coupling(generator: nn.Module, agents: int) -> dict[str, Quantity]:
    if reads_observation(generator) or not isinstance(generator, KnowsCoupling):
        return {}
    found = measure_coupling(generator, agents)
    return {name: found[name] for name in ("coupling", "coupling_frobenius")}


def _cosines(diagnosed: Mapping[str, Quantity], network: str) -> NDArray[Any]:
    """Cosines between the agents' contributions to one network's gradient."""
    cosines = diagnosed.get("cosine_debiased", diagnosed["cosine"])
    place = {"network": network, "space": "psi", "layer": WHOLE}
    at = tuple(list(cosines.coords[axis]).index(label) for axis, label in place.items())
    matrix: NDArray[Any] = np.asarray(cosines.values[at])
    return matrix
