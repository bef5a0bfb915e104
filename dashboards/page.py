"""One self-contained HTML page for one or several runs; it works offline, from file://."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from analyses.curves import frames_by_update
from dashboards.colours import Mark, run_marks
from dashboards.overview import cursor, learning_curves, overview_panels
from dashboards.panel import Frame, Panel
from dashboards.run_panels import RunPanels, run_panels
from dashboards.run_table import distinct_names, problem_list, table_columns, table_rows
from dashboards.text import elide, for_html, json_island
from gradlab.checks import check
from gradlab.run import Run
from gradlab.run_writer import write_atomically

_LEAD = (
    "How far agents' gradients point with or against each other while they learn. "
    "g is an agent's gradient with respect to the trained parameters, Z with respect to its "
    "policy's; g = JᵀZ, where J is the sharing scheme."
)
_SHAPES = {
    "circle": '<circle cx="6" cy="6" r="5"/>',
    "square": '<rect x="1.5" y="1.5" width="9" height="9"/>',
    "diamond": '<path d="M6 0.5 11.5 6 6 11.5 0.5 6Z"/>',
    "triangle-up": '<path d="M6 1 11.5 11H0.5Z"/>',
    "cross": '<path d="M4 1h4v3h3v4H8v3H4V8H1V4h3Z"/>',
    "star": '<path d="M6 .5 7.6 4.3 11.6 4.6 8.5 7.2 9.5 11 6 9 2.5 11 3.5 7.2 .4 4.6 4.4 4.3Z"/>',
}
_CHOICES = {"all": "all layers"}


def write_page(runs: Sequence[Run], file: Path) -> None:
    """Write the page for some runs; an existing file is replaced in one step.

    Args:
        runs: At least one run.
        file: The HTML file; its folder must exist.

    Raises:
        UsageError: If there is no run.
    """
    write_atomically(file, page_html(runs).encode())


def page_html(runs: Sequence[Run]) -> str:
    """Make the page for some runs.

    Args:
        runs: At least one run.

    Returns:
        The page's whole text, about 5 MB of which 4.8 MB are plotly.js.

    Raises:
        UsageError: If there is no run.
    """
    check(len(runs) > 0, "runs", "name at least one run", len(runs))
    names = distinct_names(runs)
    marks = run_marks(names)
    curves = learning_curves(runs)
    sections = [run_panels(run) for run in runs]
    slider = sorted({update for section in sections for update in section.drawn})
    panels = overview_panels(runs, marks, curves, cursor(runs, [s.drawn for s in sections]))
    overview = len(panels)
    html = [_section("All runs" if len(runs) > 1 else "Over training", "", panels, 0)]
    for mark, section in zip(marks, sections, strict=True):
        html.append(_run_section(mark, section, len(panels)))
        panels.extend(section.panels)
    data = {
        "panels": [
            _panel_data(panel, number, over_training=number < overview)
            for number, panel in enumerate(panels)
        ],
        "slider": _slider(slider, runs),
    }
    plotly = _as_parsed(get_plotlyjs())
    script = _as_parsed(_resource("page.js"))
    return Template(_resource("page.html")).substitute(
        policy=_policy([plotly, script]),
        title=for_html(f"gradlab: {', '.join(elide(name) for name in names)}"),
        style=_resource("page.css"),
        lead=for_html(_LEAD),
        columns=table_columns(),
        rows=table_rows(runs, marks, curves),
        hidden="" if slider else " hidden",
        networks=_options(_choices(panels, "network")),
        layers=_options(_choices(panels, "layer")),
        last=max(len(slider) - 1, 0),
        sections="\n".join(html),
        footer="Made by gradlab. This file is complete in itself and asks for nothing else.",
        # Reading finds damage, so this comes after all else.
        problems=problem_list(runs, marks),
        data=json_island(data),
        plotly=plotly,
        script=script,
    )


def _run_section(mark: Mark, section: RunPanels, first: int) -> str:
    agents = "".join(
        f'<li><svg width="12" height="12" viewBox="0 0 12 12" fill="{agent.colour}" '
        f'stroke="#00000055" aria-hidden="true">{_SHAPES[agent.shape]}</svg>'
        f"<b>{number}</b>{for_html(elide(agent.label, 60))}</li>"
        for number, agent in enumerate(section.agents)
    )
    legend = f'<ul class="agents" aria-label="Agents">{agents}</ul>' if agents else ""
    kept, recorded = len(section.drawn), section.recorded
    thinned = (
        f'<p class="note">{kept} of {recorded} recorded updates are drawn below, evenly spaced, '
        "with the first and the last; the run folder holds them all.</p>"
        if kept < recorded
        else ""
    )
    title = f'<span class="swatch" style="background:{mark.colour}"></span>{for_html(mark.label)}'
    return _section(title, legend + thinned, section.panels, first)


def _section(title: str, intro: str, panels: Sequence[Panel], first: int) -> str:
    cards = "\n".join(_card(panel, first + number) for number, panel in enumerate(panels))
    return f'<section>\n<h2>{title}</h2>\n{intro}\n<div class="grid">\n{cards}\n</div>\n</section>'


def _card(panel: Panel, number: int) -> str:
    definition = for_html(panel.definition)
    caption = f"<figcaption>{definition}</figcaption>" if definition else ""
    return (
        f'<figure class="panel"><header><h3>{for_html(panel.title)}</h3>'
        f'<span class="badge" id="panel-{number}-badge"></span></header>'
        f'<p class="reading">{for_html(panel.reading)}</p>'
        f'<div class="plot" id="panel-{number}" style="height:{panel.height}px" role="img" '
        f'aria-label="{for_html(panel.title)}"></div>'
        f"{caption}</figure>"
    )


def _panel_data(panel: Panel, number: int, *, over_training: bool) -> dict[str, object]:
    figure = panel.figure.to_plotly_json()
    return {
        "id": f"panel-{number}",
        "data": figure["data"],
        "layout": figure["layout"],
        "parts": [
            {
                "depends": list(part.depends),
                "updates": list(part.updates),
                "cursor": over_training,
                "frames": {key: _frame_data(frame) for key, frame in part.frames.items()},
                "absent": _frame_data(part.absent),
            }
            for part in panel.parts
        ],
    }


def _frame_data(frame: Frame) -> dict[str, object]:
    fields = {"data": list(frame.data), "layout": dict(frame.layout), "note": frame.note}
    return {name: value for name, value in fields.items() if value}


def _slider(updates: Sequence[int], runs: Sequence[Run]) -> list[dict[str, object]]:
    frames = [frames_by_update(run).dropna() for run in runs]
    stops: list[dict[str, object]] = []
    for update in updates:
        known = sorted({int(found[update]) for found in frames if update in found.index})
        label = f"update {update} of {updates[-1]}"
        if known:
            span = f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"
            label += f" · {span} frames"
        stops.append({"update": update, "label": label})
    return stops


def _choices(panels: Iterable[Panel], name: str) -> list[str]:
    """Collect what a choice can be, in the order of recording."""
    found: dict[str, None] = {}
    for panel in panels:
        for part in panel.parts:
            if name in part.depends:
                place = part.depends.index(name)
                found |= {key.split("|")[place]: None for key in part.frames}
    return list(found)


def _options(labels: Iterable[str]) -> str:
    return "".join(
        f'<option value="{for_html(label)}">{for_html(_CHOICES.get(label, label))}</option>'
        for label in labels
    )


def _resource(name: str) -> str:
    return (files("dashboards") / name).read_text(encoding="utf-8")


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
