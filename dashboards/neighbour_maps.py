"""Panels that show who is next to whom: t-SNE and UMAP."""

from typing import Any

import numpy as np
import xarray as xr

from analyses.curves import evenly_spaced
from analyses.embeddings import (
    MIN_DISTINCT,
    perplexity_for,
    tsne,
    tsne_of_seed,
    umap,
)
from dashboards.choices import Choices
from dashboards.embedding_rows import PARTS, embedding, meta_of, updates_of
from dashboards.lines import NOT_RECORDED
from dashboards.panel import Figure, Panel, Part
from dashboards.points import (
    agent_trace,
    chosen_part,
    colour_part,
)
from dashboards.style import nothing
from dashboards.tables import Runs, RunTables

PERPLEXITIES = {"default": 1.0, "low": 0.5, "high": 1.7}
SEEDS = 5
_TSNE_UPDATES = 12
_SEEDS_UPDATES = 2


def _tsne_updates(runs: Runs) -> Any:  # noqa: ANN401 -- as updates_of
    return updates_of(runs, _TSNE_UPDATES)


def _tsne_of(of: RunTables, network: str, perplexity: str) -> xr.Dataset | None:
    points = embedding(of, network)
    if points is None:
        return None
    kept = evenly_spaced(points["update"], _TSNE_UPDATES)
    scale = PERPLEXITIES[perplexity]
    # Few agents leave no room for different perplexities.
    actual = perplexity_for(len(of.agents), scale)
    return of.once(("tsne", network, actual), lambda: tsne(points.sel(update=kept), scale=scale))


def tsne_panel(runs: Runs) -> Panel:
    """Draw t-SNE from one update to the next.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        found = _tsne_of(of, choices.network, choices.perplexity)
        if found is None:
            return nothing(NOT_RECORDED)
        if choices.update not in found["update"].to_numpy():
            return nothing("not recorded for this network")
        now = found.sel(update=choices.update)
        reason = str(now["reason"].item())
        if reason:
            return nothing(reason)
        everywhere = [_unit_size(p) for p in found["position"].to_numpy()]
        # Unit size means a root mean square of 1; with n points none is farther out than sqrt(n).
        extent = max(1.5, *(float(np.nanmax(np.abs(p), initial=0.0)) for p in everywhere)) * 1.15
        position = _unit_size(now["position"].to_numpy())
        note = f"perplexity {float(now['perplexity']):.3g}"
        return {
            "data": [agent_trace(position, of.agents, 2 * extent)],
            "layout": _unitless(extent, "t-SNE (no units)")
            | {"meta": meta_of(of, choices, note, position)},
        }

    return Panel(
        name="tsne",
        title="t-SNE",
        reading="Shows who is next to whom. Distances, sizes of groups and gaps mean little, and "
        "noise looks clustered: believe only what several perplexities and seeds show.",
        definition="A new fit at each drawn update, started from the one before and scaled to unit "
        "size; perplexity = (distinct agents - 1) / 3 within 1 to 30, or half or 1.7 times that, "
        f"and below the number of agents. At {_TSNE_UPDATES} updates at most.",
        parts=[
            Part(
                depends=("run", "network", "perplexity", "update"),
                draw=draw,
                updates=_tsne_updates(runs),
            ),
            colour_part(runs),
            chosen_part(),
        ],
        height=460,
    )


def _unit_size(position: np.ndarray) -> np.ndarray:
    finite = np.isfinite(position).all(axis=1)
    if not finite.any():
        return position
    centred = position - position[finite].mean(axis=0)
    size = float(np.sqrt((centred[finite] ** 2).sum(axis=1).mean()))
    return np.asarray(centred / size if size else centred)


def _unitless(extent: float, title: str) -> dict[str, Any]:
    axis = {"range": [-extent, extent], "showticklabels": False, "showgrid": False, "ticks": ""}
    return {
        "xaxis": axis | {"title": {"text": title}},
        "yaxis": axis | {"scaleanchor": "x"},
    }


def umap_panel(runs: Runs) -> Panel:
    """Draw UMAP.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        points = embedding(of, choices.network)
        if points is None or choices.update not in points["update"].to_numpy():
            return nothing(NOT_RECORDED)
        rows = points.sel(update=choices.update).to_numpy()
        if len(rows) < MIN_DISTINCT or not np.isfinite(rows).all():
            return nothing(f"UMAP needs at least {MIN_DISTINCT} agents with finite embeddings")
        position = _unit_size(
            of.once(("umap", choices.network, choices.update), lambda: umap(rows))
        )
        return {
            "data": [agent_trace(position, of.agents, 6.0)],
            "layout": _unitless(3.0, "UMAP (no units)")
            | {"meta": meta_of(of, choices, "", position)},
        }

    return Panel(
        name="umap",
        title="UMAP",
        reading="Shows who is next to whom; distances and gaps mean little.",
        definition="umap-learn at each drawn update, scaled to unit size.",
        parts=[
            Part(depends=PARTS, draw=draw, updates=_tsne_updates(runs)),
            colour_part(runs),
            chosen_part(),
        ],
        height=460,
    )


def seeds_panel(runs: Runs) -> Panel:
    """Draw t-SNE from several seeds, side by side.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        points = embedding(of, choices.network)
        if points is None or choices.update not in points["update"].to_numpy():
            return nothing(NOT_RECORDED)
        rows = points.sel(update=choices.update).to_numpy().astype(float)
        if not np.isfinite(rows).all() or len(np.unique(rows, axis=0)) < MIN_DISTINCT:
            return nothing(f"t-SNE needs at least {MIN_DISTINCT} distinct agents, all finite")
        key = ("seeds", choices.network, choices.update)
        found = of.once(key, lambda: [tsne_of_seed(rows, seed) for seed in range(SEEDS)])
        data, layout, titles = [], {}, []
        for seed, (position, trusted) in enumerate(found):
            axis = "" if seed == 0 else str(seed + 1)
            left, right = seed / SEEDS + 0.008, (seed + 1) / SEEDS - 0.008
            hidden = {
                "showticklabels": False,
                "ticks": "",
                "showgrid": False,
                "range": [-2.6, 2.6],
                "mirror": True,
            }
            layout[f"xaxis{axis}"] = hidden | {"domain": [left, right], "anchor": f"y{axis}"}
            layout[f"yaxis{axis}"] = hidden | {"anchor": f"x{axis}", "domain": [0, 0.9]}
            data.append(
                agent_trace(
                    _unit_size(position), of.agents, 5.2, xaxis=f"x{axis}", yaxis=f"y{axis}"
                )
            )
            kept = "" if np.isnan(trusted) else f", trust {trusted:.2f}"
            titles.append({
                "text": f"seed {seed}{kept}",
                "x": (left + right) / 2,
                "y": 0.91,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "center",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12},
            })
        distinct = len(np.unique(rows, axis=0))
        perplexity = f"perplexity {perplexity_for(distinct):.3g}"
        return {
            "data": data,
            "layout": layout
            | {
                "annotations": titles,
                "margin": {"l": 12, "r": 12, "t": 8, "b": 12},
                "meta": meta_of(of, choices, perplexity, found[0][0]),
            },
        }

    return Panel(
        name="tsne-seeds",
        title="t-SNE from five seeds",
        reading="What is not in all five is an accident of the start.",
        definition="scikit-learn's t-SNE from random starts at the usual perplexity. Trust: how "
        "far neighbours in the picture "
        "are neighbours among the rows, 1 at best (trustworthiness, Venna and Kaski, 2001). "
        "At the first and the last drawn update.",
        parts=[
            Part(
                depends=("run", "network", "update"),
                draw=draw,
                updates=updates_of(runs, _SEEDS_UPDATES),
            ),
            chosen_part(traces=SEEDS),
        ],
        height=300,
        wide=True,
    )
