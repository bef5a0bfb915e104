"""The last diagnosed conflict of runs, side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gradlab.checks import UsageError, check, unknown_name
from gradlab.run import Run


def conflict_table(
    runs: Sequence[Run], *, network: str = "actor", layer: str = "all"
) -> pd.DataFrame:
    """Summarise the newest diagnosed update of each run.

    Args:
        runs: Runs with diagnostics.
        network: "actor" or "critic".
        layer: A layer's name, or "all".

    Returns:
        One row per run: conflict rate and mean cosine of g (psi-space) and Z (theta-space), the
        pair of agents whose g point most against each other, the residual, how many of each
        agent's samples were diagnosed, and by which engine.

    Raises:
        UsageError: If a run has no diagnostics, or not that network or layer.
    """
    return pd.DataFrame([_row(run, network, layer) for run in runs])


def _row(run: Run, network: str, layer: str) -> dict[str, object]:
    if "cosine" not in run.quantities or run.quantity("cosine").sizes["update"] == 0:
        raise UsageError(
            f"{run.path} has no recorded diagnostics. Train it with --diagnostics light or full."
        )
    cosine = run.quantity("cosine")
    check_name("network", network, cosine.network.values.tolist())
    check_name("layer", layer, cosine.layer.values.tolist())
    last = cosine.isel(update=-1).sel(network=network, layer=layer)
    where = {"network": network, "layer": layer}
    rate = run.quantity("conflict_rate").isel(update=-1).sel(where)
    mean = run.quantity("mean_cosine").isel(update=-1).sel(where)
    residual = run.quantity("residual").isel(update=-1).sel(network=network)
    psi = last.sel(space="psi").to_numpy().copy()
    check(psi.ndim == 2, "cosine", "have two agent axes", psi.shape)
    psi[np.tril_indices(len(psi))] = np.nan
    worst = "-"
    if np.isfinite(psi).any() and np.nanmin(psi) < 0:
        i, k = np.unravel_index(np.nanargmin(psi), psi.shape)
        worst = f"{i}, {k} ({psi[i, k]:+.2f})"
    return {
        "run": run.name,
        "method": run.method,
        "environment": run.environment,
        "update": int(cosine["update"][-1]),
        "conflict_rate_g": float(rate.sel(space="psi")),
        "conflict_rate_z": float(rate.sel(space="theta")),
        "mean_cosine_g": float(mean.sel(space="psi")),
        "mean_cosine_z": float(mean.sel(space="theta")),
        "worst_pair_g": worst,
        "residual": float(residual),
        "samples": _samples(run, network),
        "engine": _engine(run, network),
    }


def _samples(run: Run, network: str) -> str:
    """How many of each agent's samples of a rollout the newest diagnosis looked at."""
    if "samples" not in run.quantities:
        return "-"
    kept = int(run.quantity("samples").isel(update=-1).sel(network=network).min())
    total = run.config.get("copies", 0) * run.config.get("steps", 0)
    return f"{kept:,} of {total:,}" if total else f"{kept:,}"


def _engine(run: Run, network: str) -> str:
    """How the per-sample gradients were taken."""
    engines = run.info.get("engines", {})
    of_network = engines.get(network, {}) if isinstance(engines, dict) else {}
    formed = [name for name, engine in of_network.items() if engine == "general"]
    if not of_network:
        return "-"
    return f"general for {', '.join(formed)}" if formed else "structured"


def check_name(kind: str, name: str, known: Sequence[str]) -> None:
    """Raise unless a name is among those that exist.

    Args:
        kind: What it names.
        name: The name.
        known: The names that exist.

    Raises:
        UsageError: If it is not.
    """
    if name not in known:
        raise unknown_name(kind, name, known)


def quantity_table(runs: Sequence[Run], quantity: str, where: Mapping[str, str]) -> pd.DataFrame:
    """One recorded quantity of each run at its newest diagnosed update, in long form.

    Args:
        runs: Runs that recorded it.
        quantity: Its name.
        where: A label for each axis to fix; axes that the quantity lacks are passed over.

    Returns:
        Columns run, update, the quantity's remaining axes, and the quantity.

    Raises:
        UsageError: If a run lacks the quantity or a label.
    """
    parts = []
    for run in runs:
        array = run.quantity(quantity)
        if array.sizes["update"] == 0:
            raise UsageError(f"{run.path} has no record of {quantity} yet. Wait, or train on.")
        last = array.isel(update=-1)
        for axis, label in where.items():
            if axis in last.dims:
                check_name(axis, label, [str(known) for known in last[axis].values])
                last = last.sel({axis: label})
        part = last.to_series().rename(quantity).reset_index() if last.dims else None
        if part is None:
            part = pd.DataFrame({quantity: [float(last)]})
        part.insert(0, "update", int(array["update"][-1]))
        part.insert(0, "run", run.name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
