"""The tab of embeddings: what tells agents apart, and what goes along with it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from analyses.curves import evenly_spaced
from analyses.embeddings import (
    MIN_DISTINCT,
    aligned,
    mds_path,
    pca,
    perplexity_for,
    tsne,
    tsne_of_seed,
    umap,
)
from dashboards.choices import Choices
from dashboards.colours import OKABE_ITO, Mark
from dashboards.interference_tab import agent_order, cursor_of
from dashboards.lines import NOT_RECORDED, line, lines_figure
from dashboards.matrices import matrix_figure, order_part, pair_part
from dashboards.panel import Figure, Panel, Part, Tab, earlier
from dashboards.points import (
    NEAREST,
    agent_trace,
    chosen_part,
    colour_part,
    hover_names,
    marker,
    nearest_figure,
    square,
)
from dashboards.style import QUIET, decimals, message, nothing, padded_range, rounded
from dashboards.tables import RunTables
from dashboards.text import for_plotly
from gradlab.extras import installed

Runs = Mapping[str, RunTables]

TAIL = 12  # past positions in a trail
PERPLEXITIES = {"default": 1.0, "low": 0.5, "high": 1.7}
COLOURS = ("agent", "kind", "goal", "behaviour cluster", "return")
SEEDS = 5
_MOST = 200  # updates that a projection is fitted to
_TSNE_UPDATES = 12
_SEEDS_UPDATES = 2
_PARTS = ("run", "network", "update")


def embeddings_tab(runs: Runs) -> Tab:
    """Lay out the tab.

    Args:
        runs: The runs by name.

    Returns:
        The tab.
    """
    panels = [
        _pca_panel(runs),
        _tsne_panel(runs),
        _mds_panel(runs),
        _trajectories_panel(runs),
        *([_umap_panel(runs)] if installed("umap") else []),
        _solid_panel(runs),
        _scree_panel(runs),
        _seeds_panel(runs),
        _distance_panel(runs),
        _neighbours_panel(runs),
        _against_panel(runs, "behaviour"),
        _against_panel(runs, "interference"),
        _ranks_panel(runs),
        _everyone_panel(runs),
    ]
    return Tab(
        name="embeddings",
        title="Embeddings",
        lead="What tells agents apart: learned embeddings, generated weights, ID columns or own "
        "weights, as the method has it. Trust principal components first.",
        panels=panels,
    )


def embedding(of: RunTables, network: str) -> xr.DataArray | None:
    """Read a network's rows at the updates that are drawn.

    Args:
        of: The run's.
        network: "actor" or "critic".

    Returns:
        Rows [update, agent, feature]; None if there are none.
    """
    name = f"embedding_{network}"

    def find() -> xr.DataArray | None:
        array = of.array(name, "agent", "feature")
        if array is None or array.sizes["agent"] != len(of.agents):
            return None
        return array.sel(update=evenly_spaced(of.updates(name), _MOST))

    return of.once(("embedding", network), find)


def updates_of(runs: Runs, most: int = _MOST) -> Any:  # noqa: ANN401 -- Callable[[Choices], list[int]]
    """List the updates at which embeddings are drawn, of whatever network.

    Args:
        runs: The runs by name.
        most: At most so many.

    Returns:
        A function from choices to updates.
    """

    def updates(choices: Choices) -> list[int]:
        of = runs[choices.run]

        def find() -> list[int]:
            networks = of.labels("network") or ("actor", "critic")
            found = [embedding(of, network) for network in networks]
            known = {u for rows in found if rows is not None for u in rows["update"].to_numpy()}
            return evenly_spaced(sorted(map(int, known)), most)

        return of.once(("updates of embeddings", most), find)

    return updates


def what(of: RunTables, network: str) -> str:
    """Say what the rows are.

    Args:
        of: The run's.
        network: "actor" or "critic".

    Returns:
        The recorded estimator.
    """
    points = embedding(of, network)
    return "" if points is None else str(points.attrs.get("estimator", ""))


def _projection(of: RunTables, network: str, components: int = 3) -> xr.Dataset | None:
    points = embedding(of, network)
    if points is None:
        return None
    return of.once(("pca", network), lambda: pca(points, components))


def _pca_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        projection = _projection(of, choices.network)
        if projection is None:
            return nothing(NOT_RECORDED)
        places = projection["update"].to_numpy().tolist()
        if choices.update not in places:
            return nothing("not recorded for this network")
        index = places.index(choices.update)
        position = projection["position"].to_numpy()[..., :2]
        ratio = projection["explained_variance_ratio"].to_numpy()
        x, y = square(*(padded_range(position[..., axis]) for axis in (0, 1)))
        still = bool(np.isnan(ratio).all() and np.isfinite(position).any())
        gone = not np.isfinite(position[index]).any()
        says = (
            message("no finite embedding")
            if gone
            else message("all agents are identical at every update", y=0.85)
            if still
            else []
        )
        shares = f"2 components: {np.nansum(ratio[:2]):.0%} of the variance"
        return {
            "data": [
                _trails(position[max(0, index + 1 - TAIL) : index + 1]),
                agent_trace(position[index], of.agents, x[1] - x[0]),
            ],
            "layout": _plane((x, y), (_component(1, ratio[0]), _component(2, ratio[1])))
            | {
                "annotations": says,
                "meta": _meta(of, choices, "" if still else shares, position[index]),
            },
        }

    return Panel(
        name="pca",
        title="Principal components",
        reading="Points close together: similar agents. Lines: where they were before.",
        definition="One principal component analysis of all drawn updates together, so that a "
        "point "
        "moves only when its agent's row does. Rows with a number that is not finite are left out.",
        parts=[
            Part(depends=_PARTS, draw=draw, updates=updates_of(runs)),
            colour_part(runs, before=1),
            chosen_part(before=1),
        ],
        height=460,
    )


def _meta(of: RunTables, choices: Choices, note: str, position: np.ndarray) -> dict[str, Any]:
    drawn = int(np.isfinite(position).all(1).sum())
    said = what(of, choices.network)
    return {
        "click": {"customdata": "agent"},
        "note": " · ".join(part for part in (said, note) if part),
        "alt": f"{drawn} agents as points; {said}; {note}",
    }


def _trails(tail: np.ndarray) -> dict[str, Any]:
    """Where agents were before [update, agent, 2], in one trace: thirty take ten times as long."""
    gaps = np.full((1, *tail.shape[1:]), np.nan)
    x, y = np.concatenate([tail, gaps]).transpose(2, 1, 0).reshape(2, -1)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": rounded(x),
        "y": rounded(y),
        "line": {"color": QUIET, "width": 1.2},
        "opacity": 0.6,
        "connectgaps": False,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _component(number: int, ratio: float) -> str:
    share = "no variance" if np.isnan(ratio) else f"{ratio:.1%} of variance"
    return f"component {number} ({share})"


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


def _tsne_panel(runs: Runs) -> Panel:
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
            | {"meta": _meta(of, choices, note, position)},
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


def _solid_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        projection = _projection(of, choices.network)
        if projection is None:
            return nothing(NOT_RECORDED)
        if choices.update not in projection["update"].to_numpy():
            return nothing("not recorded for this network")
        everywhere = projection["position"].to_numpy()
        position = projection["position"].sel(update=choices.update).to_numpy()
        ratio = projection["explained_variance_ratio"].to_numpy()
        axes = {
            f"{letter}axis": {
                "title": {"text": f"component {number + 1}", "font": {"size": 11}},
                "tickfont": {"size": 9},
                "nticks": 5,
                "range": padded_range(everywhere[..., number]),
            }
            for number, letter in enumerate("xyz")
        }
        return {
            "data": [
                {
                    "type": "scatter3d",
                    "mode": "markers+text",
                    **{axis: rounded(position[:, n]) for n, axis in enumerate("xyz")},
                    "text": [str(n) for n in range(len(position))],
                    "textfont": {"size": 10, "color": QUIET},
                    "customdata": list(range(len(position))),
                    "hovertext": hover_names(of.agents),
                    "hovertemplate": "%{hovertext}<extra></extra>",
                    "marker": marker(of.agents, size=6) | {"symbol": "circle"},
                    "showlegend": False,
                }
            ],
            "layout": {
                "scene": axes
                | {"aspectmode": "cube", "camera": {"eye": {"x": 1.5, "y": 1.5, "z": 0.9}}},
                "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
                "meta": _meta(
                    of, choices, f"3 components: {np.nansum(ratio):.0%} of the variance", position
                ),
            },
        }

    return Panel(
        name="pca-3d",
        title="Three principal components",
        reading="Drag to turn. As beside, with one direction more.",
        definition="The same analysis as for two components.",
        parts=[
            Part(depends=_PARTS, draw=draw, updates=updates_of(runs)),
            colour_part(runs, solid=True),
        ],
        height=460,
    )


def _distances(of: RunTables, network: str) -> np.ndarray | None:
    """Euclidean distances of the rows [update, agent, agent_other] at the drawn updates."""
    points = embedding(of, network)
    if points is None:
        return None

    def find() -> np.ndarray:
        rows = points.to_numpy().astype(float)
        apart = [np.linalg.norm(now[:, None] - now[None], axis=-1) for now in rows]
        return np.array(apart)

    return of.once(("distances", network), find)


def _at(of: RunTables, choices: Choices) -> int | None:
    """The place of an update among those of the rows."""
    points = embedding(of, choices.network)
    if points is None:
        return None
    known = points["update"].to_numpy().tolist()
    return known.index(choices.update) if choices.update in known else None


def _mds_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        distances, place = _distances(of, choices.network), _at(of, choices)
        if distances is None or place is None:
            return nothing(NOT_RECORDED)
        position, share = of.once(("mds", choices.network), lambda: mds_path(distances))
        if not np.isfinite(position[place]).all():
            return nothing("an embedding is not finite")
        layout, reach = unit_axes(position, "embedding distance")
        note = f"{np.nansum(share[place]):.0%} of squared distances"
        return {
            "data": [agent_trace(position[place], of.agents, reach)],
            "layout": layout | {"meta": _meta(of, choices, note, position[place])},
        }

    return Panel(
        name="mds",
        title="Classical scaling",
        reading="Distances in the plane come as near as they can to the embeddings' distances now.",
        definition="Classical multidimensional scaling (Torgerson, 1952) of the Euclidean "
        "distances "
        "at each update, turned by orthogonal Procrustes onto the update before so that points do "
        "not jump.",
        parts=[
            Part(depends=_PARTS, draw=draw, updates=updates_of(runs)),
            colour_part(runs),
            chosen_part(),
        ],
        height=460,
    )


def unit_axes(position: np.ndarray, unit: str) -> tuple[dict[str, Any], float]:
    """Make the axes of a plane whose directions mean nothing but whose distances do.

    Args:
        position: All that will ever be drawn [..., agent, 2].
        unit: What the distances are.

    Returns:
        Both axes, equally long; and their length.
    """
    x, y = square(*(padded_range(position[..., axis]) for axis in (0, 1)))
    return _plane((x, y), (unit, unit)), x[1] - x[0]


def _plane(ranges: tuple[list[float], list[float]], titles: tuple[str, str]) -> dict[str, Any]:
    """Make axes of one scale."""
    # Margins that follow the labels would change the scale, and so the labels: plotly draws anew.
    x, y = (
        {"title": {"text": title}, "range": of, "automargin": False}
        for of, title in zip(ranges, titles, strict=True)
    )
    return {
        "xaxis": x,
        "yaxis": y | {"scaleanchor": "x"},
        "margin": {"l": 72, "r": 16, "t": 12, "b": 56},
    }


def _umap_panel(runs: Runs) -> Panel:
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
            | {"meta": _meta(of, choices, "", position)},
        }

    return Panel(
        name="umap",
        title="UMAP",
        reading="Shows who is next to whom; distances and gaps mean little.",
        definition="umap-learn at each drawn update, scaled to unit size.",
        parts=[
            Part(depends=_PARTS, draw=draw, updates=_tsne_updates(runs)),
            colour_part(runs),
            chosen_part(),
        ],
        height=460,
    )


def _trajectories_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        points = embedding(of, choices.network)
        if points is None:
            return nothing(NOT_RECORDED)
        turned, residual = of.once(("aligned", choices.network), lambda: aligned(points))
        if not turned.size:
            return nothing("no update has finite embeddings of all agents")
        found = of.once(("aligned pca", choices.network), lambda: pca(turned))
        position = found["position"].to_numpy()
        ratio = found["explained_variance_ratio"].to_numpy()
        x, y = square(*(padded_range(position[..., axis]) for axis in (0, 1)))
        ends = [
            agent_trace(position[0], of.agents)
            | {"marker": marker(of.agents, 8) | {"symbol": "circle-open"}},
            agent_trace(position[-1], of.agents, x[1] - x[0]),
        ]
        ways = [
            _trails(position[:, [agent]]) | {"line": {"color": mark.colour, "width": 1.5}}
            for agent, mark in enumerate(of.agents)
        ]
        known = residual[np.isfinite(residual)]
        mean = known.mean() if known.size else 0.0
        return {
            "data": [*ways, *ends],
            "layout": _plane((x, y), (_component(1, ratio[0]), _component(2, ratio[1])))
            | {
                "meta": _meta(of, choices, f"mean residual of a turn {mean:.2g}", position[-1]),
            },
        }

    return Panel(
        name="trajectories",
        title="Ways through training",
        reading="From the open circle to the filled mark. What is left here is change of the "
        "arrangement: common turns and shifts are taken out.",
        definition="Each drawn update's rows turned and shifted (orthogonal Procrustes) onto the "
        "one "
        "before, then one principal component analysis of all. Residual: the squared change that "
        "no turn explains, over the squared extent.",
        parts=[Part(depends=("run", "network"), draw=draw)],
        height=460,
    )


def _scree_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        points = embedding(of, choices.network)
        if points is None:
            return nothing(NOT_RECORDED)
        most = min(10, points.sizes["feature"], points.sizes["agent"] * points.sizes["update"])
        found = of.once(("scree", choices.network), lambda: pca(points, most))
        ratio = found["explained_variance_ratio"].to_numpy()
        if np.isnan(ratio).all():
            return nothing("all agents are identical at every update: there is no variance")
        numbers = list(range(1, most + 1))
        return {
            "data": [
                {
                    "type": "bar",
                    "x": numbers,
                    "y": decimals(ratio, 4),
                    "name": "one component",
                    "marker": {"color": OKABE_ITO[0]},
                    "hovertemplate": "component %{x}: %{y:.1%}<extra></extra>",
                },
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": numbers,
                    "y": decimals(np.cumsum(ratio), 4),
                    "name": "up to here",
                    "line": {"color": OKABE_ITO[1]},
                    "hovertemplate": "up to %{x}: %{y:.1%}<extra></extra>",
                },
            ],
            "layout": {
                "xaxis": {"title": {"text": "principal component"}, "dtick": 1, "showgrid": False},
                "yaxis": {
                    "title": {"text": "share of variance"},
                    "range": [0, 1.03],
                    "tickformat": ".0%",
                },
                "meta": {
                    "note": what(of, choices.network),
                    "alt": f"Explained variance: {', '.join(f'{r:.1%}' for r in ratio)}",
                },
            },
        }

    return Panel(
        name="scree",
        title="Explained variance",
        reading="If the line is low at 2, the plane shows little of how agents differ.",
        definition="Shares of the variance over agents and drawn updates, by principal component.",
        parts=[Part(depends=("run", "network"), draw=draw)],
    )


def _seeds_panel(runs: Runs) -> Panel:
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
                "meta": _meta(of, choices, perplexity, found[0][0]),
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


def _distance_panel(runs: Runs) -> Panel:
    def order(choices: Choices) -> list[int]:
        return agent_order(runs[choices.run], choices.order)

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        distances, place = _distances(of, choices.network), _at(of, choices)
        if distances is None or place is None:
            return nothing(NOT_RECORDED)
        end = float(np.nanmax(distances, initial=0.0, where=np.isfinite(distances))) or 1.0
        return matrix_figure(
            distances[place],
            of.agents,
            unit="distance",
            limits=(0.0, end),
            diverging=False,
            empty="no finite embedding",
        )

    return Panel(
        name="embedding-distance",
        title="Distances",
        reading="Blue: near; yellow: far. The scale holds for the whole training.",
        definition="Euclidean distance of the agents' rows, in units of the rows.",
        parts=[
            Part(depends=_PARTS, draw=draw, updates=updates_of(runs)),
            order_part(order),
            pair_part(order),
        ],
        height=460,
    )


def _neighbours_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        distances, place = _distances(of, choices.network), _at(of, choices)
        if distances is None or place is None:
            return nothing(NOT_RECORDED)
        if choices.agent >= len(of.agents) or len(of.agents) < 2:
            return nothing("no other agent")
        row = distances[place][choices.agent]
        return nearest_figure(row, choices.agent, of.agents, "embedding distance")

    return Panel(
        name="neighbours",
        title="Nearest neighbours of the chosen agent",
        reading="The shortest bar is the most similar agent. Click one to pair it with the chosen.",
        definition=f"Euclidean distances of the rows themselves, not of a projection; {NEAREST} "
        "at most.",
        parts=[
            Part(depends=("run", "network", "agent", "update"), draw=draw, updates=updates_of(runs))
        ],
        height=460,
    )


_AGAINST = {
    "behaviour": (
        "Embeddings against behaviour",
        "Rising: agents with distant embeddings act differently.",
        "behavioural distance",
        "behavioural_distance",
    ),
    "interference": (
        "Embeddings against interference",
        "Falling: agents with near embeddings have aligned gradients.",
        "cosine of g",
        "interference",
    ),
}


def _against_panel(runs: Runs, kind: str) -> Panel:
    title, reading, unit, compared = _AGAINST[kind]

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"update": choices.update}
        distance = of.values("embedding_distance", **where, network=choices.network)
        if kind == "behaviour":
            other = of.values("behavioural_distance", **where)
        else:
            cosine = {**where, "network": choices.network, "space": "psi", "layer": "all"}
            debiased = of.array("cosine_debiased") is not None
            other = of.values("cosine_debiased" if debiased else "cosine", **cosine)
        if distance is None or other is None or not of.pairs:
            return nothing(NOT_RECORDED if of.pairs else "no two agents")
        rows, columns = np.array(of.pairs).T
        x, y = distance[rows, columns], other[rows, columns]
        mantel = {
            name: of.values(
                name,
                **where,
                network=choices.network,
                compared_with=compared,
                correlation="pearson",
            )
            for name in ("mantel", "mantel_p_value")
        }
        r, p = (np.nan if v is None else float(v) for v in mantel.values())
        said = "Mantel's r undefined" if np.isnan(r) else f"Mantel's r {r:+.2f}, p {p:.3f}"
        known = np.isfinite(x) & np.isfinite(y)
        return {
            "data": [
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": rounded(x),
                    "y": decimals(y),
                    "customdata": [list(pair) for pair in of.pairs],
                    "hovertemplate": "agents %{customdata[0]} and %{customdata[1]}<br>"
                    f"distance %{{x:.3g}}, {unit} %{{y:.3f}}<extra></extra>",
                    "marker": {
                        "size": 6 if len(x) > 60 else 10,
                        "color": OKABE_ITO[0],
                        "opacity": 0.7,
                    },
                    "showlegend": False,
                }
            ],
            "layout": {
                "xaxis": {"title": {"text": "embedding distance"}, "rangemode": "tozero"},
                "yaxis": {"title": {"text": unit}},
                "annotations": []
                if known.any()
                else message(
                    "undefined: gradients do not stand out from noise, or rows are not finite"
                ),
                "meta": {
                    "click": {"customdata": ["agent", "other"]},
                    "note": said,
                    "alt": f"{unit} over embedding distance of {int(known.sum())} pairs; {said}",
                },
            },
        }

    return Panel(
        name=f"embedding-{kind}",
        title=title,
        reading=reading,
        definition="One point for each pair of agents. Mantel's r: Pearson's correlation over "
        "pairs; "
        "p: share of arrangements of the agents with at least that correlation, two-sided. Few "
        "agents have few arrangements: with three no p is below 1/6. Recorded with --diagnostics "
        "full, every --effects-every updates.",
        parts=[
            Part(
                depends=_PARTS,
                draw=draw,
                updates=lambda choices: _common(
                    runs[choices.run],
                    "embedding_distance",
                    "behavioural_distance" if kind == "behaviour" else "cosine",
                ),
            )
        ],
    )


def _common(of: RunTables, *quantities: str) -> list[int]:
    arrays = [of.array(quantity) for quantity in quantities]
    if any(array is None for array in arrays):
        return []
    known = set.intersection(
        *(set(a["update"].to_numpy().tolist()) for a in arrays if a is not None)
    )
    if not known:
        return []
    ordered = sorted(known)
    return sorted({earlier(ordered, stop) for stop in of.stops if stop >= ordered[0]})


def _ranks_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        names = {
            "effective_rank": ("effective rank", OKABE_ITO[0], "solid"),
            "participation_ratio": ("participation ratio", OKABE_ITO[1], "solid"),
            "rank_ceiling": ("ceiling: agents or features", QUIET, "dot"),
        }
        lines = [
            line(of, name, Mark(label, colour, ""), where={"network": choices.network}, dash=dash)
            for name, (label, colour, dash) in names.items()
        ]
        return lines_figure(
            [one for one in lines if one],
            {"title": {"text": "dimensions"}, "rangemode": "tozero"},
            empty=NOT_RECORDED,
        )

    return Panel(
        name="ranks",
        title="In how many directions agents differ",
        reading="Near 1: agents lie on a line; near the ceiling: each has a direction of its own.",
        definition="Effective rank exp(entropy) and participation ratio of the rows' covariance; "
        "few agents make both smaller.",
        parts=[Part(depends=("run", "network"), draw=draw), cursor_of(runs)],
    )


def _everyone_panel(runs: Runs) -> Panel:
    columns = min(4, len(runs))
    shown = list(runs.values())[:12]
    rows = -(-len(shown) // columns)

    def draw(choices: Choices) -> Figure:
        data, layout, titles = [], {}, []
        for number, of in enumerate(shown):
            axis = "" if number == 0 else str(number + 1)
            row, column = divmod(number, columns)
            left, right = column / columns + 0.01, (column + 1) / columns - 0.01
            top, bottom = 1 - row / rows, 1 - (row + 1) / rows
            hidden = {"showticklabels": False, "ticks": "", "showgrid": False, "mirror": True}
            projection = _projection(of, choices.network)
            position = (
                np.full((len(of.agents), 2), np.nan)
                if projection is None
                else projection["position"].to_numpy()[-1, :, :2]
            )
            x, y = square(*(padded_range(position[:, n]) for n in (0, 1)))
            layout[f"xaxis{axis}"] = hidden | {
                "domain": [left, right],
                "anchor": f"y{axis}",
                "range": x,
            }
            layout[f"yaxis{axis}"] = hidden | {
                "domain": [bottom + 0.01, top - 0.16 / rows],
                "anchor": f"x{axis}",
                "range": y,
            }
            data.append(
                agent_trace(position, of.agents, x[1] - x[0], xaxis=f"x{axis}", yaxis=f"y{axis}")
            )
            rows_are = for_plotly(what(of, choices.network) or "not recorded", 44)
            titles.append({
                "text": f"{for_plotly(of.mark.label, 30)}<br><i>{rows_are}</i>",
                "x": (left + right) / 2,
                "y": top - 0.15 / rows,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "center",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 11},
            })
        return {
            "data": data,
            "layout": layout
            | {
                "annotations": titles,
                "margin": {"l": 12, "r": 12, "t": 8, "b": 12},
                "meta": {
                    "click": {"customdata": "agent"},
                    "note": f"{len(shown)} of {len(runs)} runs" if len(shown) < len(runs) else "",
                    "alt": "Agents of every run by their first two principal components.",
                },
            },
        }

    return Panel(
        name="embeddings-runs",
        title="Every run's agents at its last update",
        reading="Compare how the agents are arranged, not the scale: methods tell agents apart by "
        "different things.",
        definition="The first two principal components of each run's own analysis.",
        parts=[Part(depends=("network",), draw=draw), chosen_part(traces=len(shown))],
        height=60 + 240 * rows,
        wide=True,
    )
