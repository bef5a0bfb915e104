"""The tab of interference: which agents' gradients point against each other."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import dendrogram

from analyses.similarity import similarity_order, similarity_tree
from dashboards.choices import Choices
from dashboards.colours import DIVERGING, OKABE_ITO, SEQUENTIAL, Mark
from dashboards.lines import NOT_RECORDED, Line, cursor, curve, line, lines_figure
from dashboards.matrices import matrix_figure, order_part, pair_part
from dashboards.panel import Figure, Panel, Part, Tab
from dashboards.style import QUIET, decimals, horizontal, message, nothing, rounded, whole
from dashboards.tables import RunTables
from dashboards.text import for_plotly
from gradlab.estimates import ALIGNED, CONFLICT, UNDECIDED

Runs = Mapping[str, RunTables]

_G, _Z, _COUPLED = OKABE_ITO[0], OKABE_ITO[1], OKABE_ITO[2]
_FOREST = 14  # pairs whose intervals have room
_SPACES = {"psi": "g", "theta": "Z"}
_NO_LAYER = (
    "undefined: this space of this network has no such layer, all of its gradients are zero, "
    "or none stands out from noise"
)
_ESTIMATE = (
    "Debiased: the true gradients' cosine, blank where a gradient's length does not stand out from "
    "noise; plug-in: of this batch, pulled towards 0 by noise. Faded: noise leaves undecided "
    "whether the pair is in conflict or aligned. Grey: undefined."
)
_COSINES = {
    "psi": (
        "cosine-g",
        "Cosine of g, after sharing",
        "Below 0 (red): the two agents' gradients point against each other. This is what the "
        "trained parameters get to feel.",
        "gᵢ = Jᵢᵀ Zᵢ: agent i's gradient with respect to the trained parameters ψ. ",
    ),
    "theta": (
        "cosine-z",
        "Cosine of Z, before sharing",
        "Below 0 (red): the two agents want opposite changes of a policy, whatever is shared.",
        "Zᵢ: agent i's gradient with respect to its policy's parameters θ. ",
    ),
}
_ZEROS = (
    " 0*: a structural zero; agents without shared parameters cannot interfere, so these zeros are "
    "no measurement."
)


def interference_tab(runs: Runs) -> Tab:
    """Lay out the tab.

    Args:
        runs: The runs by name.

    Returns:
        The tab.
    """
    panels = [
        *(_cosine_panel(runs, space) for space in _COSINES),
        _coupling_panel(runs),
        _transference_panel(runs),
        _history_panel(runs),
        _passing_panel(runs),
        _forest_panel(runs),
        _layers_panel(runs),
        _verdicts_panel(runs),
        _cancelled_panel(runs),
        _aggregation_panel(runs),
        _tree_panel(runs),
    ]
    return Tab(
        name="interference",
        title="Interference",
        lead="Which agents' gradients point against each other, how much of it is real, and what "
        "sharing lets through. A pair that is clicked is shown in all panels.",
        panels=panels,
    )


def structural(of: RunTables, network: str, space: str) -> bool:
    """Tell whether agents of a network share nothing that is trained.

    Args:
        of: The run's.
        network: "actor" or "critic".
        space: "psi" or "theta".

    Returns:
        Whether their cosines are zero whatever they want.
    """
    alone = of.run.method_of(network) == "nops"
    settings = of.run.config.get("network", {})
    shared = isinstance(settings, dict) and settings.get("log_std") == "shared"
    return space == "psi" and alone and not (shared and network == "actor")


def agent_order(of: RunTables, order: str) -> list[int]:
    """Order a run's agents.

    Args:
        of: The run's.
        order: "number", or "similarity" of what they want, by the mean cosine of Z over training.

    Returns:
        Their numbers.
    """
    if order == "similarity":
        distance = _wishes(of)
        if distance is not None:
            return of.once("order", lambda: similarity_order(distance))
    return list(range(len(of.agents)))


def _wishes(of: RunTables) -> np.ndarray | None:
    """1 less the mean over training of the cosine of Z."""

    def find() -> np.ndarray | None:
        networks = of.labels("network")
        if not networks or not of.pairs:
            return None
        cosine = of.values("cosine", network=networks[0], space="theta", layer="all")
        if cosine is None:
            return None
        known = np.isfinite(cosine).sum(0)
        return np.asarray(1 - np.nansum(cosine, 0) / np.maximum(known, 1))

    return of.once("wishes", find)


def _matrix_parts(runs: Runs, quantity: str, first: Any, depends: tuple[str, ...]) -> list[Part]:  # noqa: ANN401
    def order(choices: Choices) -> list[int]:
        return agent_order(runs[choices.run], choices.order)

    return [
        Part(
            depends=("run", *depends, "update"),
            draw=first,
            updates=lambda choices: runs[choices.run].updates(quantity),
        ),
        order_part(order),
        pair_part(order),
    ]


def _cosine_panel(runs: Runs, space: str) -> Panel:
    name, title, reading, definition = _COSINES[space]

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {
            "update": choices.update,
            "network": choices.network,
            "space": space,
            "layer": choices.layer,
        }
        if of.array("cosine") is None:
            return nothing(NOT_RECORDED)
        debiased = choices.estimate == "debiased" and of.array("cosine_debiased") is not None
        values = of.values("cosine_debiased" if debiased else "cosine", **where)
        if values is None:
            return nothing(_NO_LAYER)
        if debiased:
            values = values.copy()
            np.fill_diagonal(values, np.where(np.isnan(np.diag(values)), np.nan, 1.0))
        verdict = of.values("verdict", **where)
        return matrix_figure(
            values,
            of.agents,
            unit="cosine",
            limits=(-1.0, 1.0),
            diverging=True,
            faded=None if verdict is None else verdict == UNDECIDED,
            structural_zeros=structural(of, choices.network, space),
            empty=_NO_LAYER,
        )

    return Panel(
        name=name,
        title=title,
        reading=reading,
        definition=definition + _ESTIMATE + (_ZEROS if space == "psi" else ""),
        parts=_matrix_parts(runs, "cosine", draw, ("network", "layer", "estimate")),
        height=460,
    )


def _coupling_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"update": choices.update, "network": choices.network}
        values = of.values("coupling", **where, layer=choices.layer)
        if values is None:
            known = of.array("coupling") is not None
            return nothing(_NO_LAYER if known else _NO_COUPLING)
        return matrix_figure(
            values,
            of.agents,
            unit="coupling",
            limits=(-1.0, 1.0),
            diverging=True,
            structural_zeros=structural(of, choices.network, "psi"),
            empty=_NO_LAYER,
        )

    return Panel(
        name="coupling",
        title="Coupling",
        reading="1: whatever one agent wants is done to the other as well; 0: the two are kept "
        "apart.",
        definition="Kᵢₖ = Jᵢ Jₖᵀ: normalised trace, in closed form. Full sharing is 1 for all "
        "pairs, no sharing 0. Recorded with --diagnostics full, every --effects-every updates."
        + _ZEROS,
        parts=_matrix_parts(runs, "coupling", draw, ("network", "layer")),
        height=460,
    )


_NO_COUPLING = (
    "not recorded: the run was made without --diagnostics full, is not that far yet, or its "
    "generator has no coupling in closed form"
)


def _transference_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        values = of.values("transference", update=choices.update, network=choices.network)
        if values is None:
            return nothing(NOT_RECORDED)
        everything = of.values("transference", network=choices.network)
        known = np.abs(everything[np.isfinite(everything)]) if everything is not None else values
        # One agent's own step dwarfs others: the scale ends where most of them are.
        end = float(np.quantile(known, 0.95)) if known.size else 1.0
        return matrix_figure(
            -values,
            of.agents,
            unit="fall of the other's loss",
            limits=(-(end or 1e-12), end or 1e-12),
            diverging=True,
            empty=NOT_RECORDED,
            form=".1e",
            rows="agent that steps",
            columns="agent whose loss changes",
        )

    return Panel(
        name="transference",
        title="Transference",
        reading="Red: a step along the row agent's gradient makes the column agent's loss worse; "
        "blue: better.",
        definition="Fall of the column agent's held-out loss after one step along the row agent's "
        "own gradient, so minus the recorded transference, in units of the loss; of whole "
        "networks. "
        "The scale ends at the 95th percentile over training. Recorded with --diagnostics full, "
        "every --effects-every updates.",
        parts=_matrix_parts(runs, "transference", draw, ("network",)),
        height=460,
    )


def _history_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        if of.array("cosine") is None:
            return nothing(NOT_RECORDED)
        if choices.other >= len(of.agents) or choices.agent == choices.other:
            return nothing("choose two different agents")
        networks, layers = len(of.labels("network")), len(of.labels("layer"))
        numbers = max(1, len(of.pairs) * networks * layers * 7)
        most = int(np.clip(of.limits.history // numbers, 20, of.limits.points))
        lines = []
        pair = {"agent": choices.agent, "agent_other": choices.other}
        place = {"network": choices.network, "layer": choices.layer} | pair
        for space, colour in (("psi", _G), ("theta", _Z)):
            where = place | {"space": space}
            lines += _cosine_lines(of, where, f"cosine of {_SPACES[space]}", colour, most)
        found = line(
            of, "coupling", Mark("coupling", _COUPLED, ""), where=place, dash="dot", most=most
        )
        lines += [found] if found else []
        return lines_figure(
            lines,
            {"title": {"text": "cosine, coupling"}, "range": [-1.05, 1.05]},
            reference=0.0,
            empty="undefined for this pair here",
            note=f"agents {choices.agent} and {choices.other}",
        )

    return Panel(
        name="pair-history",
        title="The chosen pair over training",
        reading="Where a band lies below 0, the two agents are in conflict. g near Z: sharing "
        "passes on what they want; g near 0: it keeps them apart.",
        definition="Debiased cosines of the two agents' g and Z with 95 % intervals, plug-in "
        "cosines "
        "where they are all there is, and the coupling. Fewer points are drawn where there are "
        "many pairs: the run folder holds them all.",
        parts=[
            Part(depends=("run", "network", "layer", "agent", "other"), draw=draw, symmetric=True),
            cursor(lambda choices: [runs[choices.run]], of_run=True),
        ],
    )


def _cosine_lines(
    of: RunTables, where: dict[str, Any], label: str, colour: str, most: int
) -> list[Line]:
    ends = {"low": of.values("cosine_low", **where), "high": of.values("cosine_high", **where)}
    quantity = "cosine_debiased" if ends["low"] is not None else "cosine"
    values, array = of.values(quantity, **where), of.array(quantity)
    if values is None or array is None:
        return []
    mark = Mark(label, colour, "")
    return [curve(of, array["update"].to_numpy(), values, mark, most=most, **ends)]


def _passing_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        debiased = choices.estimate == "debiased" and of.array("cosine_debiased") is not None
        quantity = "cosine_debiased" if debiased else "cosine"
        where = {"update": choices.update, "network": choices.network, "layer": choices.layer}
        z, g = (of.values(quantity, **where, space=space) for space in ("theta", "psi"))
        if z is None or g is None or not of.pairs:
            return nothing(NOT_RECORDED if of.array("cosine") is None else "no two agents")
        rows, columns = np.array(of.pairs).T
        x, y = z[rows, columns], g[rows, columns]
        verdict = of.values("verdict", **where, space="psi")
        decided = np.ones(len(x), bool) if verdict is None else verdict[rows, columns] != UNDECIDED
        found = np.isfinite(x) & np.isfinite(y)
        line_ = {"color": QUIET, "width": 1, "dash": "dot"}
        shapes = [
            {"type": "line", "x0": -1, "x1": 1, "y0": slope * -1, "y1": slope, "line": line_}
            for slope in (0, 1)
        ]
        many = len(x) > 60
        return {
            "data": [
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": decimals(x, 2 if many else 3),
                    "y": decimals(y, 2 if many else 3),
                    "customdata": [list(pair) for pair in of.pairs],
                    "hovertemplate": "agents %{customdata[0]} and %{customdata[1]}<br>cosine of Z "
                    "%{x:.3f}, of g %{y:.3f}<extra></extra>",
                    "marker": {
                        "size": 6 if many else 10,
                        "color": [_G if d else "rgba(127,127,127,0.45)" for d in decided.tolist()],
                    },
                    "showlegend": False,
                }
            ],
            "layout": {
                "xaxis": {
                    "title": {"text": "cosine of Z (what they want)"},
                    "range": [-1.05, 1.05],
                },
                "yaxis": {"title": {"text": "cosine of g (what is felt)"}, "range": [-1.05, 1.05]},
                "shapes": shapes,
                "annotations": [] if found.any() else message(_NO_LAYER),
                "meta": {
                    "click": {"customdata": ["agent", "other"]},
                    "alt": f"Cosine of g over cosine of Z of {int(found.sum())} pairs.",
                },
            },
        }

    return Panel(
        name="passing",
        title="What sharing lets through",
        reading="A pair on the diagonal feels all of what its agents want; one on the horizontal "
        "line is kept apart.",
        definition="One point for each pair of agents: the cosine after sharing (g) over the "
        "cosine before (Z). Grey: undecided in g.",
        parts=[
            Part(
                depends=("run", "network", "layer", "estimate", "update"),
                draw=draw,
                updates=lambda choices: runs[choices.run].updates("cosine"),
            )
        ],
    )


def _forest_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {
            "update": choices.update,
            "network": choices.network,
            "layer": choices.layer,
            "space": choices.space,
        }
        names = ("cosine_debiased", "cosine_low", "cosine_high", "verdict")
        found = [of.values(name, **where) for name in names]
        if any(matrix is None for matrix in found) or not of.pairs:
            return nothing(_NO_INTERVALS)
        rows, columns = np.array(of.pairs).T
        value, low, high, verdict = (m[rows, columns] for m in found if m is not None)
        known = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
        if not known.size:
            return nothing(_NO_LAYER)
        # Conflict first, by how sure it is.
        kept = known[np.argsort(high[known], kind="stable")][:_FOREST]
        middle = np.where(np.isfinite(value), value, (low + high) / 2)[kept]
        colours = {CONFLICT: OKABE_ITO[3], ALIGNED: OKABE_ITO[0]}
        labels = [f"{rows[n]}, {columns[n]}" for n in kept]
        return {
            "data": [
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": decimals(middle),
                    "y": labels,
                    "error_x": {
                        "type": "data",
                        "symmetric": False,
                        "array": decimals(high[kept] - middle),
                        "arrayminus": decimals(middle - low[kept]),
                        "color": QUIET,
                        "thickness": 1.5,
                        "width": 4,
                    },
                    "customdata": [[int(rows[n]), int(columns[n])] for n in kept],
                    "hovertemplate": "agents %{y}: cosine %{x:.3f}<extra></extra>",
                    "marker": {
                        "size": 10,
                        "color": [colours.get(float(verdict[n]), QUIET) for n in kept],
                        "symbol": [
                            "circle" if np.isfinite(value[n]) else "line-ns-open" for n in kept
                        ],
                    },
                    "showlegend": False,
                }
            ],
            "layout": {
                "xaxis": {
                    "title": {"text": f"cosine of {_SPACES[choices.space]}"},
                    "range": [-1.05, 1.05],
                },
                "yaxis": {
                    "type": "category",
                    "title": {"text": "pair of agents"},
                    "autorange": "reversed",
                    "showgrid": False,
                },
                "shapes": [_vertical_zero()],
                "meta": {
                    "click": {"customdata": ["agent", "other"]},
                    "alt": f"The {len(kept)} pairs nearest to conflict, of {len(of.pairs)}: "
                    + ", ".join(labels),
                    "note": f"{len(kept)} of {len(of.pairs)} pairs",
                },
            },
        }

    return Panel(
        name="pairs",
        title="The pairs nearest to conflict",
        reading="Red-brown: in conflict; blue: aligned; grey: noise leaves it undecided.",
        definition="Debiased cosine with 95 % interval, sorted by the interval's upper end; a dash "
        "stands in the middle of an interval whose cosine is not known. Verdicts are at 5 % false "
        "discoveries over all pairs, so an interval that just misses 0 may still be undecided.",
        parts=[
            Part(
                depends=("run", "network", "layer", "space", "update"),
                draw=draw,
                updates=lambda choices: runs[choices.run].updates("verdict"),
            )
        ],
    )


_NO_INTERVALS = (
    "no intervals: they need --diagnostics full, at least 8 environment copies and two agents"
)


def _vertical_zero() -> dict[str, Any]:
    along = horizontal(0.0)
    return {
        "type": "line",
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "x0": 0,
        "x1": 0,
        "line": along["line"],
    }


def _layers_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        judged = of.array("conflict_rate") is not None
        quantity = "conflict_rate" if judged else "mean_cosine"
        values = of.values(quantity, network=choices.network, space=choices.space)
        array = of.array(quantity)
        if values is None or array is None:
            return nothing(NOT_RECORDED)
        layers = [str(layer) for layer in array["layer"].to_numpy()]
        updates = array["update"].to_numpy()
        kept = np.isin(updates, of.updates(quantity))
        drawn = np.isfinite(values).any(0)
        if not drawn.any():
            return nothing(_NO_LAYER)
        return {
            "data": [
                {
                    "type": "heatmap",
                    "z": decimals(values[kept][:, drawn].T),
                    "x": whole(of.frames_at(updates[kept])),
                    "y": [for_plotly(name) for name, on in zip(layers, drawn, strict=True) if on],
                    "customdata": [whole(updates[kept])] * int(drawn.sum()),
                    "zmin": 0 if judged else -1,
                    "zmax": 1,
                    "colorscale": [list(s) for s in (SEQUENTIAL if judged else DIVERGING)],
                    "colorbar": {
                        "title": {
                            "text": "share in conflict" if judged else "mean cosine",
                            "side": "right",
                        },
                        "thickness": 12,
                        "outlinewidth": 0,
                    },
                    "hovertemplate": "%{y} at %{x:,} frames (update %{customdata}): %{z:.3f}"
                    "<extra></extra>",
                    "hoverongaps": False,
                }
            ],
            "layout": {
                "xaxis": {
                    "title": {"text": "environment frames"},
                    "exponentformat": "SI",
                    "showgrid": False,
                },
                "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
                "margin": {"l": 90},
                "meta": {
                    "click": {"y": "layer", "customdata": "update"},
                    "alt": f"{quantity.replace('_', ' ')} by layer over training.",
                },
            },
        }

    return Panel(
        name="conflict-layers",
        title="Conflict by layer over training",
        reading="Yellow: many pairs of agents in conflict there and then. Click a cell to go "
        "there.",
        definition="Share of agent pairs with the verdict conflict, of the chosen space; the mean "
        "plug-in cosine where there are no verdicts.",
        parts=[Part(depends=("run", "network", "space"), draw=draw), cursor_of(runs)],
    )


def cursor_of(runs: Runs) -> Part:
    """Mark the slider's update in a panel of one run.

    Args:
        runs: The runs by name.

    Returns:
        A part for a panel over environment frames.
    """
    return cursor(lambda choices: [runs[choices.run]], of_run=True)


def _verdicts_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"network": choices.network, "space": choices.space, "layer": choices.layer}
        conflict, aligned = (of.values(f"{name}_rate", **where) for name in ("conflict", "aligned"))
        array = of.array("conflict_rate")
        if conflict is None or aligned is None or array is None:
            return nothing(_NO_INTERVALS)
        updates = array["update"].to_numpy()
        kept = (
            np
            .linspace(0, len(updates) - 1, min(len(updates), of.limits.points))
            .round()
            .astype(int)
        )
        x = whole(of.frames_at(updates[kept]))
        shares = {
            "conflict": (conflict, OKABE_ITO[3]),
            "undecided": (1 - conflict - aligned, "#a9b0b8"),
            "aligned": (aligned, OKABE_ITO[0]),
        }
        traces = [
            {
                "type": "scatter",
                "x": x,
                "y": decimals(values[kept]),
                "customdata": whole(updates[kept]),
                "name": name,
                "mode": "lines" if len(x) > 1 else "markers",
                "line": {"width": 0.5, "color": colour},
                "fillcolor": colour,
                "stackgroup": "verdict",
                "hovertemplate": "%{y:.0%} at %{x:,} frames (update %{customdata})<extra>"
                f"{name}</extra>",
            }
            for name, (values, colour) in shares.items()
        ]
        found = np.isfinite(conflict).any()
        return {
            "data": traces,
            "layout": {
                "xaxis": {
                    "title": {"text": "environment frames"},
                    "exponentformat": "SI",
                    "rangemode": "tozero",
                },
                "yaxis": {"title": {"text": "share of pairs"}, "range": [0, 1]},
                "annotations": [] if found else message(_NO_LAYER),
                "meta": {
                    "click": {"customdata": "update"},
                    "alt": f"Shares of pairs in conflict, undecided and aligned; conflict last "
                    f"{conflict[-1]:.0%}.",
                },
            },
        }

    return Panel(
        name="verdicts",
        title="Verdicts over training",
        reading="How many pairs are in conflict, how many aligned, and of how many nothing can be "
        "said.",
        definition="Shares of all pairs of agents in the chosen space, at 5 % false discoveries.",
        parts=[
            Part(depends=("run", "network", "space", "layer"), draw=draw),
            cursor_of(runs),
        ],
    )


def _cancelled_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        lines = [
            line(
                of,
                "cancelled_norm",
                Mark(f"{letter}, summed over agents", colour, ""),
                where={"network": choices.network, "space": space, "layer": choices.layer},
            )
            for space, letter, colour in (("psi", "g", _G), ("theta", "Z", _Z))
        ]
        return lines_figure(
            [found for found in lines if found],
            {"title": {"text": "share of length cancelled"}, "range": [-0.02, 1.02]},
        )

    return Panel(
        name="cancelled",
        title="Length lost in the sum",
        reading="0: all agents pull one way; 1: their pulls cancel altogether.",
        definition="1 - |Σ gᵢ| / Σ |gᵢ|, plug-in. Orthogonal gradients of n agents give 1 - 1/√n.",
        parts=[Part(depends=("run", "network", "layer"), draw=draw), cursor_of(runs)],
    )


def _aggregation_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"network": choices.network}
        plain, applied = ({**where, "direction": d} for d in ("plain", "applied"))
        lines = [
            line(of, name, Mark(label, colour, ""), where=place)
            for name, label, colour, place in (
                ("aggregated_cosine", "cosine of the applied to the sum", OKABE_ITO[0], where),
                ("aggregated_length", "length of the applied over the sum's", OKABE_ITO[2], where),
                ("opposed_agents", "agents opposed by the sum", OKABE_ITO[3], plain),
                ("opposed_agents", "agents opposed by the applied", OKABE_ITO[1], applied),
            )
        ]
        return lines_figure(
            [found for found in lines if found],
            {"title": {"text": "cosine, ratio, share"}},
            empty="no aggregator: the agents' gradients are summed (gradlab train --aggregate)",
        )

    return Panel(
        name="aggregation",
        title="What the aggregator did",
        reading="Cosine and ratio of 1: nothing. How many agents the step goes against, before and "
        "after.",
        definition="Of a run with --aggregate: the gradient that was applied beside the sum of the "
        "agents' gradients, means over the minibatches of an update. An agent is opposed whose own "
        "gradient has a cosine below -0.001 with it.",
        parts=[Part(depends=("run", "network"), draw=draw), cursor_of(runs)],
    )


def _tree_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        distance = _wishes(of)
        if distance is None or len(distance) < 3:
            return nothing(NOT_RECORDED if of.array("cosine") is None else "needs three agents")
        return tree_figure(distance, of.agents, "1 - mean cosine of Z")

    return Panel(
        name="agents-tree",
        title="Agents that want the same",
        reading="Agents that join low down want similar changes over the whole training.",
        definition="Average linkage of 1 less the cosine of Z (plug-in, whole network, the mean "
        "over training). `Order: by similarity` sorts the matrices like this.",
        parts=[Part(depends=("run",), draw=draw)],
    )


def tree_figure(distance: np.ndarray, marks: list[Mark], unit: str) -> Figure:
    """Draw a tree of agents.

    Args:
        distance: Distances [agent, agent_other].
        marks: The agents'.
        unit: What the distances are.

    Returns:
        The figure; its last trace is the leaves.
    """
    shape = dendrogram(similarity_tree(distance), no_plot=True)
    leaves = [int(leaf) for leaf in shape["ivl"]]
    x, y = ([n for row in shape[name] for n in (*row, None)] for name in ("icoord", "dcoord"))
    places = [5 + 10 * n for n in range(len(leaves))]
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "x": x,
                "y": [None if n is None else rounded([n])[0] for n in y],
                "line": {"color": QUIET, "width": 1.5},
                "hoverinfo": "skip",
                "showlegend": False,
            },
            {
                "type": "scatter",
                "mode": "markers",
                "x": places,
                "y": [0] * len(leaves),
                "customdata": leaves,
                "hovertext": [for_plotly(marks[leaf].label, 60) for leaf in leaves],
                "hovertemplate": "%{customdata}: %{hovertext}<extra></extra>",
                "marker": {
                    "size": 9,
                    "color": [marks[leaf].colour for leaf in leaves],
                    "symbol": [marks[leaf].shape for leaf in leaves],
                },
                "cliponaxis": False,
                "showlegend": False,
            },
        ],
        "layout": {
            "xaxis": {
                "tickvals": places,
                "ticktext": [str(leaf) for leaf in leaves],
                "title": {"text": "agent"},
                "showgrid": False,
            },
            "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
            "meta": {
                "click": {"customdata": "agent"},
                "alt": "Agents in order of similarity: " + ", ".join(map(str, leaves)),
            },
        },
    }
