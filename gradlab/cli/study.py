"""The command that runs studies."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gradlab.checks import Failed
from gradlab.cli.sweep import train_all

if TYPE_CHECKING:
    from trainers.sweeps import Sweep


def study(options: argparse.Namespace) -> None:
    """`gradlab study`: list the studies, or run one and print its report.

    Args:
        options: The parsed command line.

    Raises:
        Failed: If runs failed; the report is then of the others.
    """
    from analyses.studies import STUDIES, report_of, run_study

    if options.name == "list":
        for name, known in STUDIES.items():
            print(f"{name}: {known.question} Budgets: {', '.join(known.budgets)}.")
            for report in (report_of(name, _usual_out(name, budget)) for budget in known.budgets):
                if report.exists():
                    print(f"  report: {report}")
        return
    chosen = STUDIES[options.name]
    out = options.out or _usual_out(chosen.name, options.budget)
    words = ["gradlab", "study", chosen.name, "--budget", options.budget, "--out", str(out)]
    failures: list[Failed] = []

    def train(sweep: "Sweep") -> None:
        try:
            train_all(sweep, options, shlex.join(words))
        except Failed as failure:
            failures.append(failure)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns)
    task = bar.add_task(chosen.name, total=None)

    def progress(done: int, total: int) -> None:
        bar.start()  # only of a simulation: trainings have a view of their own
        bar.update(task, completed=done, total=total)

    try:
        report = run_study(chosen, options.budget, out, train=train, progress=progress)
    finally:
        if bar.live.is_started:
            bar.stop()
    Console().print(Markdown(report.read_text(encoding="utf-8")))
    print(f"Report: {report}")
    if failures:
        raise failures[0]


def _usual_out(name: str, budget: str) -> Path:
    return Path("runs", "studies", f"{name}-{budget}")
