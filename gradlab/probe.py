"""One record of diagnostics: everything above, for every network."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradlab.decomposition import decompose
from gradlab.engine.moments import Moments
from gradlab.engine.part import in_precision
from gradlab.engine.surrogate import Surrogate
from gradlab.metrics.interference import measure_interference
from gradlab.metrics.variance import measure_variance
from gradlab.quantity import Quantity, join

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


class Probe:
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

    def __init__(self, networks: Mapping[str, Network], level: Level) -> None:
        self.networks = dict(networks)
        self.level = level
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
    ) -> dict[str, Quantity]:
        """Diagnose every network on its batch.

        Args:
            batches: For each network tensors [agent, sample, ...] by name.
            copy: The environment copy that each sample comes from; without it there are no
                debiased estimates.
            mask: Which samples exist; all by default. What is measured of an agent without any is
                NaN, and a finding says so.

        Returns:
            Quantities by name with a leading `network` axis, NaN for a layer that a network lacks;
            and `embedding_<network>` over (agent, feature) for generators with a `representation`.
        """
        self.findings = []
        if self.level == "off":
            return {}
        found: dict[str, dict[str, Quantity]] = {}
        embeddings: dict[str, Quantity] = {}
        for name, network in self.networks.items():
            precise = self.precise(name)
            if self.level == "light":
                parts = decompose(
                    precise,
                    network.surrogate,
                    in_precision(batches[name], torch.float64),
                    mask=mask,
                )
            else:
                parts = decompose(
                    network.generator,
                    network.surrogate,
                    batches[name],
                    mask=mask,
                    copy=copy,
                    check=CHECKED_SAMPLES,
                    precise=precise,
                )
            found[name] = {
                quantity: value
                for quantity, value in measure_interference(parts).items()
                if quantity not in _NOT_RECORDED
            }
            if self.level == "full":
                found[name] |= measure_variance(parts)
            found[name]["factorisation_gap"] = Quantity.scalar(
                parts.factorisation_gap, "1", "|E[J^T z] - E[J]^T E[z]| / |E[J^T z]|"
            )
            found[name]["residual"] = Quantity.scalar(
                parts.residual, "1", "|sum_i J_i^T Z_i - autograd| / |autograd|, in float64"
            )
            found[name]["non_finite"] = Quantity(
                values=parts.moments.non_finite.mT.cpu().numpy(),
                dims=("layer", "agent"),
                coords={"layer": list(parts.theta_layout.layers), "agent": range(parts.agents)},
                unit="samples",
                estimator="samples whose gradient is not finite",
            )
            found[name]["samples"] = Quantity(
                values=parts.moments.count.cpu().numpy(),
                dims=("agent",),
                coords={"agent": range(parts.agents)},
                unit="samples",
                estimator="diagnosed samples of each agent",
            )
            self.engines[name] = parts.moments.engines
            sentences = without_samples(parts.moments) + non_finite(parts.moments, batches[name])
            self.findings += [f"{name}, {sentence}" for sentence in sentences]
            embedding = embedding_of(network.generator)
            if embedding is not None:
                embeddings[f"embedding_{name}"] = embedding
        return join(found, axis="network", union="layer") | embeddings


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


class PreciseCopy:
    """A module's copy in float64, kept so that it need not be made anew for every diagnosis."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copy: nn.Module | None = None

    def refreshed(self) -> nn.Module:
        """Copy the module's present parameters and buffers.

        Returns:
            The copy.
        """
        if self._copy is None:
            self._copy = copy.deepcopy(self._module).double()
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self._copy, self._module))
        with torch.no_grad():
            torch._foreach_copy_(ours, theirs)
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
