"""The last diagnosed conflict of runs, side by side."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from gradlab.checks import UsageError, check, unknown_name
from gradlab.run import Run
from gradlab.verdicts import ALIGNED, CONFLICT, UNDECIDED


def conflict_table(
    runs: Sequence[Run], *, network: str = "actor", layer: str = "all"
) -> pd.DataFrame:
    """Summarise the newest diagnosed update of each run.

    Args:
        runs: Runs with diagnostics.
        network: "actor" or "critic".
        layer: A layer's name, or "all".

    Returns:
        One row per run: of g (psi-space) and Z (theta-space) the shares of agent pairs that are in
        conflict and aligned, by verdict, beside the naive share of negative cosines and the mean
        plug-in cosine; the pair in conflict whose cosine of g is least, with its 95 % interval; the
        residual, how many of each agent's samples were diagnosed, and by which engine.

    Raises:
        UsageError: If a run has no diagnostics, or not that network or layer.
    """
    return pd.DataFrame([_row(run, network, layer) for run in runs])


class _Newest:
    """A network's and layer's figures at a run's newest diagnosed update."""

    def __init__(self, run: Run, network: str, layer: str) -> None:
        newest = run.newest("cosine") if "cosine" in run.quantities else None
        if newest is None:
            raise UsageError(
                f"{run.path} has no recorded diagnostics. Train it with --diagnostics light or "
                "full."
            )
        axes = run.axes("cosine")
        check_name("network", network, axes["network"])
        check_name("layer", layer, axes["layer"])
        self.update = newest
        self.agents = len(axes["agent"])
        self._run = run
        self._where = {"network": network, "layer": layer}

    def __call__(self, quantity: str, **where: object) -> xr.DataArray | None:
        """A quantity where it was recorded last; None if it was not."""
        found = newest_record(self._run, quantity)
        if found is None:
            return None
        where = {axis: label for axis, label in (self._where | where).items() if axis in found.dims}
        for axis, label in where.items():
            known = found[axis].to_numpy().tolist()
            if label not in known:
                raise unknown_name(
                    f"{axis} of {quantity} in {self._run.path}", label, map(str, known)
                )
        return found.sel(where)

    def number(self, quantity: str, **where: object) -> float:
        """A single number there; NaN if it was not recorded."""
        found = self(quantity, **where)
        return math.nan if found is None else float(found)


def _row(run: Run, network: str, layer: str) -> dict[str, object]:
    newest = _Newest(run, network, layer)
    row: dict[str, object] = {
        "run": run.name,
        "method": run.method,
        "environment": run.environment,
        "update": newest.update,
    }
    for letter, space in (("g", "psi"), ("z", "theta")):
        for name in ("conflict_rate", "aligned_rate", "negative_rate", "mean_cosine"):
            row[f"{name}_{letter}"] = newest.number(name, space=space)
    return row | {
        "worst_pair_g": _worst(newest),
        "residual": newest.number("residual"),
        "samples": _samples(run, network),
        "engine": _engine(run, network),
    }


def _worst(newest: _Newest) -> str:
    """The pair in conflict whose cosine of g is least."""
    names = ("verdict", "cosine_debiased", "cosine_low", "cosine_high")
    found = [newest(name, space="psi") for name in names]
    if any(array is None for array in found):
        return "-"
    verdict, value, low, high = (array.to_numpy() for array in found if array is not None)
    cosines = np.where((verdict == CONFLICT) & np.triu(np.ones_like(verdict, bool), 1), value, 1.0)
    i, k = np.unravel_index(np.nanargmin(cosines), cosines.shape)
    if not cosines[i, k] < 0:
        return "-"
    return f"{i}, {k} ({_interval(value[i, k], low[i, k], high[i, k])})"


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f}, {low:+.2f} to {high:+.2f}"


def explain(run: Run, agent: int, other: int, *, network: str = "actor", layer: str = "all") -> str:
    """Read a pair's figures at the newest diagnosed update in words.

    Args:
        run: A run with diagnostics.
        agent: One agent.
        other: Another.
        network: "actor" or "critic".
        layer: A layer's name, or "all".

    Returns:
        What the two want of their policies, how much of it the sharing scheme lets through, and
        what comes of it in the trained parameters.

    Raises:
        UsageError: If the run has no diagnostics, or not that network, layer or pair.
    """
    newest = _Newest(run, network, layer)
    check(
        {agent, other} <= set(range(newest.agents)) and agent != other,
        "--explain",
        f"name two agents from 0 to {newest.agents - 1}",
        f"{agent} {other}",
    )
    pair = {"agent": agent, "agent_other": other}

    def of(quantity: str, space: str) -> float:
        return newest.number(quantity, space=space, **pair)

    def said(space: str) -> str:
        names = ("cosine_debiased", "cosine_low", "cosine_high")
        value, low, high = (of(name, space) for name in names)
        if math.isnan(low):
            return f"plug-in {of('cosine', space):+.2f}, no interval"
        if math.isnan(value):
            return "not known, as the gradients are lost in noise"
        return _interval(value, low, high)

    want = {
        CONFLICT: "want opposite changes",
        ALIGNED: "want similar changes",
        UNDECIDED: "can't be told to want opposite or similar changes",
    }.get(of("verdict", "theta"), "were not judged")
    where = f"{run.name}, {network}, {layer}, update {newest.update}"
    words = [f"{where}: agents {agent} and {other} {want} (Z cosine {said('theta')})"]
    of_z = of("cosine_debiased", "theta")
    through = of("cosine_debiased", "psi") / of_z if of_z else math.nan
    method = run.method_of(network)
    scheme = _SCHEMES.get(method, method)
    if method == "nops" and run.config.get("network", {}).get("log_std") != "shared":
        words.append(f"{scheme} let nothing of it through")
    elif of("verdict", "theta") in {CONFLICT, ALIGNED} and math.isfinite(through):
        words.append(f"{scheme} lets {through:.0%} of it through (FuPS: 100 %)")
    coupling = newest.number("coupling", **pair)
    if math.isfinite(coupling):
        words[-1] += f", coupling {coupling:.2f}"
    result = {CONFLICT: "in conflict", ALIGNED: "aligned", UNDECIDED: "undecided"}.get(
        of("verdict", "psi"), "not judged"
    )
    words.append(f"in the trained parameters they are {result} (g cosine {said('psi')})")
    sentence = "; ".join(words) + "."
    copies = newest.number("copies_to_resolve", space="theta", **pair)
    if of("verdict", "theta") == UNDECIDED and math.isfinite(copies):
        sentence += f" About {copies:,.0f} environment copies would tell a Z cosine of 0.1 from 0."
    if math.isnan(of("verdict", "theta")):
        sentence += " Verdicts need --diagnostics full and at least 8 environment copies."
    return sentence


_SCHEMES = {
    "fups": "full sharing",
    "fups-id": "full sharing with IDs",
    "fups-id-nostate": "full sharing of IDs alone",
    "nops": "separate networks",
    "adapters": "full sharing with adapters",
    "dico": "the shared policy with scaled deviations",
    "kaleidoscope": "the shared policy with masks",
    "seps": "a network for each group",
    "hypermarl": "the hypernetwork",
    "hypermarl-no-rf": "the hypernetwork",
    "hypermarl-linear": "the linear hypernetwork",
    "hypermarl-coupled": "the hypernetwork, which reads the observation,",
}


def _samples(run: Run, network: str) -> str:
    """How many of each agent's samples, of a rollout or replay, the newest diagnosis looked at."""
    newest = newest_record(run, "samples")
    if newest is None:
        return "-"
    kept = int(newest.sel(network=network).min())
    recurrent = run.config.get("network", {}).get("memory", "none") != "none"
    total = run.config.get("copies", 0) * (1 if recurrent else run.config.get("steps", 0))
    if "replay_frames" in run.quantities:
        total = int(run.quantity("replay_frames", at=[int(newest["update"])])[0])
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


def newest_record(run: Run, quantity: str) -> xr.DataArray | None:
    """Read a quantity's last record, however long the run.

    Args:
        run: A run.
        quantity: The quantity's name.

    Returns:
        The quantity without its axis `update`, which is a coordinate; None if there is no record.
    """
    update = run.newest(quantity) if quantity in run.quantities else None
    return None if update is None else run.quantity(quantity, at=[update])[0]


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
        run.axes(quantity)  # which says if it has none of that name
        last = newest_record(run, quantity)
        if last is None:
            raise UsageError(f"{run.path} has no record of {quantity} yet. Wait, or train on.")
        update = int(last["update"])
        for axis, label in where.items():
            if axis in last.dims:
                check_name(axis, label, [str(known) for known in last[axis].values])
                last = last.sel({axis: label})
        part = last.to_series().rename(quantity).reset_index() if last.dims else None
        if part is None:
            part = pd.DataFrame({quantity: [float(last)]})
        part.insert(0, "update", update)
        part.insert(0, "run", run.name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
