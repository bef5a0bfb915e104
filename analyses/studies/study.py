"""What a study is, and how it is run: trainings side by side or a simulation, then one report."""

import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradlab.checks import check
from gradlab.run import Run, open_run
from gradlab.run_writer import is_run, write_atomically
from trainers.config import TrainConfig
from trainers.train import check_same_settings, train_settings

Progress = Callable[[int, int], None]
"""Told of the parts done and the parts there are."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a study says of one claim.

    Attributes:
        claim: The claim.
        holds: Whether the runs support it.
        evidence: The numbers that say so.
    """

    claim: str
    holds: bool
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a study finds.

    Attributes:
        table: Its numbers.
        verdicts: What they say of each claim.
        figures: SVG files by name.
    """

    table: pd.DataFrame
    verdicts: Sequence[Verdict]
    figures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the runs that answer it, and how they are read.

    Attributes:
        name: Its registered name.
        question: What is asked, in one sentence.
        budgets: Settings of each run, by run name, for each budget.
        caption: What the report's numbers are.
        report: Reads the runs by name.
    """

    name: str
    question: str
    budgets: Mapping[str, Mapping[str, Mapping[str, Any]]]
    caption: str
    report: Callable[[Mapping[str, Run]], Findings]


def over_last_tenth(run: Run, quantity: str) -> float:
    """Mean of a recorded scalar over the last tenth of a training's updates.

    Args:
        run: A finished run.
        quantity: Its name.

    Returns:
        The mean over the updates that have it.
    """
    values = run.quantity(quantity).to_numpy()
    return float(np.nanmean(values[-max(1, len(values) // 10) :]))


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A question that random draws answer, without any training.

    Attributes:
        name: Its registered name.
        question: What is asked, in one sentence.
        budgets: Number of draws for each budget.
        caption: What the report's numbers are.
        report: Makes the draws.
    """

    name: str
    question: str
    budgets: Mapping[str, int]
    caption: str
    report: Callable[[int, Progress], Findings]


def run_study(
    study: Study | Simulation,
    budget: str,
    out: Path,
    *,
    workers: int = 2,
    progress: Progress = lambda *_: None,
) -> str:
    """Train what is missing or cut off, or make all draws, and write the report.

    Args:
        study: The study.
        budget: One of its budgets.
        out: Folder of its runs; the report is written to `report.md` in it, figures beside it.
        workers: Number of trainings at once, each a process of its own.
        progress: Told, each time a run is done, of the runs done and the runs there are.

    Returns:
        The report in Markdown.

    Raises:
        UsageError: If there is no such budget, or a folder holds a run with other settings.
    """
    check(budget in study.budgets, "budget", f"be one of {', '.join(study.budgets)}", budget)
    if isinstance(study, Simulation):
        findings = study.report(study.budgets[budget], progress)
    else:
        findings = study.report(_trained(study.budgets[budget], out, workers, progress))
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in findings.figures.items():
        write_atomically(out / name, figure.encode())
    text = _markdown(study, budget, findings)
    write_atomically(out / "report.md", text.encode())
    return text


def _trained(
    runs: Mapping[str, Mapping[str, Any]], out: Path, workers: int, progress: Progress
) -> dict[str, Run]:
    for name, settings in runs.items():
        if is_run(out / name):
            check_same_settings(TrainConfig.model_validate(settings), out / name)
    missing = [name for name in runs if not _is_done(out / name)]
    progress(len(runs) - len(missing), len(runs))
    # Forked copies of a process that has used torch's threads can hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        waiting = [pool.submit(train_settings, dict(runs[name]), out / name) for name in missing]
        for count, future in enumerate(as_completed(waiting), start=1):
            future.result()
            progress(len(runs) - len(missing) + count, len(runs))
    finally:
        pool.shutdown(cancel_futures=True)
    return {name: open_run(out / name) for name in runs}


def _is_done(folder: Path) -> bool:
    return is_run(folder) and open_run(folder).state == "done"


def _markdown(study: Study | Simulation, budget: str, findings: Findings) -> str:
    table = findings.table
    packages = ", ".join(f"{name} {version(name)}" for name in ("gradlab", "torch", "vmas"))
    lines = [
        f"# {study.question}",
        "",
        f"Printed by `gradlab study {study.name} --budget {budget}` with {packages}, "
        f"Python {platform.python_version()}.",
        "",
        "| " + " | ".join(map(str, table.columns)) + " |",
        "|" + " --- |" * len(table.columns),
        *("| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)),
        "",
        *(line for name in findings.figures for line in (f"![{study.question}]({name})", "")),
        study.caption,
        "",
        *(
            f"- **{'supported' if v.holds else 'not supported'}**: {v.claim} ({v.evidence})"
            for v in findings.verdicts
        ),
        "",
    ]
    return "\n".join(lines)
