"""The command line: reads arguments, builds the parts, runs them, shows the result."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gradlab.checks import UsageError, unknown_name

_TOP = (
    "method",
    "algorithm",
    "env",
    "agents",
    "frames",
    "copies",
    "steps",
    "seed",
    "threads",
    "diagnostics",
    "every",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` lists what there is.")


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit status: 0 done, 2 bad usage.
    """
    try:
        options = _parser().parse_args(arguments)
        options.command(options)
    except UsageError as error:
        print(f"gradlab: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gradlab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train with diagnostics")
    for name in _TOP:
        train.add_argument(f"--{name}", default=argparse.SUPPRESS)
    train.add_argument("--env-arg", action="append", default=[], metavar="NAME=VALUE")
    train.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    train.add_argument("--out", type=Path)
    train.set_defaults(command=_train)

    demo = commands.add_parser("demo", help="three methods on the Specialisation game, compared")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    demo.set_defaults(command=_demo)

    conflict = commands.add_parser("conflict", help="which agents' gradients conflict")
    conflict.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    conflict.add_argument("--network", default="actor")
    conflict.add_argument("--layer", default="all")
    conflict.add_argument("--format", choices=["table", "csv", "json"], default="table")
    conflict.set_defaults(command=_conflict)

    dashboard = commands.add_parser("dashboard", help="write a page to look at")
    dashboard.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    dashboard.add_argument("--html", type=Path, required=True, metavar="FILE")
    dashboard.set_defaults(command=_dashboard)

    runs = commands.add_parser("runs", help="list the runs in a folder")
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR")
    runs.set_defaults(command=_runs)
    return parser


def _train(options: argparse.Namespace) -> None:
    import yaml

    settings: dict[str, Any] = {
        name: yaml.safe_load(getattr(options, name)) for name in _TOP if hasattr(options, name)
    }
    settings["env_args"] = dict(_assignment(text) for text in options.env_arg)
    for text in options.set:
        path, value = _assignment(text)
        section, _, field = path.rpartition(".")
        target = settings.setdefault(section, {}) if section else settings
        target[field] = value
    out = options.out
    if out is None:
        method = settings.get("method", "hypermarl")
        out = (
            Path("runs")
            / f"{method}-{str(settings.get('env', 'specialisation')).replace('/', '-')}"
        )
        out = next(p for i in range(10**6) if not (p := Path(f"{out}-{i}")).exists())
    _train_one(settings, out)
    _show_conflict([out], "actor", "all", "table")
    print(f"Run: {out}\nDashboard: gradlab dashboard {out} --html {out}.html")


def _demo(options: argparse.Namespace) -> None:
    folders = [options.out / method for method in ("hypermarl", "fups-id", "nops")]
    for folder in folders:
        _train_one({"method": folder.name, "env": "specialisation", "agents": 4}, folder)
    _show_conflict(folders, "actor", "all", "table")
    from dashboards import write_page
    from gradlab.run import open_run

    page = options.out / "dashboard.html"
    write_page([open_run(folder) for folder in folders], page)
    print(f"Dashboard: {page}")


def _train_one(settings: dict[str, Any], out: Path) -> None:
    from pydantic import ValidationError
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from gradlab.run_writer import RunWriter
    from trainers.config import TrainConfig
    from trainers.loop import Trainer, describe

    try:
        config = TrainConfig.model_validate(settings)
    except ValidationError as error:
        raise _setting_error(error, TrainConfig) from None
    trainer = Trainer(config)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("return {task.fields[last]:.3f}"),
    )
    with RunWriter(out) as writer, Progress(*columns) as bar:
        writer.describe(**describe(trainer), state="running")
        task = bar.add_task(config.method, total=config.frames, rate="", last=float("nan"))

        def progress(frames: int, last: float) -> None:
            speed = bar.tasks[task].speed
            rate = f"{speed:,.0f} frames/s" if speed else ""
            bar.update(task, completed=frames, rate=rate, last=last)

        try:
            trainer.run(writer, progress)
        except KeyboardInterrupt:
            writer.describe(state="stopped")
            raise UsageError(f"stopped; what was recorded is in {out}") from None
        writer.describe(state="done")


def _setting_error(error: Any, config: Any) -> UsageError:  # noqa: ANN401
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owner = config
        for part in first["loc"][:-1]:
            owner = owner.model_fields[part].annotation
        return unknown_name("setting", where, owner.model_fields)
    return UsageError(f"`{where}`: {first['msg']}. Got {where}={first['input']!r}.")


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    name, separator, value = text.partition("=")
    if not (name and separator):
        raise UsageError(f"an assignment must read NAME=VALUE. Got {text!r}.")
    return name, yaml.safe_load(value)


def _conflict(options: argparse.Namespace) -> None:
    _show_conflict(options.runs, options.network, options.layer, options.format)


def _show_conflict(folders: Sequence[Path], network: str, layer: str, form: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from analyses.conflict import conflict_table
    from gradlab.run import open_run

    runs = [open_run(folder) for folder in folders]
    table = conflict_table(runs, network=network, layer=layer)
    for item in runs:
        for problem in item.problems:
            print(f"gradlab: {item.path}: {problem}", file=sys.stderr)
    if form == "csv":
        print(table.to_csv(index=False).rstrip())
    elif form == "json":
        print(json.dumps(json.loads(table.to_json(orient="records")), indent=2))
    else:
        title = f"Gradient conflict ({network}, {layer}): naive plug-in figures of one rollout"
        shown = Table("", *(str(name) for name in table["run"]), title=title)
        for name in table.columns[1:]:
            values = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in table[name])
            shown.add_row(str(name), *values)
        Console().print(shown)


def _dashboard(options: argparse.Namespace) -> None:
    from dashboards import write_page
    from gradlab.run import open_run

    write_page([open_run(folder) for folder in options.runs], options.html)
    print(f"Dashboard: {options.html}")


def _runs(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from gradlab.run import open_run
    from gradlab.run_writer import is_run

    if not options.folder.is_dir():
        raise UsageError(f"{options.folder} is not a folder. Give the folder that holds the runs.")
    table = Table("run", "method", "environment", "frames", "last return", "state")
    for folder in sorted(p for p in options.folder.rglob("*") if p.is_dir() and is_run(p)):
        try:
            item = open_run(folder)
            known = {
                n: item.quantity(n).dropna("update")
                for n in item.quantities
                if n in ("frames", "episode_return")
            }
            last = {n: f"{float(a[-1]):,.4g}" if a.size else "-" for n, a in known.items()}
            table.add_row(
                str(folder),
                item.method,
                item.environment,
                last.get("frames", "-"),
                last.get("episode_return", "-"),
                item.state,
            )
        except UsageError as error:  # noqa: PERF203 -- one bad run must not hide the others
            table.add_row(str(folder), "-", "-", "-", "-", str(error))
    Console().print(table)
