"""The command that runs studies."""

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def study(options: argparse.Namespace) -> None:
    """`gradlab study`: list the studies, or run one and print its report.

    Args:
        options: The parsed command line.
    """
    from analyses.studies import STUDIES, run_study

    if options.name == "list":
        for name, known in STUDIES.items():
            print(f"{name}: {known.question} Budgets: {', '.join(known.budgets)}.")
        return
    chosen = STUDIES[options.name]
    out = options.out or Path("runs", "studies", f"{chosen.name}-{options.budget}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(chosen.name, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        workers = os.cpu_count() or 1
        text = run_study(chosen, options.budget, out, workers=workers, progress=progress)
    Console().print(Markdown(text))
    print(f"Report: {out / 'report.md'}")
