"""The tab of J and Z: how large, how noisy and how far apart the gradients' two factors are."""

from typing import Any

import numpy as np

from analyses.noise import smoothed_noise_scale
from dashboards.choices import Choices
from dashboards.colours import OKABE_ITO, SEQUENTIAL, Mark
from dashboards.lines import NOT_RECORDED, Line, cursor, cursor_of, curve, line, lines_figure
from dashboards.panel import Figure, Panel, Part, Tab
from dashboards.style import decimals, nothing, whole
from dashboards.tables import Runs, RunTables
from dashboards.text import for_plotly

_LOG: dict[str, Any] = {"type": "log"}
_PLACE = ("run", "network", "layer")
_POINTS = 200  # of each agent's line


def gradients_tab(runs: Runs) -> Tab:
    """Lay out the tab.

    Args:
        runs: The runs by name.

    Returns:
        The tab.
    """
    return Tab(
        name="gradients",
        title="J and Z",
        lead="gᵢ = Jᵢᵀ Zᵢ: J is who an agent is, Z what it has seen. How long both are, how noisy, "
        "and how much of the noise is a difference between agents.",
        panels=[
            _agents_panel(runs, *_LENGTH_G),
            _agents_panel(runs, *_LENGTH_Z),
            _signal_panel(runs, "psi"),
            _signal_panel(runs, "theta"),
            _split_panel(runs),
            _share_panel(runs),
            _noise_scale_panel(runs),
            _agents_panel(runs, *_DESIGN),
            _minibatch_panel(runs),
            _coupling_panel(runs),
            _gap_panel(runs),
            _jacobian_panel(runs),
            _residual_panel(runs),
        ],
    )


_LENGTH_G = (
    "length-g",
    "Length of g",
    "How hard each agent pulls at the trained parameters.",
    "|gᵢ| of each agent, plug-in, which noise makes longer. In units of the loss.",
    "norm",
    {"space": "psi"},
    "|g| (loss)",
)
_LENGTH_Z = (
    "length-z",
    "Length of Z",
    "How much each agent wants its policy changed.",
    "|Zᵢ| of each agent, plug-in, which noise makes longer. In units of the loss.",
    "norm",
    {"space": "theta"},
    "|Z| (loss)",
)
_DESIGN: tuple[str, str, str, str, str, dict[str, str], str] = (
    "design-effect",
    "Samples that repeat each other",
    "1: samples are as good as independent; 10: ten are worth one.",
    "Design effect: variance of an agent's mean gradient over what it would be if its samples were "
    "independent.",
    "design_effect",
    {},
    "design effect",
)


def _agents_panel(
    runs: Runs,
    name: str,
    title: str,
    reading: str,
    definition: str,
    quantity: str,
    where: dict[str, str],
    unit: str,
) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        place = {"network": choices.network, "layer": choices.layer} | where
        lines = [
            line(of, quantity, mark, where=place | {"agent": number}, most=_POINTS)
            for number, mark in enumerate(of.agents)
        ]
        many = len(of.agents) > 12
        return lines_figure(
            [one for one in lines if one],
            {"title": {"text": unit}} | _LOG,
            empty=_undefined(of, quantity),
            showlegend=not many,
            hovermode="closest",
        )

    return Panel(
        name=name,
        title=title,
        reading=reading,
        definition=definition,
        parts=[Part(depends=_PLACE, draw=draw), cursor_of(runs)],
    )


def _undefined(of: RunTables, quantity: str) -> str:
    if of.array(quantity) is None:
        return NOT_RECORDED
    return "undefined here: this network has no such layer, or nothing above 0 to draw"


def _signal_panel(runs: Runs, space: str) -> Panel:
    letter = {"psi": "g", "theta": "Z"}[space]

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"network": choices.network, "layer": choices.layer, "space": space}
        lines = []
        for quantity, label, colour in (
            ("squared_norm_debiased", "signal: true squared length", OKABE_ITO[0]),
            ("variance_mean", "noise: variance of the mean", OKABE_ITO[3]),
        ):
            values, array = of.values(quantity, **where), of.array(quantity)
            if values is not None and array is not None:
                mean = _mean_over_agents(values)
                lines.append(curve(of, array["update"].to_numpy(), mean, Mark(label, colour, "")))
        return lines_figure(
            lines,
            {"title": {"text": "squared length (loss²)"}} | _LOG,
            empty=_undefined(of, "variance_mean"),
        )

    return Panel(
        name=f"signal-{letter.lower()}",
        title=f"Signal and noise of {letter}",
        reading="Where the noise lies above the signal, a step's direction is mostly chance.",
        definition=f"Means over agents of the debiased squared length of {letter} and of the "
        "variance of its mean, from the spread of the environment copies. Values of 0 or less have "
        "no place on a logarithmic axis.",
        parts=[Part(depends=_PLACE, draw=draw), cursor_of(runs)],
    )


def _mean_over_agents(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(1)
    count = known.sum(1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _split_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        where = {"network": choices.network, "layer": choices.layer}
        lines: list[Line] = []
        for of in runs.values():
            for part, dash in (("within", "solid"), ("between", "dash")):
                found = line(
                    of,
                    f"variance_{part}",
                    of.mark,
                    where=where,
                    dash=dash,
                    label=of.mark.label if part == "within" else f"{of.mark.label}, between",
                )
                lines += [found] if found else []
        recorded = [_undefined(of, "variance_within") for of in runs.values()]
        return lines_figure(
            lines,
            {"title": {"text": "variance (loss²)"}} | _LOG,
            empty=next((r for r in recorded if r != NOT_RECORDED), NOT_RECORDED),
            key=(("within agents", "solid"), ("between agents", "dash")),
        )

    return Panel(
        name="variance",
        title="Gradient variance",
        reading="High between agents: they want different things. High within: each agent's own "
        "gradient is noisy.",
        definition="Variance of single samples' policy-space gradients, summed over parameters and "
        "split into the part within agents (solid) and between agents' means (dashed). Recorded "
        "with --diagnostics full.",
        parts=[
            Part(depends=("network", "layer"), draw=draw),
            cursor(lambda _: list(runs.values())),
        ],
    )


def _share_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        within, between = (
            of.values(f"variance_{part}", network=choices.network) for part in ("within", "between")
        )
        array = of.array("variance_within")
        if within is None or between is None or array is None:
            return nothing(NOT_RECORDED)
        total = within + between
        share = np.where(total > 0, between / np.where(total > 0, total, 1.0), np.nan)
        updates = array["update"].to_numpy()
        kept = np.isin(updates, of.updates("variance_within"))
        drawn = np.atleast_1d(np.isfinite(share).any(0))
        layers = [for_plotly(str(layer)) for layer in array["layer"].to_numpy()]
        if not drawn.any():
            return nothing("undefined for this network")
        return {
            "data": [
                {
                    "type": "heatmap",
                    "z": decimals(share[kept][:, drawn].T, 4),
                    "x": whole(of.frames_at(updates[kept])),
                    "y": [layer for layer, on in zip(layers, drawn, strict=True) if on],
                    "customdata": [whole(updates[kept])] * int(drawn.sum()),
                    "zmin": 0,
                    "zmax": max(float(np.nanmax(share)), 1e-3),
                    "colorscale": [list(stop) for stop in SEQUENTIAL],
                    "colorbar": {"thickness": 12, "outlinewidth": 0, "tickformat": ".1%"},
                    "hovertemplate": "%{y} at %{x:,} frames (update %{customdata}): %{z:.2%}"
                    "<extra></extra>",
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
                    "alt": "Share of the variance between agents, by layer over training.",
                },
            },
        }

    return Panel(
        name="between-share",
        title="Share of the variance between agents, by layer",
        reading="Yellow: there and then agents differ most from each other, for all their noise.",
        definition="Between over the sum of both parts. Even agents that want the same have a "
        "share above 0, by the noise of their means.",
        parts=[Part(depends=("run", "network"), draw=draw), cursor_of(runs)],
    )


def _noise_scale_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"network": choices.network, "layer": choices.layer}
        if of.values("variance_mean", **where, space="theta") is None:
            return nothing(NOT_RECORDED)
        table = smoothed_noise_scale(
            of.run, space=choices.space, network=choices.network, layer=choices.layer
        )
        lines = []
        for number, mark in enumerate(of.agents):
            rows = table[table["agent"] == number]
            lines.append(
                curve(
                    of,
                    rows["update"].to_numpy(),
                    rows["noise_scale"].to_numpy(dtype=float),
                    mark,
                    most=_POINTS,
                )
            )
        copies = of.run.config.get("copies")
        in_use = float(copies) if isinstance(copies, int) and copies > 0 else None
        return lines_figure(
            lines,
            {"title": {"text": "noise scale (environment copies)"}} | _LOG,
            reference=in_use,
            empty=_undefined(of, "variance_mean"),
            showlegend=len(of.agents) <= 12,
            note=f"in use: {copies} copies (dotted)" if in_use else "",
        )

    return Panel(
        name="noise-scale",
        title="Noise scale against the batch in use",
        reading="Above the dotted line: more environment copies would pay; far below: fewer would "
        "do.",
        definition="How many environment copies would have as much noise as signal in an agent's "
        "mean gradient; noise and signal are each smoothed over updates (0.9) and then divided. "
        "Dotted: copies in use. Reading it as a critical batch size needs strong assumptions.",
        parts=[
            Part(depends=("run", "network", "layer", "space"), draw=draw),
            cursor_of(runs),
        ],
    )


def _minibatch_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"network": choices.network, "layer": choices.layer}
        array = of.array("variance_minibatch")
        if array is None:
            return nothing(NOT_RECORDED)
        lines = []
        for number, count in enumerate(array["minibatches"].to_numpy().tolist()):
            values = of.values("variance_minibatch", **where, minibatches=count)
            if values is None:
                return nothing(_undefined(of, "variance_minibatch"))
            mark = Mark(f"{count} minibatches", OKABE_ITO[number % len(OKABE_ITO)], "")
            mean = _mean_over_agents(values)
            lines.append(curve(of, array["update"].to_numpy(), mean, mark))
        return lines_figure(
            lines,
            {"title": {"text": "added variance (loss²)"}} | _LOG,
            empty=_undefined(of, "variance_minibatch"),
        )

    return Panel(
        name="minibatches",
        title="What minibatches add",
        reading="The more minibatches a batch is cut into, the noisier each step.",
        definition="Variance that random minibatches add to an agent's gradient, mean over agents.",
        parts=[Part(depends=_PLACE, draw=draw), cursor_of(runs)],
    )


def _coupling_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        where = {"network": choices.network, "layer": choices.layer}
        lines = []
        for of in runs.values():
            values, array = of.values("coupling", **where), of.array("coupling")
            if values is None or array is None or values.shape[-1] < 2:
                continue
            off = ~np.eye(values.shape[-1], dtype=bool)
            lines.append(
                curve(of, array["update"].to_numpy(), _mean_over_agents(values[:, off]), of.mark)
            )
        return lines_figure(
            lines,
            {"title": {"text": "mean coupling of pairs"}, "range": [-0.05, 1.05]},
            empty="not recorded: no run has a coupling in closed form for this network and layer",
        )

    return Panel(
        name="coupling-mean",
        title="Coupling over training",
        reading="1: full sharing, nothing can be kept apart; 0: no sharing.",
        definition="Mean over pairs of the normalised trace of Jᵢ Jₖᵀ. J follows from the "
        "parameters "
        "alone, so it has no sampling noise unless the generator reads the observation.",
        parts=[
            Part(depends=("network", "layer"), draw=draw),
            cursor(lambda _: list(runs.values())),
        ],
    )


def _gap_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        lines = [
            line(of, "factorisation_gap", of.mark, where={"network": choices.network})
            for of in runs.values()
        ]
        return lines_figure(
            [one for one in lines if one],
            {"title": {"text": "factorisation gap"}, "rangemode": "tozero"},
            reference=0.0,
        )

    return Panel(
        name="factorisation-gap",
        title="Factorisation gap",
        reading="0: who an agent is and what it saw stay apart; above 0: they are mixed.",
        definition="|E[Jₜᵀ zₜ] - E[Jₜ]ᵀ E[zₜ]| / |E[Jₜᵀ zₜ]|: 0 for every generator that does "
        "not read the observation, above 0 for hypermarl-coupled.",
        parts=[
            Part(depends=("network",), draw=draw),
            cursor(lambda _: list(runs.values())),
        ],
    )


def _jacobian_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"network": choices.network, "layer": choices.layer}
        lines = []
        for quantity, label, colour, extra in (
            ("variance_jacobian", "of J alone", OKABE_ITO[1], {}),
            ("variance_mean", "of g", OKABE_ITO[0], {"space": "psi"}),
        ):
            values, array = of.values(quantity, **where, **extra), of.array(quantity)
            if values is not None and array is not None:
                mean = _mean_over_agents(values)
                lines.append(curve(of, array["update"].to_numpy(), mean, Mark(label, colour, "")))
        if of.array("variance_jacobian") is None:
            return nothing(
                "J has no noise of its own here: this generator does not read the observation"
                if of.array("variance_mean") is not None
                else NOT_RECORDED
            )
        return lines_figure(
            lines,
            {"title": {"text": "variance of the mean (loss²)"}} | _LOG,
            empty=_undefined(of, "variance_jacobian"),
        )

    return Panel(
        name="variance-jacobian",
        title="Noise of J",
        reading="What a generator that reads the observation adds to the noise of what is trained.",
        definition="Trace of the covariance of E[Jₜᵀ] Z from the noise of J alone, and of g, means "
        "over agents.",
        parts=[Part(depends=_PLACE, draw=draw), cursor_of(runs)],
    )


def _residual_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        lines = [
            line(of, "residual", of.mark, where={"network": choices.network})
            for of in runs.values()
        ]
        return lines_figure([one for one in lines if one], {"title": {"text": "residual"}} | _LOG)

    return Panel(
        name="residual",
        title="Does the decomposition add up?",
        reading="The sum of all parts against an ordinary backward pass: as small as rounding.",
        definition="|Σ Jᵢᵀ Zᵢ - autograd| / |autograd|, in float64, at each diagnosed update.",
        parts=[
            Part(depends=("network",), draw=draw),
            cursor(lambda _: list(runs.values())),
        ],
    )
