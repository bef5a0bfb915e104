"""One record of diagnostics: everything above, for every network, as labelled arrays."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from gradlab.decomposition import decompose
from gradlab.engine.part import Surrogate
from gradlab.metrics.interference import interference
from gradlab.metrics.variance import variance

Level = Literal["off", "light", "full"]
LEVELS: tuple[Level, ...] = ("off", "light", "full")

SKETCH_SIZE = 1024
CHECKED_SAMPLES = 64

RECORDED = ("cosine", "magnitude_similarity", "norm", "conflict_rate", "mean_cosine")


@dataclass(frozen=True, kw_only=True)
class Network:
    """One trained network as the diagnostics see it.

    Attributes:
        generator: Makes the policy parameters, as for `decompose`; left untouched.
        surrogate: Loss of one sample.
        batch: Tensors [agent, sample, ...] by name.
    """

    generator: nn.Module
    surrogate: Surrogate
    batch: Mapping[str, Tensor]


def diagnose(networks: Mapping[str, Network], level: Level) -> dict[str, xr.DataArray]:
    """Diagnose every network on its batch.

    Parameters, `.grad`, buffers and random states stay as they are.

    Args:
        networks: Networks by name, e.g. "actor" and "critic".
        level: "light": cosines, conflict rate, norms, residual; "full": the variance split as
            well; "off": nothing.

    Returns:
        Quantities by name with a leading `network` axis, NaN for a layer that a network lacks; and
        `embedding_<network>` over (agent, feature) for generators with a `representation`.
    """
    if level == "off":
        return {}
    datasets: dict[str, xr.Dataset] = {}
    embeddings: dict[str, xr.DataArray] = {}
    for name, network in networks.items():
        parts = decompose(network.generator, network.surrogate, network.batch, check=False)
        dataset = interference(parts)[list(RECORDED)]
        dataset["residual"] = xr.DataArray(
            residual_in_float64(network),
            attrs={
                "unit": "1",
                "estimator": "|sum_i J_i^T Z_i - autograd| / |autograd|, float64, on "
                f"{CHECKED_SAMPLES} samples of each agent",
            },
        )
        if level == "full":
            dataset = dataset.merge(variance(parts), join="outer", compat="no_conflicts")
        datasets[name] = dataset
        embedding = embedding_of(network.generator)
        if embedding is not None:
            embeddings[f"embedding_{name}"] = embedding
    joined = xr.concat(
        datasets.values(),
        dim=xr.Variable("network", list(datasets)),
        join="outer",
        data_vars="all",
        coords="minimal",
        compat="override",
        combine_attrs="override",
    )
    joined = joined.reindex(layer=_in_order([list(d.layer.values) for d in datasets.values()]))
    return {str(name): array for name, array in joined.data_vars.items()} | embeddings


def residual_in_float64(network: Network) -> float:
    """How far the parts of a gradient are from adding up to plain autograd's.

    In float64, on a copy: near convergence agents' gradients cancel, and in float32 the relative
    difference would measure that instead of the decomposition.

    Args:
        network: The network; of its batch a few samples of each agent are used.

    Returns:
        The residual of `decompose`.
    """
    batch = {
        name: (part.double() if part.is_floating_point() else part)
        for name, tensor in network.batch.items()
        for part in [tensor[:, :CHECKED_SAMPLES]]
    }
    generator = copy.deepcopy(network.generator).double()
    return decompose(generator, network.surrogate, batch).residual


def embedding_of(generator: nn.Module) -> xr.DataArray | None:
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
    return xr.DataArray(
        rows.float().cpu().numpy().copy(),
        dims=("agent", "feature"),
        coords={"agent": range(agents), "feature": range(features)},
        attrs={"unit": "1", "estimator": what},
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
    features = rows.shape[1]
    random = torch.Generator().manual_seed(0)
    bucket = torch.randint(SKETCH_SIZE, (features,), generator=random).to(rows.device)
    sign = (2 * torch.randint(2, (features,), generator=random) - 1).to(rows)
    return rows.new_zeros(len(rows), SKETCH_SIZE).index_add_(1, bucket, rows * sign)


def _in_order(lists: list[list[str]]) -> list[str]:
    """All labels of several lists, each once, in order of first appearance."""
    return list(dict.fromkeys(label for labels in lists for label in labels))
