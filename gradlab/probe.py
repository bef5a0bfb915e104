"""One record of diagnostics: everything above, for every network."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradlab.decomposition import Decomposition, decompose
from gradlab.engine.moments import Moments
from gradlab.engine.part import in_precision
from gradlab.engine.processes import Group
from gradlab.engine.surrogate import Surrogate
from gradlab.metrics.interference import measure_interference
from gradlab.metrics.spaces import SideBySide
from gradlab.metrics.variance import measure_variance
from gradlab.quantity import Quantity

Level = Literal["off", "light", "full"]
LEVELS: tuple[Level, ...] = ("off", "light", "full")

SKETCH_SIZE = 1024
CHECKED_SAMPLES = 64
_NOT_RECORDED = ("inner_product", "inner_product_debiased", "inner_product_error")
"""What cosines, norms and verdicts say already, at their own scale."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One trained network as the diagnostics see it.

    Attributes:
        generator: Makes the policy parameters, as for `decompose`; left untouched.
        surrogate: Loss of one sample.
    """

    generator: nn.Module
    surrogate: Surrogate


class NetworkProbe:
    """Diagnoses networks while they train.

    Parameters, `.grad`, buffers and random states stay as they are.

    Attributes:
        networks: The networks by name, e.g. "actor" and "critic".
        level: "light": plug-in cosines, norms, residual; "full": also debiased cosines with
            intervals and verdicts, and variance; "off": nothing.
        engines: For each network and parameter the engine that took its gradients; empty before
            the first diagnosis.
        findings: What is wrong with the last diagnosis's gradients, a sentence each.
    """

    def __init__(
        self, networks: Mapping[str, Network], level: Level, group: Group | None = None
    ) -> None:
        """Measure nothing yet.

        Args:
            networks: The networks by name.
            level: How much to measure.
            group: Processes that diagnose the same together, as for `decompose`.
        """
        self.networks = dict(networks)
        self.level = level
        self._group = group
        self.engines: dict[str, dict[str, str]] = {}
        self.findings: list[str] = []
        self._copies = {name: PreciseCopy(network.generator) for name, network in networks.items()}

    def precise(self, network: str) -> nn.Module:
        """Copy a network's generator, as it stands, in float64.

        Args:
            network: The network's name.

        Returns:
            The copy, which the next call brings up to date.
        """
        return self._copies[network].refreshed()

    def diagnose(
        self,
        batches: Mapping[str, Mapping[str, Tensor]],
        copy: Int[Tensor, " sample"] | None = None,
        mask: Bool[Tensor, "agent sample"] | None = None,
        context: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Quantity]:
        """Diagnose every network on its batch.

        Args:
            batches: For each network tensors [agent, sample, ...] by name.
            copy: The environment copy that each sample comes from; without it there are no
                debiased estimates.
            mask: Which samples exist; all by default. What is measured of an agent without any is
                NaN, and a finding says so.
            context: For each network tensors [agent, ...] by name that each of the agent's samples
                holds as well; none by default.

        Returns:
            Quantities by name with a leading `network` axis, NaN for a layer that a network lacks;
            and `embedding_<network>` over (agent, feature) for generators with a `representation`.
        """
        self.findings = []
        if self.level == "off":
            return {}
        taken: dict[str, Decomposition] = {}
        embeddings: dict[str, Quantity] = {}
        for name, network in self.networks.items():
            precise = self.precise(name)
            held = {} if context is None else context[name]
            light, batch = self.level == "light", batches[name]
            if exact := light or _in_half_precision(network.generator):
                batch, held = (in_precision(t, torch.float64) for t in (batch, held))
            d = decompose(
                precise if exact else network.generator,
                network.surrogate,
                batch,
                mask=mask,
                context=held,
                copy=None if light else copy,
                check=None if light else CHECKED_SAMPLES,
                precise=None if light else precise,
                group=self._group,
            )
            taken[name] = d
            self.engines[name] = d.moments.engines
            sentences = without_samples(d.moments) + non_finite(d.moments, batches[name])
            sentences += vanishing(d.moments)
            self.findings += [f"{name}, {sentence}" for sentence in sentences]
            embedding = embedding_of(network.generator)
            if embedding is not None:
                embeddings[f"embedding_{name}"] = embedding
        parts = SideBySide(taken)
        found = measure_interference(parts)
        for name in _NOT_RECORDED:
            found.pop(name, None)
        if self.level == "full":
            found |= measure_variance(parts)
        return found | _checks(parts) | embeddings


def _checks(parts: SideBySide) -> dict[str, Quantity]:
    """What says how far all else is to be trusted."""
    of_networks = parts.of_networks.values()
    non_finite = np.full((len(parts.of_networks), len(parts.layers), parts.agents), np.nan)
    for values, d in zip(non_finite, of_networks, strict=True):
        _, *columns = parts.columns(d.theta_layout.layers)
        values[columns] = d.moments.non_finite.mT.cpu().numpy()
    counts = np.stack([d.moments.count.cpu().numpy() for d in of_networks]).astype(np.float64)
    return {
        "factorisation_gap": parts.quantity(
            np.asarray([d.factorisation_gap for d in of_networks]),
            "1",
            "|E[J^T z] - E[J]^T E[z]| / |E[J^T z]|",
        ),
        "residual": parts.quantity(
            np.asarray([d.residual for d in of_networks]),
            "1",
            "|sum_i J_i^T Z_i - autograd| / |autograd|, in float64",
        ),
        "non_finite": parts.quantity(
            non_finite, "samples", "samples whose gradient is not finite", spaces=False
        ),
        "samples": Quantity(
            values=counts,
            dims=("network", "agent"),
            coords={"network": list(parts.of_networks), "agent": range(parts.agents)},
            unit="samples",
            estimator="diagnosed samples of each agent",
        ),
    }


def without_samples(moments: Moments) -> list[str]:
    """Say which agents have no samples.

    Args:
        moments: Moments of the gradients.

    Returns:
        A sentence for each.
    """
    return [
        f"agent {agent}: it acted in none of the diagnosed samples; what is measured of it is NaN."
        for agent in (moments.count == 0).nonzero().flatten().tolist()
    ]


def non_finite(moments: Moments, batch: Mapping[str, Tensor]) -> list[str]:
    """Say where gradients are not finite.

    Args:
        moments: Moments of the gradients.
        batch: What they were taken from.

    Returns:
        For each agent and layer concerned, how many samples, which is the first, and what it reads
        that is not finite itself.
    """
    sentences = []
    for agent, layer in moments.non_finite.nonzero().tolist():
        first = int(moments.first_non_finite[agent, layer])
        causes = [
            name
            for name, tensor in batch.items()
            if tensor.is_floating_point() and not tensor[agent, first].isfinite().all()
        ]
        sentences.append(
            f"agent {agent}, layer {moments.layout.layers[layer]}: the gradient is not finite in "
            f"{int(moments.non_finite[agent, layer])} of {int(moments.count[agent])} samples, "
            f"first in sample {first}"
            + (f", whose {' and '.join(causes)} is not finite." if causes else ".")
        )
    return sentences


def vanishing(moments: Moments) -> list[str]:
    """Say whose gradients are zero, or have squares that are.

    Args:
        moments: Moments of the gradients.

    Returns:
        A sentence for each agent whose gradient is zero in every sample, and for each layer where
        it is so small that its square underflows.
    """
    parts = moments.layout.split_by_layer(moments.sum)
    largest = torch.stack([part.abs().amax(1) for _, part in parts], dim=1)
    nothing = (moments.squared_norm == 0) & (moments.count > 0)[:, None]
    zero = (nothing & (largest == 0)).all(1).nonzero().flatten().tolist()
    sentences = [
        f"agent {agent}: the gradient is zero in all samples; it has no direction."
        for agent in zero
    ]
    for agent, layer in (nothing & (largest > 0)).nonzero().tolist():
        sentences.append(
            f"agent {agent}, layer {moments.layout.layers[layer]}: the gradient is so small (at "
            f"most {float(largest[agent, layer]):.1e} summed up) that its square is 0; variance "
            "and intervals are not to be trusted."
        )
    return sentences


def _in_half_precision(module: nn.Module) -> bool:
    """Whether there are parameters whose type is too coarse for sums of gradients."""
    return any(p.dtype in {torch.float16, torch.bfloat16} for p in module.parameters())


class PreciseCopy:
    """A module's copy in float64, kept so that it need not be made anew for every diagnosis."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copy: nn.Module | None = None
        self._ours: list[Tensor] = []

    def refreshed(self) -> nn.Module:
        """Copy the module's present parameters and buffers.

        Returns:
            The copy.
        """
        if self._copy is None:
            self._copy = copy.deepcopy(self._module).double()
            self._ours = [*self._copy.parameters(), *self._copy.buffers()]
        theirs = [*self._module.parameters(), *self._module.buffers()]
        with torch.no_grad():
            torch._foreach_copy_(self._ours, theirs)
        return self._copy


def embedding_of(generator: nn.Module) -> Quantity | None:
    """What tells agents apart in a generator, one row for each agent.

    Args:
        generator: A generator; one with a method `representation` returns there a tensor
            [agent, feature] and a sentence that says what it is.

    Returns:
        The rows in float32, labelled; None if the generator has no such method.
    """
    represent = getattr(generator, "representation", None)
    if represent is None:
        return None
    with torch.no_grad():
        rows, what = represent()
    if rows.shape[1] > SKETCH_SIZE:
        rows = sketch(rows)
        what += f"; folded to {SKETCH_SIZE} numbers that keep squared distances to about 4 %"
    agents, features = rows.shape
    return Quantity(
        values=rows.float().cpu().numpy().copy(),
        dims=("agent", "feature"),
        coords={"agent": range(agents), "feature": range(features)},
        unit="1",
        estimator=what,
    )


def sketch(rows: Float[Tensor, "agent feature"]) -> Float[Tensor, "agent bucket"]:
    """Fold long rows so that a run of big networks stays small.

    A count sketch (Charikar et al., 2002): each feature is added, with a random sign, to a random
    one of `SKETCH_SIZE` buckets; the same at every call. Squared distances are unbiased, with a
    relative standard deviation of at most sqrt(2 / SKETCH_SIZE), 4 %.

    Args:
        rows: One row for each agent.

    Returns:
        The folded rows.
    """
    bucket, sign = _folds(rows.shape[1])
    folded = rows.new_zeros(len(rows), SKETCH_SIZE)
    return folded.index_add_(1, bucket.to(rows.device), rows * sign.to(rows))


@cache
def _folds(features: int) -> tuple[Int[Tensor, " feature"], Int[Tensor, " feature"]]:
    """Each feature's bucket and sign."""
    random = torch.Generator().manual_seed(0)
    bucket = torch.randint(SKETCH_SIZE, (features,), generator=random)
    return bucket, 2 * torch.randint(2, (features,), generator=random) - 1
