"""The command line: reads arguments, builds the parts, runs them, shows the result."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gradlab.checks import Failed, TrainingFailed, UsageError, unknown_name
from gradlab.cli import evaluate, show, study, sweep, train
from gradlab.cli.options import add_settings
from gradlab.cli.stopping import Stopped

_INTERRUPTED = 130  # what shells report for Ctrl-C


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 -- argparse's own
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` lists what there is.")


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted.
    """
    try:
        options, unknown = _parser().parse_known_args(arguments)
        if unknown:
            raise _unknown_option(unknown[0], options.parser)
        options.command(options)
    except UsageError as error:
        print(f"gradlab: error: {error}", file=sys.stderr)
        return 2
    except TrainingFailed as failure:
        print(f"gradlab: training failed: {failure}", file=sys.stderr)
        return 1
    except Failed as failure:
        print(f"gradlab: {failure}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"gradlab: {stopped}", file=sys.stderr)
        return _INTERRUPTED
    except KeyboardInterrupt:
        print("gradlab: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _unknown_option(text: str, parser: argparse.ArgumentParser) -> UsageError:
    if not text.startswith("-"):
        return UsageError(f"{text!r} is one argument too many for `{parser.prog}`.")
    known = [option for action in parser._actions for option in action.option_strings]
    return unknown_name(f"option of `{parser.prog}`", text.partition("=")[0], known)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gradlab",
        description="Which agents' gradients interfere, how much of it is real, and where it "
        "comes from.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    add = commands.add_parser("train", help="train with diagnostics, and show the conflict")
    add.add_argument("--config", type=Path, metavar="FILE", help="settings as YAML; options win")
    add.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder (default: a new one in runs/)"
    )
    add.add_argument("--resume", action="store_true", help="go on with the run in --out")
    add.add_argument(
        "--describe",
        action="store_true",
        help="print the networks' layers, sizes and J_i, and train nothing",
    )
    add_settings(add)
    add.set_defaults(command=train.train, parser=add)

    add = commands.add_parser("demo", help="three methods on the Specialisation game, compared")
    add.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    add.set_defaults(command=train.demo, parser=add)

    add = commands.add_parser("evaluate", help="play whole episodes with a run's policies")
    add.add_argument("run", type=Path, metavar="RUN")
    add.add_argument(
        "--episodes", type=int, metavar="N", help="whole episodes (default: the run's setting)"
    )
    add.add_argument(
        "--deterministic",
        choices=["true", "false"],
        help="act by the likeliest action, or draw it (default: the run's setting)",
    )
    add.add_argument(
        "--seed", type=int, metavar="S", help="seed of the episodes (default: the run's setting)"
    )
    add.add_argument(
        "--update",
        type=evaluate.update_number,
        metavar="U",
        help="the update whose checkpoint to take, or last (default)",
    )
    add.add_argument(
        "--animate", type=Path, metavar="FILE", help="draw the first episode: FILE.gif or FILE.mp4"
    )
    add.add_argument("--format", choices=["table", "json"], default="table")
    add.set_defaults(command=evaluate.evaluate, parser=add)

    add = commands.add_parser("conflict", help="show which agents' gradients conflict")
    add.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one that holds runs"
    )
    add.add_argument(
        "--quantity",
        default=show.SUMMARY,
        metavar="NAME",
        help="a recorded quantity instead of the summary, e.g. cosine, transference or snd",
    )
    add.add_argument("--network", default="actor", help="actor (default) or critic")
    add.add_argument("--layer", default="all", help="a layer's name, or all (default)")
    add.add_argument("--space", default="psi", help="psi (g, default) or theta (Z)")
    add.add_argument(
        "--explain", nargs=2, type=int, metavar=("I", "K"), help="say in words what two agents do"
    )
    add.add_argument("--format", choices=["table", "csv", "json"], default="table")
    add.set_defaults(command=show.conflict, parser=add)

    add = commands.add_parser("dashboard", help="look at runs, also while they train")
    add.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder, or one that holds runs",
    )
    form = add.add_mutually_exclusive_group(required=True)
    form.add_argument("--html", type=Path, metavar="FILE", help="one page that works offline")
    form.add_argument(
        "--serve", action="store_true", help="pages in a browser that follow running trainings"
    )
    add.add_argument("--port", type=int, help="of the server, 0 for any free one (default: 8050)")
    add.add_argument(
        "--host",
        help="where the server listens (default: 127.0.0.1, this machine alone; others have to "
        "show the token that it prints)",
    )
    add.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        help="a further name that browsers may call the server by, as a proxy's; may be repeated",
    )
    add.set_defaults(command=show.dashboard, parser=add)

    add = commands.add_parser(
        "export", help="write all that a run recorded, or an agent's policy, for other tools"
    )
    add.add_argument("run", type=Path, metavar="RUN")
    add.add_argument("file", type=Path, metavar="FILE", help="the file, or the tool's folder")
    add.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="netcdf, zarr, parquet, csv, tensorboard, wandb or mlflow; with --agent onnx or "
        "torchscript",
    )
    add.add_argument("--agent", type=int, metavar="I", help="this agent's policy, not the records")
    add.set_defaults(command=show.export, parser=add)

    add = commands.add_parser("runs", help="list the runs in a folder")
    add.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR")
    add.set_defaults(command=show.runs, parser=add)

    add = commands.add_parser("sweep", help="train a grid of settings side by side")
    add.add_argument("file", type=Path, metavar="FILE", help="the grid, as YAML")
    add.add_argument(
        "--out", type=Path, metavar="DIR", help="the runs' folder (default: runs/ and FILE's name)"
    )
    add.add_argument("--list", action="store_true", help="name the runs, and train nothing")
    sweep.add_engine(add)
    add.set_defaults(command=sweep.sweep, parser=add)

    add = commands.add_parser("study", help="answer a question of the literature by training")
    add.add_argument("name", metavar="NAME", help="a study's name, or list")
    add.add_argument(
        "--budget",
        default="quick",
        help="quick (default): minutes on two cores; standard: a night; full: the paper's",
    )
    add.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of its runs and report (default: one in runs/studies)",
    )
    sweep.add_engine(add)
    add.set_defaults(command=study.study, parser=add)
    return parser
