"""Commands that train."""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from gradlab.checks import Failed, UsageError
from gradlab.cli.options import given_settings
from gradlab.cli.show import print_conflict, write_dashboard
from gradlab.cli.stopping import Stopped, stop_on_signal
from trainers.config import MAY_DIFFER
from trainers.presets import SETTING, load_preset, merged, preset_names, with_preset
from trainers.settings import make_config

if TYPE_CHECKING:
    from trainers.processes import Group

DEMO = {
    method: {"method": method, "env": "specialisation", "agents": 4}
    for method in ("hypermarl", "fups-id", "nops")
}


def train(options: argparse.Namespace) -> None:
    """`gradlab train`: one run, then its conflict and how to look at it; or a description.

    Of processes that torchrun has started to train together, one speaks for all.

    Args:
        options: The parsed command line.

    Raises:
        UsageError: If an option can't be used.
        Failed: If the training can't go on.
        Stopped: If it was asked to stop.
        SystemExit: As these, where another process says so.
    """
    from trainers.processes import joined

    with joined() as group:
        try:
            with group.together():
                _train(options, group)
        except (UsageError, Failed, Stopped) as error:
            if not group.speaks(error):
                raise SystemExit(1) from None
            raise


def _train(options: argparse.Namespace, group: "Group") -> None:
    settings = given_settings(options)
    if settings.get(SETTING) == "list":
        if group.rank == 0:
            _print_presets()
        return
    if options.resume:
        if options.describe:
            raise UsageError("--describe trains nothing. Leave out --resume.")
        if options.out is None:
            raise UsageError("--resume needs the run to go on with. Add --out DIR.")
        settings = _resumed_settings(options.out, settings)
    else:
        settings = with_preset(settings)
    if options.describe:
        if group.rank == 0:
            _describe(settings)
        return
    config = make_config(settings)
    out = options.out or Path(group.first(lambda: str(_new_folder(config))))
    with _progress() as bar:
        _train_run(settings, out, bar, group, resume=options.resume)
    if group.rank > 0:
        return
    if config.diagnostics != "off":
        print_conflict([out])
    print(f"Run: {out}\nDashboard: gradlab dashboard {out} --html {out}.html")
    if preset := settings.get(SETTING):
        for sentence in load_preset(preset).differs:
            print(f"Not as in the paper: {sentence}.")


def _print_presets() -> None:
    """Print the presets that ship."""
    from trainers.envs import environment_names

    here = set(environment_names())
    shown = Table(
        Column("preset", no_wrap=True),  # to be copied, so never cut off
        Column("environment", overflow="fold"),
        "agents",
        "in the paper",
        "here",
    )
    for name in preset_names():
        preset = load_preset(name)
        config = make_config(preset.under({}))
        shown.add_row(
            name,
            config.env,
            str(config.agents),
            ", ".join(preset.algorithms),
            "yes" if config.env in here else "no",
        )
    Console().print(shown)


def _describe(settings: Mapping[str, Any]) -> None:
    """Print what would be trained."""
    from trainers.description import describe_networks
    from trainers.loop import Trainer

    trainer = Trainer(make_config(settings))
    for network in describe_networks(trainer):
        widths = " -> ".join(map(str, network.widths))
        print(f"{network.network}: {network.method}, {widths}, {network.activation}")
        shown = Table(
            "layer",
            "form",
            Column("theta of each agent", justify="right"),
            Column("psi of all", justify="right"),
        )
        for layer in network.layers:
            shown.add_row(layer.name, layer.form, f"{layer.theta:,}", f"{layer.psi:,}")
        shown.add_section()
        shown.add_row("all", "", f"{network.theta:,}", f"{network.psi:,}")
        Console().print(shown)
        print(f"J_i: {network.jacobian}.\n")
    psi = sum(network.psi for network in describe_networks(trainer))
    print(f"{trainer.spec.agents} agents; {psi:,} trained parameters.")


def demo(options: argparse.Namespace) -> None:
    """`gradlab demo`: three sharing schemes on one game, compared; runs that exist are kept.

    Args:
        options: The parsed command line.
    """
    from gradlab.run import open_run
    from gradlab.run_writer import is_run
    from trainers.processes import ALONE
    from trainers.train import check_same_settings

    folders = {options.out / method: settings for method, settings in DEMO.items()}
    page = options.out / "dashboard.html"
    with _progress() as bar:
        report = bar.add_task("report", total=1, start=False, rate="", last="")
        for folder, settings in folders.items():
            if is_run(folder):
                check_same_settings(make_config(settings), folder)
            if not (is_run(folder) and open_run(folder).state == "done"):
                _train_run(settings, folder, bar, ALONE, resume=is_run(folder))
        bar.start()
        bar.start_task(report)
        write_dashboard(list(folders), page)
        bar.advance(report)
    print_conflict(list(folders))
    print(f"Dashboard: {page}")


def _train_run(
    settings: Mapping[str, Any], out: Path, bar: Progress, group: "Group", *, resume: bool
) -> None:
    from trainers.processes import command
    from trainers.train import train_run

    config = make_config(settings)
    task = bar.add_task(config.scheme, total=config.frames, rate="", last="")

    def progress(frames: int, last: float) -> None:
        bar.start()  # only now, as what can't be trained has no progress to show
        speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
        bar.update(
            task,
            completed=min(frames, config.frames),
            rate=f"{speed:,.0f} frames/s" if speed else "",
            last="" if math.isnan(last) else f"return {last:.3f}",
        )

    def tell(sentence: str) -> None:
        print(f"gradlab: {sentence}", file=sys.stderr)

    shown: dict[str, Any] = {"progress": progress, "tell": tell} if group.rank == 0 else {}
    with stop_on_signal() as stop:
        finished = train_run(config, out, resume=resume, stop=stop, group=group, **shown)
    if not finished:
        again = f"{command(group.size)} --resume --out {out}"
        raise Stopped(f"stopped and saved. To go on: {again}")


def _resumed_settings(out: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run to go on with; `MAY_DIFFER` says which may change."""
    from gradlab.run import open_run
    from trainers.checkpoints import newest_checkpoint
    from trainers.train import check_frames, check_same_settings

    run = open_run(out)
    kept = run.config
    if not kept and (run.quantities or newest_checkpoint(out)[0]):
        raise UsageError(f"{out} can't be resumed: its run.json is lost or damaged.")
    if not kept and not given:
        raise UsageError(
            f"{out} was cut off before its settings were written; it had done nothing. Give them "
            "again, with --resume."
        )
    if not kept:
        return with_preset(given)
    config = make_config(merged(kept, given))
    check_same_settings(config, out, but=MAY_DIFFER)
    checkpoint, _ = newest_checkpoint(out)
    if checkpoint:
        check_frames(config, out, checkpoint)
        if checkpoint.update + 1 == config.updates:
            raise UsageError(
                f"{out} has all {config.frames:,} frames. To train on, ask for more with --frames."
            )
    return config.model_dump(mode="json")


def _new_folder(config: Any) -> Path:  # noqa: ANN401
    name = f"{config.scheme}-{config.env.replace('/', '-')}"
    return next(
        folder for i in range(sys.maxsize) if not (folder := Path("runs", f"{name}-{i}")).exists()
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar that is not shown before it is started."""
    bar = Progress(
        TextColumn("{task.description:15}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )
    try:
        yield bar
    finally:
        if bar.live.is_started:
            bar.stop()
