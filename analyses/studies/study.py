"""What a study is, and how it is run: a sweep or a simulation, then one report."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from analyses.studies.verdict import Verdict
from gradlab.checks import Failed, check
from gradlab.run import Run
from gradlab.run_writer import make_folder, write_atomically
from gradlab.versions import versions
from trainers.sweeps import Sweep, find_sweep, make_engine, plan_runs, run_sweep

Progress = Callable[[int, int], None]
"""Told of the parts done and the parts there are."""

Budget = Literal["quick", "standard", "full"]

RUNS, REPORT = "runs", "report"
"""Folders of a study: what it trained, and what it says of it."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A further part of a report, below its table.

    Attributes:
        title: Its heading.
        about: What its numbers are.
        shown: Its numbers as the report shows them, if it has any.
        tables: Numbers for other programs, by name.
        figures: SVG files by name.
    """

    title: str
    about: str
    shown: pd.DataFrame | None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a study finds.

    Attributes:
        shown: Its numbers as the report shows them.
        verdicts: What they say of each claim.
        tables: Numbers for other programs, by name.
        figures: SVG files by name.
        sections: Further parts.
    """

    shown: pd.DataFrame
    verdicts: Sequence[Verdict]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the sweep that answers it, and how it is read.

    Attributes:
        name: Its registered name.
        question: What is asked, in one sentence.
        budgets: The sweep for each budget, as `plan_runs` takes it.
        about: What the report's numbers are, and where they are not the paper's.
        read: Reads the runs that are done.
    """

    name: str
    question: str
    budgets: Mapping[Budget, Mapping[str, Any]]
    about: str
    read: Callable[[Sequence[Run]], Findings]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A question that random draws answer, without any training.

    Attributes:
        name: Its registered name.
        question: What is asked, in one sentence.
        budgets: Number of draws for each budget.
        about: What the report's numbers are.
        draw: Makes the draws.
    """

    name: str
    question: str
    budgets: Mapping[Budget, int]
    about: str
    draw: Callable[[int, Progress], Findings]


def report_of(name: str, out: Path) -> Path:
    """Name the report that a study writes.

    Args:
        name: The study's name.
        out: Its folder.

    Returns:
        The file, whether or not it is there.
    """
    return out / REPORT / f"{name}.md"


def run_study(
    study: Study | Simulation,
    budget: str,
    out: Path,
    *,
    train: Callable[[Sweep], None] = lambda sweep: run_sweep(sweep, make_engine("local")),
    progress: Progress = lambda *_: None,
) -> Path:
    """Train what is missing or cut off, or make all draws, and write the report.

    Args:
        study: The study.
        budget: One of its budgets.
        out: Its folder: runs go to `runs` in it, the report and what belongs to it to `report`.
        train: Trains the runs of a sweep that are not done; by default on this machine's cores. If
            some fail, the report is of the others, and says so.
        progress: Told of a simulation's draws.

    Returns:
        The report, in Markdown.

    Raises:
        UsageError: If there is no such budget, a folder can't be made, or one holds a run with
            other settings.
        Failed: If no run is done.
    """
    budgets: Mapping[Any, Any] = study.budgets
    check(budget in budgets, "budget", f"be one of {', '.join(budgets)}", budget)
    report = report_of(study.name, out)
    folder = report.parent  # made before what takes long, which would be for nothing
    made_with: list[Mapping[str, str]] | None = None
    if isinstance(study, Simulation):
        make_folder(folder)
        findings, of_runs = study.draw(budgets[budget], progress), []
    else:
        sweep = find_sweep(plan_runs(budgets[budget]), out / RUNS)
        make_folder(folder)
        train(sweep)
        done = list(sweep.open().values())
        if not done:
            raise Failed(f"no run of the study is done, so there is nothing to report: {out}")
        findings, of_runs = study.read(done), _of_runs(sweep, done, budgets[budget])
        made_with = [run.versions for run in done]
    parts: list[Findings | Section] = [findings, *findings.sections]
    for part in parts:
        for name, figure in part.figures.items():
            write_atomically(folder / f"{name}.svg", figure.encode())
        for name, table in part.tables.items():
            write_atomically(folder / f"{name}.csv", table.to_csv(index=False).encode())
    text = _markdown(study, budget, findings, of_runs, _made_with(made_with))
    write_atomically(report, text.encode())
    return report


def _markdown(
    study: Study | Simulation,
    budget: str,
    findings: Findings,
    of_runs: Sequence[str],
    packages: str,
) -> str:
    lines = [
        f"# {study.question}",
        "",
        f"Printed by `gradlab study {study.name} --budget {budget}` {packages}.",
        "",
        *(f"- {verdict}" for verdict in findings.verdicts),
        "",
        *_part(findings, study.about),
        *(
            line
            for part in findings.sections
            for line in (f"## {part.title}", "", *_part(part, part.about))
        ),
        *of_runs,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _made_with(of_runs: Sequence[Mapping[str, str]] | None) -> str:
    """With which versions a report is printed, and those that its runs say, if it is of runs."""
    printed = f"with {_named([versions()])}"
    if of_runs is None:
        return printed
    saying = [packages for packages in of_runs if packages]
    if not saying:
        return f"{printed}; its runs do not say with which versions they were made"
    if len(saying) == len(of_runs):
        return f"{printed}; its runs were made with {_named(saying)}"
    return (
        f"{printed}; {len(saying)} of its {len(of_runs)} runs were made with {_named(saying)}, the "
        "others do not say"
    )


def _named(made_with: Sequence[Mapping[str, str]]) -> str:
    """Versions by name, in the order of names, all of them where they differ."""
    found: dict[str, dict[str, None]] = {}
    for packages in made_with:
        for name, version in packages.items():
            found.setdefault(name, {})[version] = None
    return ", ".join(f"{name} {' and '.join(found[name])}" for name in sorted(found))


def _part(part: Findings | Section, about: str) -> list[str]:
    """Figures, table, what its numbers are, and where they are."""
    lines = [line for name in part.figures for line in (f"![{name}]({name}.svg)", "")]
    if part.shown is not None:
        lines += [
            "| " + " | ".join(map(str, part.shown.columns)) + " |",
            "|" + " --- |" * len(part.shown.columns),
            *(f"| {' | '.join(map(str, row))} |" for row in part.shown.itertuples(index=False)),
            "",
        ]
    return [*lines, about, "", *(f"Numbers: [{name}.csv]({name}.csv)\n" for name in part.tables)]


def _of_runs(sweep: Sweep, done: Sequence[Run], document: Mapping[str, Any]) -> list[str]:
    """Design, seeds and cost, and what is missing."""
    frames = sum(float(run.quantity("frames")[-1]) for run in done)
    hours = sum(float(run.quantity("seconds").sum()) for run in done) / 3600
    seeds = sorted({run.info["seed"] for run in done})
    lines = [
        "## Design and cost",
        "",
        f"{len(done)} runs, seeds {', '.join(map(str, seeds))}; {frames:,.0f} frames in "
        f"{hours:.2f} hours of training, each run on one thread. The sweep "
        "(`gradlab sweep` takes it as it stands):",
        "",
        "```yaml",
        yaml.safe_dump(
            _plain(document), sort_keys=False, default_flow_style=None, width=96
        ).rstrip(),
        "```",
        "",
    ]
    missing = {name: s for name, s in sweep.states.items() if s.kind not in {"kept", "done"}}
    if missing:
        lines += [
            f"**{len(missing)} of {len(sweep.states)} runs are missing:**",
            "",
            *(f"- {name}: {state.kind} {state.cause}".rstrip() for name, state in missing.items()),
            "",
            "Seeds are therefore not equal between methods; what is not listed has all of its own:",
            "",
            *_unequal(sweep, missing),
            "",
        ]
    return lines


def _unequal(sweep: Sweep, missing: Collection[str]) -> Iterator[str]:
    """Seeds of the runs that differ in nothing else, where some are missing."""
    groups: dict[str, list[str]] = {}
    for name, run in sweep.runs.items():
        others = (f"{key}={value}" for key, value in run.differing.items() if key != "seed")
        groups.setdefault(", ".join(others) or run.config.scheme, []).append(name)
    for group, names in groups.items():
        seeds = [str(sweep.runs[name].config.seed) for name in names if name not in missing]
        if len(seeds) < len(names):
            yield f"- {group}: {len(seeds)} of {len(names)} seeds ({', '.join(seeds) or 'none'})"


def _plain(value: object) -> object:
    """Mappings and sequences as YAML writes them."""
    if isinstance(value, Mapping):
        return {key: _plain(inside) for key, inside in value.items()}
    return [_plain(inside) for inside in value] if isinstance(value, (list, tuple)) else value
