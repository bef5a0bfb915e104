"""All that can be looked at of some runs: tabs of panels, and what can be chosen."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from dashboards.behaviour_tab import behaviour_tab
from dashboards.choices import Choices
from dashboards.colours import Mark, run_marks
from dashboards.compare_tab import compare_tab
from dashboards.embeddings_tab import COLOURS, embeddings_tab
from dashboards.gradients_tab import gradients_tab
from dashboards.interference_tab import interference_tab
from dashboards.neighbour_maps import PERPLEXITIES
from dashboards.overview_tab import method_marks, methods, overview_tab
from dashboards.panel import Panel, Tab
from dashboards.run_table import distinct_names
from dashboards.tables import ALL, Limits, RunTables
from gradlab.checks import check
from gradlab.run import Run

_SCALAR = {"network", "space", "layer"}
_FIRST = ("episode_return", "evaluation_return", "conflict_rate", "mean_cosine", "snd")


TABS = {
    "overview": overview_tab,
    "interference": interference_tab,
    "gradients": gradients_tab,
    "embeddings": embeddings_tab,
    "behaviour": behaviour_tab,
    "compare": compare_tab,
}
"""What makes the tabs, in order."""


def _first(quantity: str) -> tuple[int, str]:
    return _FIRST.index(quantity) if quantity in _FIRST else len(_FIRST), quantity


class View:
    """What a page, a server or a notebook shows of some runs.

    Nothing is read before it is asked for; what was read is kept.

    Attributes:
        runs: The runs' records by the run's name, which is made distinct.
        limits: How much of a long run is drawn.
    """

    def __init__(
        self, runs: Sequence[Run], limits: Limits = ALL, before: "View | None" = None
    ) -> None:
        """Name the runs.

        Args:
            runs: At least one run.
            limits: How much of a long run to draw.
            before: A view of the same runs when they were shorter; what was read is kept.

        Raises:
            UsageError: If there is no run.
        """
        check(len(runs) > 0, "runs", "name at least one run", len(runs))
        names = distinct_names(runs)
        self.limits = limits
        known = before.runs if before is not None else {}
        plain = {
            name: RunTables(run, mark, limits, known.get(name))
            for name, run, mark in zip(names, runs, run_marks(names), strict=True)
        }
        # The only run of its method has the method's colour in all panels.
        marks = method_marks(plain)
        alone = {id(group[0]): marks[m] for m, group in methods(plain).items() if len(group) == 1}
        if len(alone) == len(plain):
            for of in plain.values():
                of.mark = Mark(of.mark.label, alone[id(of)].colour, alone[id(of)].shape)
        self.runs: dict[str, RunTables] = plain

    @cached_property
    def tabs(self) -> list[Tab]:
        """The tabs in order."""
        return [make(self.runs) for make in TABS.values()]

    @property
    def panels(self) -> dict[str, Panel]:
        """All panels by name."""
        return {panel.name: panel for tab in self.tabs for panel in tab.panels}

    def tab(self, name: str) -> Tab:
        """Look a tab up.

        Args:
            name: Its name.

        Returns:
            The tab; the first if there is none of that name.
        """
        return next((tab for tab in self.tabs if tab.name == name), self.tabs[0])

    def options(self, run: str) -> dict[str, list[str]]:
        """List what can be chosen while a run is.

        Args:
            run: A run's name.

        Returns:
            Values by the choice's name, in order; an update may be any number.
        """
        of = self.runs[run]
        agents = [str(number) for number in range(len(of.agents))]
        judged = any(t.array("cosine_debiased") is not None for t in self.runs.values())
        return {
            "tab": [tab.name for tab in self.tabs],
            "run": list(self.runs),
            "network": of.labels("network") or ["actor"],
            "layer": of.labels("layer") or ["all"],
            "space": ["psi", "theta"],
            "estimate": ["plug-in", "debiased"] if judged else ["plug-in"],
            "agent": agents or ["0"],
            "other": agents or ["0"],
            "order": ["number", "similarity"],
            "quantity": self.quantities,
            "against": list(methods(self.runs)),
            "perplexity": list(PERPLEXITIES),
            "colour": [c for c in COLOURS if c in of.groups or c == "agent"],
        }

    @cached_property
    def quantities(self) -> list[str]:
        """Names of what is a number over training, for a network, space and layer at most."""
        found: dict[str, None] = {}
        for of in self.runs.values():
            for name in of.run.quantities:
                if set(of.run.axes(name)) <= _SCALAR and of.run.newest(name) is not None:
                    found[name] = None
        return sorted(found, key=_first) or ["episode_return"]

    def stops(self) -> list[int]:
        """List the updates that the slider stops at: those of all runs.

        Returns:
            Updates, ascending.
        """
        return sorted({update for of in self.runs.values() for update in of.stops})

    def label(self, update: int) -> str:
        """Say in words where in training an update is.

        Args:
            update: An update.

        Returns:
            E.g. "update 20 of 100 · 42,000 frames".
        """
        last = max([update, *(stop for of in self.runs.values() for stop in of.stops[-1:])])
        found = [of.frames_at(np.array([update]))[0] for of in self.runs.values()]
        known = sorted({int(frames) for frames in found if np.isfinite(frames)})
        span = " to ".join(f"{frames:,}" for frames in dict.fromkeys([*known[:1], *known[-1:]]))
        return f"update {update} of {last}" + (f" · {span} frames" if known else "")

    def defaults(self) -> Choices:
        """Choose what a reader sees first: the first run's last update, and its first two agents.

        Returns:
            The choices.
        """
        first = next(iter(self.runs))
        stops = self.stops()
        options = self.options(first)
        fixed = {
            name: values[0]
            for name, values in options.items()
            if name not in {"tab", "other", "layer"}
        }
        layers = options["layer"]
        return Choices().with_(
            **fixed,
            layer="all" if "all" in layers else layers[0],
            other=options["other"][min(1, len(options["other"]) - 1)],
            update=stops[-1] if stops else 0,
        )

    def choices(self, query: str) -> Choices:
        """Read an address.

        Args:
            query: Its query or fragment, from anybody.

        Returns:
            What it chooses; the defaults where it says nothing, or what can't be had.
        """
        choices = self.defaults()
        # Which layers, networks and agents there are depends on the run.
        choices = choices.read(query, {"run": list(self.runs)})
        return choices.read(query, self.options(choices.run))
