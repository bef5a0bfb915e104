"""What one update recorded, in the forms in which other tools take it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from jaxtyping import Float

from gradlab.quantity import Quantity

MOST_SERIES = 32
"""Agents, or pairs, that get a series of numbers each; of more, mean, least and greatest do."""

_GROUPS = {
    "conflict": (
        "conflict_rate",
        "aligned_rate",
        "negative_rate",
        "mean_cosine",
        "cancelled_norm",
        "gradient_diversity",
        "gradient_diversity_debiased",
    ),
    "cosine": ("cosine", "cosine_debiased"),
    "norm": ("norm",),
    "noise": (
        "noise_scale",
        "normalised_variance",
        "variance_within",
        "variance_between",
        "design_effect",
    ),
    "coupling": ("coupling", "coupling_frobenius", "coupling_head"),
    "transference": ("transference", "transference_agreement", "transference_error"),
    "diversity": ("snd",),
    "embedding": ("effective_rank", "participation_ratio"),
    "check": ("residual", "factorisation_gap", "samples"),
    "return": ("episode_return", "episode_length", "reward_per_step", "outcome_rate"),
    "evaluation": (
        "evaluation_return",
        "evaluation_agent_return",
        "evaluation_length",
        "evaluation_metric",
        "evaluation_outcome_rate",
    ),
    "training": (
        "policy_loss",
        "value_loss",
        "approximate_kl",
        "clip_fraction",
        "epochs_done",
        "frames",
        "seconds",
    ),
}
"""What becomes series of numbers, under which heading."""

_HEADING = {name: heading for heading, names in _GROUPS.items() for name in names}
_DIRECTED = ("transference",)
_PICTURED = ("cosine", "cosine_debiased", "verdict", "coupling")
"""Matrices from -1 to 1 over pairs of agents."""

_PAIR = ("agent", "agent_other")
_EMBEDDING = "embedding_"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one update recorded.

    Attributes:
        update: The update's number, from 0.
        quantities: All of it, by name.
    """

    update: int
    quantities: Mapping[str, Quantity]

    @cached_property
    def metrics(self) -> xr.Dataset:
        """All quantities but the embeddings, labelled, with attributes `unit` and `estimator`."""
        return xr.merge(
            [_labelled(n, q) for n, q in self.quantities.items() if not _is_embedding(n, q)],
            join="outer",
            compat="no_conflicts",
        )

    @cached_property
    def embeddings(self) -> dict[str, xr.DataArray]:
        """Agents' embeddings [agent, feature] by network."""
        return {
            name.removeprefix(_EMBEDDING): _labelled(name, quantity)
            for name, quantity in self.quantities.items()
            if _is_embedding(name, quantity)
        }

    @cached_property
    def scalars(self) -> dict[str, float]:
        """Finite single numbers by a tag such as "cosine/actor/psi/0-1" or "return/episode_return".

        Of each network as a whole, not of its layers. Where there are more than `MOST_SERIES`
        agents or pairs: their "mean", "min" and "max". Single numbers that are none of gradlab's
        own stand under "other", unless their name has a heading, as "loss/auxiliary".
        """
        found: dict[str, float] = {}
        for name, quantity in self.quantities.items():
            if name in _HEADING:
                heading = _HEADING[name]
                stem = heading if heading == name else f"{heading}/{name}"
                found |= _series(stem, quantity, directed=name in _DIRECTED)
            elif not quantity.dims:
                found[name if "/" in name else f"other/{name}"] = float(quantity.values)
        return {tag: number for tag, number in found.items() if np.isfinite(number)}

    @cached_property
    def matrices(self) -> dict[str, Float[np.ndarray, "agent agent_other"]]:
        """Numbers from -1 to 1 over pairs of agents by a tag such as "cosine/actor/psi"."""
        return {
            "/".join([name, *labels]): values.astype(float)
            for name in _PICTURED
            if name in self.quantities
            for labels, values in _parts(self.quantities[name])
        }


def _is_embedding(name: str, quantity: Quantity) -> bool:
    return name.startswith(_EMBEDDING) and "feature" in quantity.dims


def _labelled(name: str, quantity: Quantity) -> xr.DataArray:
    return xr.DataArray(
        quantity.values,
        dims=quantity.dims,
        coords={dim: list(quantity.coords[dim]) for dim in quantity.dims},
        name=name,
        attrs={"unit": quantity.unit, "estimator": quantity.estimator},
    )


def _parts(quantity: Quantity) -> list[tuple[list[str], np.ndarray]]:
    """What it says of networks as a whole: for each label of the other axes, numbers of agents."""
    inner = [dim for dim in quantity.dims if dim in _PAIR]
    outer = [dim for dim in quantity.dims if dim not in (*_PAIR, "layer")]
    values = quantity.values
    if "layer" in quantity.dims:
        axis = quantity.dims.index("layer")
        values = values.take(list(quantity.coords["layer"]).index("all"), axis)
    dims = [dim for dim in quantity.dims if dim != "layer"]
    values = values.transpose([dims.index(dim) for dim in (*outer, *inner)])
    labels = [[str(label) for label in quantity.coords[dim]] for dim in outer]
    return [
        (
            [names[number] for names, number in zip(labels, place, strict=True)],
            values[(*place, ...)],
        )
        for place in np.ndindex(*map(len, labels))
    ]


def _series(stem: str, quantity: Quantity, *, directed: bool) -> dict[str, float]:
    """Single numbers by tag."""
    found: dict[str, float] = {}
    for labels, values in _parts(quantity):
        tag = "/".join([stem, *labels])
        agents = [str(label) for label in quantity.coords.get("agent", ())]
        if values.ndim == 0:
            found[tag] = float(values)
            continue
        if values.ndim == 1:
            named = dict(zip(agents, values, strict=True))
        else:
            named = {
                f"{agents[i]}-{agents[k]}": values[i, k]
                for i, k in np.ndindex(values.shape)
                if i < k or (directed and i != k)
            }
        if len(named) > MOST_SERIES:
            numbers = np.array(list(named.values()), dtype=float)
            numbers = numbers[np.isfinite(numbers)]
            named = {}
            if numbers.size:
                named = {"mean": numbers.mean(), "min": numbers.min(), "max": numbers.max()}
        found |= {f"{tag}/{name}": float(number) for name, number in named.items()}
    return found
