"""What a run's diagnostics say, in a sentence."""

from collections.abc import Callable

import numpy as np
import xarray as xr

from gradlab.run import Run
from gradlab.verdicts import ALIGNED, CONFLICT

Read = Callable[[str], xr.DataArray | None]


def headline(run: Run, network: str = "actor", read: Read | None = None) -> str:
    """Say how many pairs of agents are in conflict, since when and where, and what coupling did.

    Args:
        run: A run.
        network: "actor" or "critic".
        read: Reads a quantity, e.g. at some of the updates of a long run alone, which is then all
            that is spoken of; None if there is nothing of it. By default `run.quantity`.

    Returns:
        A sentence, e.g. "4 of 6 pairs in conflict from update 120 on, mostly in layer1; coupling
        falls from 1.00 to 0.18." All of g, what the trained parameters get to feel; of Z where
        agents share nothing.
    """
    read = read or run.quantity
    if "cosine" not in run.quantities or run.newest("cosine") is None:
        return "No diagnostics recorded."
    axes = run.axes("cosine")
    if network not in axes["network"]:
        return f"No diagnostics of the {network} recorded."
    agents = len(axes["agent"])
    if agents < 2:
        return "One agent, no pairs."
    alone = run.method_of(network) == "nops"
    parts = [_conflict(run, read, network, "theta" if alone else "psi")]
    if alone:
        parts = ["Nothing is shared, so nothing interferes", f"of what agents want, {parts[0]}"]
    elif "coupling" in run.quantities:
        parts += _coupling(read, network)
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _conflict(run: Run, read: Read, network: str, space: str) -> str:
    pairs = np.triu_indices(len(run.axes("cosine")["agent"]), k=1)
    total = len(pairs[0])
    noun = "pair" if total == 1 else "pairs"
    verdict = read("verdict") if "verdict" in run.quantities else None
    if verdict is None or not verdict.size:
        where = {"network": network, "space": space, "layer": "all"}
        cosine = run.quantity("cosine", since=run.newest("cosine") or 0, where=where)[-1]
        negative = int((cosine.to_numpy()[pairs] < 0).sum())
        return (
            f"{negative} of {total} {noun} with a negative plug-in cosine at the end, which noise "
            "alone can make; no verdicts recorded"
        )
    verdict = verdict.sel(network=network, space=space)
    whole = verdict.sel(layer="all").to_numpy()[:, pairs[0], pairs[1]]
    counts = (whole == CONFLICT).sum(1)
    updates = verdict["update"].to_numpy()
    if not counts[-1]:
        when = (
            f"now, the last at update {updates[counts > 0][-1]}" if counts.any() else "at any time"
        )
        aligned = int((whole[-1] == ALIGNED).sum())
        rest = f", {aligned} aligned" if aligned else ""
        return f"none of {total} {noun} in conflict {when}{rest}"
    since = int(np.flatnonzero(counts == 0)[-1]) + 1 if (counts == 0).any() else 0
    start = f" from update {updates[since]} on" if since else " from the start"
    return f"{counts[-1]} of {total} {noun} in conflict{start}{_layer(verdict, since, pairs)}"


def _layer(verdict: xr.DataArray, since: int, pairs: tuple[np.ndarray, np.ndarray]) -> str:
    layers = [layer for layer in verdict["layer"].to_numpy().tolist() if layer != "all"]
    shares = {
        layer: (verdict.sel(layer=layer).to_numpy()[since:, pairs[0], pairs[1]] == CONFLICT).mean()
        for layer in layers
    }
    if len(shares) < 2 or not any(shares.values()):
        return ""
    most = max(shares, key=lambda layer: shares[layer])
    others = [share for layer, share in shares.items() if layer != most]
    return f", mostly in {most}" if shares[most] > 1.2 * max(others) else ""


def _coupling(read: Read, network: str) -> list[str]:
    coupling = read("coupling")
    if (
        coupling is None
        or network not in coupling["network"].to_numpy()
        or "all" not in coupling["layer"].to_numpy()
    ):
        return []
    matrix = coupling.sel(network=network, layer="all").to_numpy()
    off = ~np.eye(matrix.shape[-1], dtype=bool)
    means = [float(np.mean(at[off])) for at in matrix if np.isfinite(at[off]).all()]
    if not means:
        return []
    first, last = means[0], means[-1]
    if f"{first:.2f}" == f"{last:.2f}":
        return [f"coupling stays at {last:.2f}"]
    verb = "falls" if last < first else "rises"
    return [f"coupling {verb} from {first:.2f} to {last:.2f}"]
