"""The command that evaluates a run."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from gradlab.checks import Failed

if TYPE_CHECKING:
    from gradlab.run import Run
    from trainers.evaluation import Evaluation


def update_number(text: str) -> int | None:
    """Read what `--update` says.

    Args:
        text: A number, or "last".

    Returns:
        The number, None for the newest.

    Raises:
        ArgumentTypeError: If it says neither.
    """
    if text != "last" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or last. Got {text!r}")
    return None if text == "last" else int(text)


def evaluate(options: argparse.Namespace) -> None:
    """`gradlab evaluate`: play whole episodes with a run's policies, and keep what they brought.

    Args:
        options: The parsed command line.

    Raises:
        Failed: If the numbers can't be kept or the episode can't be drawn, which is told after
            the numbers; or if what the environment gives is not finite.
    """
    from gradlab.run import open_run
    from trainers.animation import Animation
    from trainers.evaluation import evaluate as evaluate_run

    run = open_run(options.run)
    film = None if options.animate is None else Animation(options.animate)
    found = evaluate_run(
        run,
        episodes=options.episodes,
        deterministic=None if options.deterministic is None else options.deterministic == "true",
        seed=options.seed,
        update=options.update,
        watch=film or (lambda _: None),
    )
    for problem in [*run.problems, *found.notes]:
        print(f"gradlab: {run.path}: {problem}", file=sys.stderr)
    if options.format == "json":
        print(json.dumps({"run": str(run.path), **found.document()}, indent=2))
    else:
        _print(run, found)
    try:
        kept = found.save(run.path)
    except OSError as error:
        raise Failed(
            f"{run.path} can't be written to: {error.strerror}. Nothing was kept."
        ) from None
    frames = 0 if film is None else film.write()
    if options.format == "table":
        print(f"Kept: {kept}")
        if film is not None:
            print(f"Animation: {options.animate}, {frames} frames of the first episode")


def _print(run: "Run", found: "Evaluation") -> None:
    """Print means and intervals, an agent a row."""
    from trainers.episodes import mean_interval, rate_interval

    episodes = found.episodes
    columns = {"return": episodes.returns, **episodes.metrics}
    cells = {}
    for name, values in columns.items():
        of_all, of_agents = mean_interval(values.nanmean(0)), mean_interval(values)
        cells[name] = [_with_interval(*map(float, of_all))]
        cells[name] += [_with_interval(*map(float, ends)) for ends in zip(*of_agents, strict=True)]
    shown = Table(
        "agent",
        *(Column(name, justify="right") for name in columns),
        title=f"{run.path}: {run.method} on {run.environment}",
        caption="Means over episodes of sums over their steps, ± half a 95 % interval",
    )
    for row, name in enumerate(["mean of all", *found.agent_names]):
        shown.add_row(name, *(cells[column][row] for column in columns), end_section=row == 0)
    Console().print(shown)
    kind = "deterministic" if found.deterministic else "sampled"
    length = episodes.lengths.double()
    print(
        f"After update {found.update} ({found.update + 1} of {found.planned} are done, "
        f"{found.frames:,} frames; the run is {run.state}). Whole episodes: {len(length)}, {kind}, "
        f"seed {found.seed}, {length.mean().item():.4g} steps on average."
    )
    for name, happened in episodes.outcomes.items():
        rate, low, high = rate_interval(happened)
        print(
            f"{name}: {rate:.1%} of the episodes ({happened.sum()}; 95 % interval {low:.1%} to "
            f"{high:.1%})."
        )


def _with_interval(mean: float, low: float, high: float) -> str:
    if mean != mean:
        return "-"
    interval = "" if low != low else f" ± {(high - low) / 2:.2g}"
    return f"{mean:.4g}{interval}"
