"""One sentence on what was measured, and the settings, for a Dataset's attributes."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gradlab.decomposition import Decomposition
from gradlab.estimates import FEWEST, LEVEL
from gradlab.quantity import Quantity
from gradlab.verdicts import ALIGNED, CONFLICT, UNDECIDED

Attributes = dict[str, str | int | float]


def interference_attributes(d: Decomposition, found: Mapping[str, Quantity]) -> Attributes:
    """Say how many pairs of agents are in conflict in the trained parameters.

    Args:
        d: What was measured.
        found: What `measure_interference` returned.

    Returns:
        A sentence `summary`, and the settings of the estimates.
    """
    return {"summary": f"{_verdicts(d, found)}; {_batch(d)}", **_settings(d)}


def variance_attributes(d: Decomposition, found: Mapping[str, Quantity]) -> Attributes:
    """Say how the mean gradients' noise compares with their signal.

    Args:
        d: What was measured.
        found: What `measure_variance` returned.

    Returns:
        A sentence `summary`, and the settings of the estimates.
    """
    if "noise_scale" in found:
        scale = found["noise_scale"].values[0, 0]  # psi, whole network
        known = np.isfinite(scale)
        words = f"no agent has a gradient above its noise in psi-space, of {d.agents}"
        if known.any():
            words = f"noise scale {_range(scale[known])} environment copies in psi-space"
        if known.any() and not known.all():
            words += f", unknown for {(~known).sum()} of {d.agents} agents"
    else:
        within, between = (
            float(found[f"variance_{part}"].values[0]) for part in ("within", "between")
        )
        words = "no variance of single samples in theta-space"
        if within + between > 0:
            share = within / (within + between)
            words = f"{share:.0%} of single samples' variance is within agents in theta-space"
    return {"summary": f"{words}; {_batch(d)}", **_settings(d)}


def _verdicts(d: Decomposition, found: Mapping[str, Quantity]) -> str:
    pairs = np.triu_indices(d.agents, k=1)
    total = len(pairs[0])
    if total == 0:
        return "one agent, no pairs"
    if "verdict" not in found or d.products["psi"].count.shape[1] < FEWEST:
        negative = int((found["cosine"].values[0, 0][pairs] < 0).sum())
        return (
            f"{negative} of {total} pairs with a negative plug-in cosine in psi-space, no verdicts "
            f"without at least {FEWEST} environment copies"
        )
    verdict = found["verdict"].values[0, 0][pairs]
    conflict, aligned, undecided = (
        int((verdict == one).sum()) for one in (CONFLICT, ALIGNED, UNDECIDED)
    )
    words = (
        f"{conflict} of {total} pairs in conflict in psi-space, {aligned} aligned, "
        f"{undecided} undecided"
    )
    unknown = total - conflict - aligned - undecided
    return words + (f", {unknown} unknown" if unknown else "")


def _batch(d: Decomposition) -> str:
    samples = f"{_range(d.moments.count.cpu().numpy())} samples of each agent"
    if not d.products:
        return f"{samples}, environment copies not told apart"
    return f"{_clusters(d)} clusters of {d.copies} environment copies, {samples}"


def _settings(d: Decomposition) -> Attributes:
    return {
        "clusters": _clusters(d),
        "copies": d.copies,
        "level": LEVEL,
        "false_discovery_rate": round(1 - LEVEL, 10),
    }


def _clusters(d: Decomposition) -> int:
    return d.products["psi"].count.shape[1] if d.products else 0


def _range(values: NDArray[np.int64] | NDArray[np.float64]) -> str:
    low, high = (f"{x:.0f}" for x in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
