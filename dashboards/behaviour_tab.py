"""The tab of behaviour: whether agents act differently, and how it looks."""

import base64
from pathlib import Path

import numpy as np

from analyses.embeddings import mds_path
from dashboards.choices import Choices
from dashboards.embedding_planes import unit_axes
from dashboards.lines import NOT_RECORDED, cursor, line, lines_figure
from dashboards.matrices import matrix_figure, order_part, pair_part
from dashboards.panel import Figure, Panel, Part, Tab
from dashboards.points import (
    NEAREST,
    agent_trace,
    chosen_part,
    colour_part,
    nearest_figure,
)
from dashboards.similar_agents import agent_order, tree_figure
from dashboards.style import nothing
from dashboards.tables import Runs, RunTables

_DISTANCE = "behavioural_distance"
_SUFFIXES = {".gif": "image/gif", ".png": "image/png"}
_MOST_BYTES = 1_500_000  # of an animation, which a page has to carry
_PARTS = ("run", "update")
_RECORDED = " Recorded with --diagnostics full, every --effects-every updates."


def behaviour_tab(runs: Runs) -> Tab:
    """Lay out the tab.

    Args:
        runs: The runs by name.

    Returns:
        The tab.
    """
    return Tab(
        name="behaviour",
        title="Behaviour",
        lead="Whether agents act differently when they see the same.",
        panels=[
            _diversity_panel(runs),
            _matrix_panel(runs),
            _map_panel(runs),
            _tree_panel(runs),
            _neighbours_panel(runs),
            _animation_panel(runs),
        ],
    )


def _unit(of: RunTables) -> str:
    """What the distance is, as it was recorded."""
    array = of.array(_DISTANCE)
    said = "" if array is None else str(array.attrs.get("estimator", ""))
    return said.partition(",")[0].partition(" (")[0] or "behavioural distance"


def _diversity_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:  # noqa: ARG001
        lines = [line(of, "snd", of.mark) for of in runs.values()]
        kinds = {_unit(of) for of in runs.values() if of.array("snd") is not None}
        return lines_figure(
            [one for one in lines if one],
            {"title": {"text": "system neural diversity"}, "rangemode": "tozero"},
            note=", ".join(sorted(kinds)),
        )

    return Panel(
        name="snd",
        title="System neural diversity",
        reading="0: all agents act alike, whatever they see; higher: they act differently.",
        definition="Mean over pairs of agents of the distance between their action distributions "
        "on the same observations (Bettini et al., 2025), with a 95 % interval. Distances of "
        "different "
        "kinds do not compare." + _RECORDED,
        parts=[Part(depends=(), draw=draw), cursor(lambda _: list(runs.values()))],
        wide=True,
    )


def _matrix_panel(runs: Runs) -> Panel:
    def order(choices: Choices) -> list[int]:
        return agent_order(runs[choices.run], choices.order)

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        values = of.values(_DISTANCE, update=choices.update)
        if values is None:
            return nothing(NOT_RECORDED)
        everything = of.values(_DISTANCE)
        assert everything is not None
        end = float(np.nanmax(everything, initial=0.0, where=np.isfinite(everything))) or 1.0
        return matrix_figure(
            values,
            of.agents,
            unit="distance",
            limits=(0.0, end),
            diverging=False,
            empty="undefined: the policies are not finite",
        )

    return Panel(
        name="behavioural-distance",
        title="Behavioural distance",
        reading="Blue: the two act alike; yellow: differently. The scale holds for the whole "
        "training.",
        definition="Distance between two agents' action distributions, mean over the same "
        "observations." + _RECORDED,
        parts=[
            Part(depends=_PARTS, draw=draw, updates=lambda c: runs[c.run].updates(_DISTANCE)),
            order_part(order),
            pair_part(order),
        ],
        height=460,
    )


def _map_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        known = of.updates(_DISTANCE)
        if choices.update not in known:
            return nothing(NOT_RECORDED)

        def place() -> tuple[np.ndarray, np.ndarray]:
            found = [of.values(_DISTANCE, update=update) for update in known]
            return mds_path(np.array([matrix for matrix in found if matrix is not None]))

        position, share = of.once("behaviour map", place)
        at = known.index(choices.update)
        if not np.isfinite(position[at]).all():
            return nothing("undefined: the policies are not finite")
        kept = float(np.nansum(share[at]))
        layout, reach = unit_axes(position, "behavioural distance")
        return {
            "data": [agent_trace(position[at], of.agents, reach)],
            "layout": layout
            | {
                "meta": {
                    "click": {"customdata": "agent"},
                    "note": f"{kept:.0%} of squared distances",
                    "alt": f"{len(of.agents)} agents placed by how they act.",
                }
            },
        }

    return Panel(
        name="behaviour-map",
        title="Agents by how they act",
        reading="Points close together: agents that act alike.",
        definition="Classical multidimensional scaling of the behavioural distances at each "
        "update, turned onto the update before.",
        parts=[
            Part(depends=_PARTS, draw=draw, updates=lambda c: runs[c.run].updates(_DISTANCE)),
            colour_part(runs),
            chosen_part(),
        ],
        height=460,
    )


def _tree_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        values = of.values(_DISTANCE, update=choices.update)
        if values is None or len(values) < 3:
            return nothing(NOT_RECORDED if values is None else "needs three agents")
        return tree_figure(values, of.agents, "behavioural distance")

    return Panel(
        name="behaviour-tree",
        title="Agents that act alike",
        reading="Agents that join low down act alike. `Colour: by behaviour cluster` cuts this "
        "tree at its longest branch.",
        definition="Average linkage of the behavioural distances.",
        parts=[Part(depends=_PARTS, draw=draw, updates=lambda c: runs[c.run].updates(_DISTANCE))],
    )


def _neighbours_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"update": choices.update}
        values = of.values(_DISTANCE, **where)
        if values is None or choices.agent >= len(of.agents) or len(of.agents) < 2:
            return nothing(NOT_RECORDED if values is None else "no other agent")
        ends = [of.values(f"{_DISTANCE}_{end}", **where) for end in ("low", "high")]
        low, high = (None if end is None else end[choices.agent] for end in ends)
        return nearest_figure(
            values[choices.agent],
            choices.agent,
            of.agents,
            "behavioural distance",
            None if low is None or high is None else (low, high),
        )

    return Panel(
        name="behaviour-neighbours",
        title="Who acts like the chosen agent",
        reading="The shortest bar acts most alike; bars whose intervals meet can't be told apart.",
        definition="Behavioural distances with 95 % intervals over environment copies; "
        f"{NEAREST} at most.",
        parts=[
            Part(
                depends=("run", "agent", "update"),
                draw=draw,
                updates=lambda c: runs[c.run].updates(_DISTANCE),
            )
        ],
    )


def animation(of: RunTables) -> Path | None:
    """Find the newest animation in a run's folder.

    Args:
        of: The run's.

    Returns:
        A file that a page can carry, or None.
    """
    found = [
        file
        for file in sorted(of.run.path.rglob("*"))
        if file.suffix in _SUFFIXES
        and file.is_file()
        and not file.is_symlink()
        and file.stat().st_size <= _MOST_BYTES
    ]
    return max(found, key=lambda file: file.stat().st_mtime) if found else None


def _animation_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        file = animation(of)
        if file is None:
            return nothing(
                "nothing was drawn: gradlab evaluate RUN --animate RUN/episode.gif does, for "
                "environments that can be drawn"
            )
        picture = base64.b64encode(file.read_bytes()).decode()
        hidden = {"visible": False, "range": [0, 1], "fixedrange": True}
        return {
            "data": [{"type": "scatter", "x": [None], "y": [None], "showlegend": False}],
            "layout": {
                "xaxis": hidden,
                "yaxis": hidden,
                "images": [
                    {
                        "source": f"data:{_SUFFIXES[file.suffix]};base64,{picture}",
                        "xref": "paper",
                        "yref": "paper",
                        "x": 0.5,
                        "y": 0.5,
                        "sizex": 1,
                        "sizey": 1,
                        "xanchor": "center",
                        "yanchor": "middle",
                        "sizing": "contain",
                    }
                ],
                "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
                "meta": {"alt": f"An episode played by the run's policies: {file.name}"},
            },
        }

    return Panel(
        name="animation",
        title="An episode",
        reading="What the policies do.",
        definition="The newest GIF in the run's folder, of up to 1.5 MB, as "
        "gradlab evaluate RUN --animate writes it.",
        parts=[Part(depends=("run",), draw=draw)],
        height=460,
    )
