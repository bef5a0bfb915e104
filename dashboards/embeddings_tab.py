"""The tab of embeddings: what tells agents apart, and what goes along with it."""

import numpy as np

from dashboards.choices import Choices
from dashboards.colours import OKABE_ITO, Mark
from dashboards.embedding_planes import (
    everyone_panel,
    mds_panel,
    pca_panel,
    scree_panel,
    solid_panel,
    trajectories_panel,
)
from dashboards.embedding_rows import PARTS, distances_of, place_of, updates_of
from dashboards.lines import NOT_RECORDED, cursor_of, line, lines_figure
from dashboards.matrices import matrix_figure, order_part, pair_part
from dashboards.neighbour_maps import seeds_panel, tsne_panel, umap_panel
from dashboards.panel import Figure, Panel, Part, Tab, earlier
from dashboards.points import (
    NEAREST,
    nearest_figure,
)
from dashboards.similar_agents import agent_order
from dashboards.style import QUIET, decimals, message, nothing, rounded
from dashboards.tables import Runs, RunTables
from gradlab.extras import installed

COLOURS = ("agent", "kind", "goal", "behaviour cluster", "return")
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


def embeddings_tab(runs: Runs) -> Tab:
    """Lay out the tab.

    Args:
        runs: The runs by name.

    Returns:
        The tab.
    """
    panels = [
        pca_panel(runs),
        tsne_panel(runs),
        mds_panel(runs),
        trajectories_panel(runs),
        *([umap_panel(runs)] if installed("umap") else []),
        solid_panel(runs),
        scree_panel(runs),
        seeds_panel(runs),
        _distance_panel(runs),
        _neighbours_panel(runs),
        _against_panel(runs, "behaviour"),
        _against_panel(runs, "interference"),
        _ranks_panel(runs),
        everyone_panel(runs),
    ]
    return Tab(
        name="embeddings",
        title="Embeddings",
        lead="What tells agents apart: learned embeddings, generated weights, ID columns or own "
        "weights, as the method has it. Trust principal components first.",
        panels=panels,
    )


def _distance_panel(runs: Runs) -> Panel:
    def order(choices: Choices) -> list[int]:
        return agent_order(runs[choices.run], choices.order)

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        distances, place = distances_of(of, choices.network), place_of(of, choices)
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
            Part(depends=PARTS, draw=draw, updates=updates_of(runs)),
            order_part(order),
            pair_part(order),
        ],
        height=460,
    )


def _neighbours_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        distances, place = distances_of(of, choices.network), place_of(of, choices)
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
                depends=PARTS,
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
