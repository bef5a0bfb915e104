"""The panels that compare all runs over training."""

from collections.abc import Mapping, Sequence

import pandas as pd

from analyses.curves import frames_by_update, learning_curve, series
from dashboards.colours import Mark
from dashboards.curve_panels import PARTS, SPACES, Line, cursor_part, learning_panel, quantity_panel
from dashboards.panel import Panel, Part, message_panel
from dashboards.run_panels import NOT_RECORDED, with_axes
from gradlab.run import Run

_OVER_LAYERS = ("update", "network", "space", "layer")
_CONFLICT = (
    "Conflict rate",
    "Share of agent pairs whose gradients are told to point against each other. Pairs that noise "
    "leaves undecided do not count, so 0 may mean harmony or noise: see the verdicts.",
    "Share of all pairs of different agents with the verdict conflict: the debiased inner product "
    "is below 0 at a false discovery rate of 5 %, judged from environment copies. Solid: g; "
    "dashed: Z. Recorded with --diagnostics full and at least 8 copies.",
)
_MEAN_COSINE = (
    "Mean cosine",
    "Below 0: on average two agents' gradients point against each other; above 0: they agree. "
    "Noise pulls it towards 0.",
    "Mean over all pairs of different agents of the plug-in cosine of their gradients. "
    "Solid: g = JᵀZ, trained parameters; dashed: Z, policy parameters.",
)
_VARIANCE = (
    "Gradient variance",
    "High between agents: they want different things. High within: each agent's own gradient is "
    "noisy.",
    "Variance of the policy-space gradient, summed over parameters and split into the part within "
    "agents (solid) and between agents' means (dashed). Logarithmic: values of 0 or less have "
    "no place. Recorded with --diagnostics full.",
)


def learning_curves(runs: Sequence[Run]) -> list[pd.DataFrame]:
    """Tabulate all runs' returns.

    Args:
        runs: Runs.

    Returns:
        Their learning curves, empty where nothing was recorded.
    """
    nothing = pd.DataFrame({"update": [], "frames": [], "episode_return": []}, dtype=float)
    return [
        learning_curve(run)
        if with_axes(run, "episode_return", ("update",)) is not None
        else nothing
        for run in runs
    ]


def cursor(runs: Sequence[Run], drawn: Sequence[Sequence[int]]) -> Part:
    """Mark the slider's updates on the axis of frames.

    Args:
        runs: Runs.
        drawn: The updates that the slider stops at, by run.

    Returns:
        A part of the panels over training.
    """
    places: dict[int, set[int]] = {update: set() for updates in drawn for update in updates}
    for run in runs:
        frames = frames_by_update(run).dropna()
        for update, found in places.items():
            if update in frames.index:
                found.add(int(frames[update]))
    return cursor_part(places)


def overview_panels(
    runs: Sequence[Run], marks: Sequence[Mark], curves: Sequence[pd.DataFrame], now: Part
) -> list[Panel]:
    """Lay out the panels over training.

    Args:
        runs: Runs.
        marks: Theirs.
        curves: Their learning curves.
        now: What `cursor` returned.

    Returns:
        Learning curves, conflict rate, mean cosine, gradient variance.
    """
    rate_axis: dict[str, object] = {"title": {"text": "share of pairs"}, "range": [-0.02, 1.02]}
    cosine_axis: dict[str, object] = {"title": {"text": "mean cosine"}, "rangemode": "tozero"}
    variance_axis: dict[str, object] = {
        "title": {"text": "variance (squared gradient)"},
        "type": "log",
        "exponentformat": "power",
    }
    return [
        learning_panel(list(zip(marks, curves, strict=True)), now),
        _panel(_by_space(runs, marks, "conflict_rate"), SPACES, now, _CONFLICT, rate_axis, None),
        _panel(_by_space(runs, marks, "mean_cosine"), SPACES, now, _MEAN_COSINE, cosine_axis, 0.0),
        _panel(_by_part(runs, marks), PARTS, now, _VARIANCE, variance_axis, None),
    ]


def _panel(
    tables: Mapping[Mark, pd.DataFrame | None],
    lines: Sequence[Line],
    now: Part,
    words: tuple[str, str, str],
    axis: dict[str, object],
    reference: float | None,
) -> Panel:
    title, reading, definition = words
    recorded = [(mark, table) for mark, table in tables.items() if table is not None]
    if not recorded:
        return message_panel(title, reading, definition, NOT_RECORDED)
    missing = [mark.label for mark, table in tables.items() if table is None]
    note = f" Not recorded by: {', '.join(missing)}." if missing else ""
    return quantity_panel(
        recorded,
        lines,
        now,
        title=title,
        reading=reading,
        definition=definition + note,
        axis=axis,
        reference=reference,
    )


def _by_space(
    runs: Sequence[Run], marks: Sequence[Mark], quantity: str
) -> dict[Mark, pd.DataFrame | None]:
    return {
        mark: series(run, quantity) if with_axes(run, quantity, _OVER_LAYERS) is not None else None
        for run, mark in zip(runs, marks, strict=True)
    }


def _by_part(runs: Sequence[Run], marks: Sequence[Mark]) -> dict[Mark, pd.DataFrame | None]:
    tables: dict[Mark, pd.DataFrame | None] = {}
    for run, mark in zip(runs, marks, strict=True):
        parts = [
            series(run, f"variance_{part}").assign(part=part)
            for part in ("within", "between")
            if with_axes(run, f"variance_{part}", ("update", "network", "layer")) is not None
        ]
        tables[mark] = pd.concat(parts, ignore_index=True) if parts else None
    return tables
