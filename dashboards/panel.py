"""A panel: what it says, and how its figure follows from what was chosen."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dashboards.choices import Choices
from dashboards.style import template

Figure = dict[str, Any]
"""A figure in plotly's JSON, {"data": [trace, ...], "layout": {...}}, or what changes in one.

`layout.meta` may hold: `note`, a few words for the panel's corner; `alt`, what is seen in a
sentence; `click`, for an attribute of a clicked point the name of the choice that it holds (or
names, if it holds a list); `empty`, that there is nothing to draw.
"""

Draw = Callable[[Choices], Figure]

_JOINED = ("shapes", "annotations")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a figure that depends on some of the choices only.

    Attributes:
        depends: Names of the choices that `draw` reads.
        draw: Makes the part. A panel's first part is a whole figure; a later one is laid over it:
            its traces' entries replace those of the trace in the same place, its layout's entries
            replace the layout's, are merged into them if both are objects, and joined to them if
            they are shapes or annotations.
        updates: For some choices the updates at which there is something to draw, ascending; the
            newest up to the chosen one is drawn, or the first. None: `draw` is asked for any.
        symmetric: Whether the chosen pair's two agents may be swapped; `draw` gets the smaller
            number as `agent`.
    """

    depends: tuple[str, ...]
    draw: Draw
    updates: Callable[[Choices], Sequence[int]] | None = None
    symmetric: bool = False

    def at(self, choices: Choices) -> Choices:
        """Choose an update at which there is something to draw.

        Args:
            choices: What was chosen.

        Returns:
            The same, with the update that is drawn.
        """
        if self.symmetric and choices.agent > choices.other:
            choices = choices.with_(agent=choices.other, other=choices.agent)
        known = self.updates(choices) if self.updates else ()
        return choices.with_(update=earlier(known, choices.update)) if len(known) else choices


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure with its words.

    Attributes:
        name: Short and unique, for file names and addresses.
        title: Plain text.
        reading: How to read it, in one plain sentence.
        definition: What exactly is drawn.
        parts: What is drawn; later ones are laid over the first.
        height: In CSS pixels.
        wide: Whether it takes the whole width.
    """

    name: str
    title: str
    reading: str
    definition: str
    parts: Sequence[Part]
    height: int = 380
    wide: bool = False

    def draw(self, choices: Choices) -> Figure:
        """Draw the figure.

        Args:
            choices: What to show.

        Returns:
            The figure, whose `layout.meta.update` is the update that is drawn if that was not
            left open.
        """
        return compose([part.draw(part.at(choices)) for part in self.parts], self.drawn(choices))

    def drawn(self, choices: Choices) -> int | None:
        """Say which update is drawn.

        Args:
            choices: What to show.

        Returns:
            The update; None if the panel does not show a single one.
        """
        dated = [part for part in self.parts if part.updates and "update" in part.depends]
        return dated[0].at(choices).update if dated and dated[0].updates(choices) else None  # type: ignore[misc]

    def figure(self, choices: Choices, theme: str = "light") -> go.Figure:
        """Draw the figure as an object, for notebooks.

        Args:
            choices: What to show.
            theme: "light" or "dark".

        Returns:
            The figure.
        """
        drawn = self.draw(choices)
        layout = {
            "template": template(theme),
            "title": {"text": self.title, "font": {"size": 15}},
            "height": self.height + 40,
            **drawn["layout"],
        }
        layout["margin"] = {"t": 60} | layout.get("margin", {}) | {"t": 60}
        return go.Figure({"data": drawn["data"], "layout": layout})


@dataclass(frozen=True, kw_only=True)
class Tab:
    """Panels that answer one question.

    Attributes:
        name: Short and unique.
        title: Plain text.
        lead: The question, in a sentence.
        panels: In reading order.
        controls: Names of the choices that its panels read, in the order of the control bar.
    """

    name: str
    title: str
    lead: str
    panels: Sequence[Panel]

    @property
    def controls(self) -> set[str]:
        """Names of the choices that its panels read."""
        return {name for panel in self.panels for part in panel.parts for name in part.depends}


def compose(patches: Sequence[Figure], update: int | None = None) -> Figure:
    """Lay parts over each other.

    Args:
        patches: A whole figure, and what changes in it.
        update: The update that is drawn.

    Returns:
        A new figure.
    """
    first = patches[0]
    data = [dict(trace) for trace in first.get("data", ())]
    layout = dict(first.get("layout", {}))
    # Nothing is laid over a figure that only says why there is none.
    empty = layout.get("meta", {}).get("empty", False)
    for patch in () if empty else patches[1:]:
        for trace, changes in zip(data, patch.get("data", ()), strict=False):
            trace.update(changes)
        for name, value in patch.get("layout", {}).items():
            old = layout.get(name)
            if name in _JOINED:
                value = [*(old or ()), *value]
            elif isinstance(old, Mapping) and isinstance(value, Mapping):
                value = {**old, **value}
            layout[name] = value
    if update is not None:
        layout["meta"] = {**layout.get("meta", {}), "update": update}
    return {"data": data, "layout": layout}


def earlier(known: Sequence[int], wanted: int) -> int:
    """Find the newest update up to one.

    Args:
        known: Updates, ascending; at least one.
        wanted: The update that is asked for.

    Returns:
        The newest that is not later; the first if all are.

    >>> earlier([0, 10, 20], 19), earlier([5], 0)
    (10, 5)
    """
    return int(known[max(bisect_right(known, wanted) - 1, 0)])
