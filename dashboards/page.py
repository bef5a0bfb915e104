"""One self-contained HTML page for one or several runs; it works offline, from file://."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from dashboards.frames import packed
from dashboards.panel import Panel, Tab
from dashboards.run_table import problem_list, table_columns, table_rows
from dashboards.style import THEMES, template
from dashboards.tables import DATED, Limits
from dashboards.text import elide, for_html, json_island
from dashboards.view import View
from gradlab.run import Run
from gradlab.run_writer import write_atomically

_LEAD = (
    "How far agents' gradients point with or against each other while they learn. "
    "g is an agent's gradient with respect to the trained parameters, Z with respect to its "
    "policy's; g = JᵀZ, where J is the sharing scheme."
)
LIMITS = Limits(updates=40, cells=1_200_000, points=400, history=700_000, held=10**11)
"""What fits into a page that is mailed; a thinned page says so.

Its figures are all drawn at once, from every quantity again and again: all that is read is kept.
"""
COMMON = ("tab", "run", "order", "space", "quantity", "against")
"""Choices that do not depend on the run."""
WORDS: dict[str, dict[str, str]] = {
    "run": {},
    "network": {},
    "layer": {"all": "all layers"},
    "space": {"psi": "g: trained parameters ψ", "theta": "Z: policy parameters θ"},
    "estimate": {},
    "quantity": {},
    "against": {},
    "agent": {},
    "other": {},
    "order": {"number": "by number", "similarity": "by similarity"},
    "colour": {"agent": "by agent"},
    "perplexity": {},
}
"""What the control bar calls what can be chosen, where it is not its name."""


def write_page(runs: Sequence[Run], file: Path) -> None:
    """Write the page for some runs; an existing file is replaced in one step.

    Args:
        runs: At least one run.
        file: The HTML file; its folder must exist.

    Raises:
        UsageError: If there is no run.
    """
    write_atomically(file, page_html(runs).encode())


def page_html(runs: Sequence[Run], limits: Limits = LIMITS) -> str:
    """Make the page for some runs.

    Args:
        runs: At least one run.
        limits: How much of a long run is drawn.

    Returns:
        The page's whole text, about 5 MB of which 4.8 MB are plotly.js.

    Raises:
        UsageError: If there is no run.
    """
    view = View(runs, limits)
    chunks: list[str] = []
    data = page_data(view)
    for panel, described in zip(view.panels.values(), data["panels"], strict=True):
        described["chunks"] = _chunks(view, panel, chunks)
    names = list(view.runs)
    plotly = _as_parsed(get_plotlyjs())
    script = _as_parsed(resource("page.js"))
    return Template(resource("page.html")).substitute(
        policy=_policy([plotly, script]),
        title=for_html(f"gradlab: {', '.join(elide(name) for name in names)}"),
        style=resource("page.css"),
        body=page_body(view),
        footer="Made by gradlab. This file is complete in itself and asks for nothing else.",
        data=json_island(data),
        chunks="\n".join(
            f'<script type="text/plain" id="chunk-{number}">{chunk}</script>'
            for number, chunk in enumerate(chunks)
        ),
        plotly=plotly,
        script=script,
    )


def page_data(view: View) -> dict[str, Any]:
    """Say what the page's script has to know.

    Args:
        view: What is shown.

    Returns:
        JSON: tabs, panels and their parts, what can be chosen, the slider's stops, and how figures
        look.
    """
    numbers = _numbers(view)
    options = {name: view.options(name) for name in view.runs}
    return {
        "tabs": [
            {
                "name": tab.name,
                "panels": [f"panel-{numbers[panel.name]}" for panel in tab.panels],
                "controls": sorted(tab.controls),
            }
            for tab in view.tabs
        ],
        "panels": [
            {
                "id": f"panel-{numbers[panel.name]}",
                "name": panel.name,
                "title": panel.title,
                "parts": [
                    {"depends": list(part.depends), "symmetric": part.symmetric}
                    for part in panel.parts
                ],
            }
            for panel in view.panels.values()
        ],
        "defaults": {name: str(value) for name, value in asdict(view.defaults()).items()},
        "common": {name: next(iter(options.values()))[name] for name in COMMON},
        "options": {
            run: {name: known for name, known in of.items() if name not in COMMON}
            for run, of in options.items()
        },
        "labels": {name: labels(view, name) for name in view.runs},
        "words": WORDS,
        "stops": [{"update": stop, "label": view.label(stop)} for stop in view.stops()],
        "themes": {theme: template(theme) for theme in THEMES},
    }


def page_body(view: View, above: str = "") -> str:
    """Write all that is seen but the figures.

    Args:
        view: What is shown.
        above: HTML to stand above all else.

    Returns:
        HTML.
    """
    numbers = _numbers(view)
    return Template(resource("body.html")).substitute(
        above=above,
        lead=for_html(_LEAD),
        count=f"{len(view.runs)} run{'s' * (len(view.runs) != 1)}",
        columns=table_columns(),
        rows=table_rows(view.runs),
        tabs="\n".join(_tab_button(tab) for tab in view.tabs),
        last=max(len(view.stops()) - 1, 0),
        sections="\n".join(_section(view, tab, numbers) for tab in view.tabs),
        # Reading finds damage, so this comes after all else.
        problems=problem_list(view.runs),
    )


def resource(name: str) -> str:
    """Read a file that comes with this package.

    Args:
        name: The file's name.

    Returns:
        Its text.
    """
    return (files("dashboards") / name).read_text(encoding="utf-8")


def labels(view: View, run: str) -> dict[str, dict[str, str]]:
    """Say what the control bar calls a run's agents and perplexities.

    Args:
        view: What can be chosen.
        run: A run's name.

    Returns:
        Plain text by choice and value.
    """
    of = view.runs[run]
    agents = {
        str(number): str(number)
        if elide(mark.label) in {str(number), f"agent {number}", f"agent_{number}"}
        else f"{number}: {elide(mark.label)}"
        for number, mark in enumerate(of.agents)
    }
    return {
        "agent": agents,
        "other": agents,
        "colour": {c: f"by {c}" for c in view.options(run)["colour"]},
    }


def thinning(view: View) -> str:
    """Say what is left out.

    Args:
        view: What is shown.

    Returns:
        A sentence; nothing if all updates are shown.
    """
    said = []
    for name, of in view.runs.items():
        recorded = max(len(of.recorded), *map(of.count, DATED))
        if len(of.stops) < recorded:
            said.append(f"{len(of.stops):,} of {recorded:,} of {elide(name)}")
    if not said:
        return ""
    more = f" and {len(said) - 6} more runs" if len(said) > 6 else ""
    return (
        f"The slider stops at {', '.join(said[:6])}{more} diagnosed updates, evenly spaced, with "
        "the first and the last; lines have more points. The run folder holds them all."
    )


def _tab_button(tab: Tab) -> str:
    return (
        f'<button type="button" role="tab" id="tab-{tab.name}" data-tab="{tab.name}" '
        f'aria-controls="tabpanel-{tab.name}">{for_html(tab.title)}</button>'
    )


def _section(view: View, tab: Tab, numbers: dict[str, int]) -> str:
    cards = "\n".join(_card(panel, numbers[panel.name]) for panel in tab.panels)
    note = thinning(view) if "update" in tab.controls else ""
    thinned = f'<p class="note">{for_html(note)}</p>' if note else ""
    return (
        f'<section id="tabpanel-{tab.name}" role="tabpanel" '
        f'aria-labelledby="tab-{tab.name}" hidden>\n'
        f'<p class="note">{for_html(tab.lead)}</p>{thinned}\n'
        f'<div class="grid">\n{cards}\n</div>\n</section>'
    )


def _card(panel: Panel, number: int) -> str:
    definition = for_html(panel.definition)
    caption = f"<figcaption>{definition}</figcaption>" if definition else ""
    exports = "".join(
        f'<button type="button" data-export="{form}" data-panel="panel-{number}" '
        f'aria-label="Save {for_html(panel.title)} as {form.upper()}">{form.upper()}</button>'
        for form in ("svg", "png", "csv")
    )
    wide = " wide" if panel.wide else ""
    return (
        f'<figure class="panel{wide}"><header><h3>{for_html(panel.title)}</h3>'
        f'<span class="badge" id="panel-{number}-badge"></span>'
        f'<span class="exports">{exports}</span></header>'
        f'<p class="reading">{for_html(panel.reading)}</p>'
        f'<div class="plot" id="panel-{number}" style="height:{panel.height}px" role="img" '
        f'aria-label="{for_html(panel.title)}"></div>'
        f"{caption}</figure>"
    )


def _numbers(view: View) -> dict[str, int]:
    return {name: number for number, name in enumerate(view.panels)}


def _chunks(view: View, panel: Panel, chunks: list[str]) -> list[dict[str, str]]:
    """Add a panel's chunks, and say for each part and run where they are."""
    places: list[dict[str, str]] = [{} for _ in panel.parts]
    for part, run, chunk in packed(view, panel):
        places[part][run] = f"chunk-{len(chunks)}"
        chunks.append(chunk)
    return places


def _as_parsed(script: str) -> str:
    """Write line ends as a browser's parser leaves them, since the policy hashes what it left."""
    return script.replace("\r\n", "\n").replace("\r", "\n")


def _policy(scripts: Iterable[str]) -> str:
    """Allow these scripts and no other, whatever a name from a run folder may have slipped in."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
