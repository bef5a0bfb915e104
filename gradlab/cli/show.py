"""Commands that show what runs recorded."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gradlab.checks import UsageError

if TYPE_CHECKING:  # pandas takes half a second, and `gradlab --help` needs none of it
    import pandas as pd

    from gradlab.run import Run

SUMMARY = "summary"


def conflict(options: argparse.Namespace) -> None:
    """`gradlab conflict`: the summary, or one quantity, of runs side by side.

    Args:
        options: The parsed command line.
    """
    if options.explain:
        _explain(options)
        return
    if options.quantity == SUMMARY:
        print_conflict(options.runs, options.network, options.layer, options.format)
        return
    from analyses.conflict import quantity_table
    from gradlab.run import open_runs

    runs = open_runs(*options.runs)
    where = {"network": options.network, "layer": options.layer, "space": options.space}
    table = quantity_table(runs, options.quantity, where)
    _print_problems(runs)
    _print_table(table, options.format, options.quantity)


def _explain(options: argparse.Namespace) -> None:
    from analyses.conflict import explain
    from gradlab.run import open_runs

    runs = open_runs(*options.runs)
    where = {"network": options.network, "layer": options.layer}
    sentences = [explain(run, *options.explain, **where) for run in runs]
    _print_problems(runs)
    print("\n".join(sentences))


def print_conflict(
    folders: Sequence[Path], network: str = "actor", layer: str = "all", form: str = "table"
) -> None:
    """Print the conflict summary of runs side by side.

    Args:
        folders: The runs, or folders that hold runs.
        network: "actor" or "critic".
        layer: A layer's name, or "all".
        form: "table", "csv" or "json".
    """
    from analyses.conflict import conflict_table
    from gradlab.run import open_runs

    runs = open_runs(*folders)
    table = conflict_table(runs, network=network, layer=layer)
    _print_problems(runs)
    if form != "table":
        _print_table(table, form, "")
        return
    title = (
        f"Gradient conflict ({network}, {layer}): rates count verdicts at 5 % false discoveries; "
        "negative rates and mean cosines are naive"
    )
    shown = Table("", *(str(name) for name in table["run"]), title=title)
    for name in table.columns[1:]:
        shown.add_row(str(name), *(_text(value) for value in table[name]))
    Console().print(shown)


def dashboard(options: argparse.Namespace) -> None:
    """`gradlab dashboard`: write one self-contained page, or serve pages until Ctrl-C.

    Args:
        options: The parsed command line.

    Raises:
        UsageError: If an option for serving is given without `--serve`.
    """
    if options.serve:
        _serve(options)
        return
    for name in ("host", "port", "allowed_host"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"`{option}` is for a server. Add --serve instead of --html.")
    write_dashboard(options.runs, options.html)
    print(f"Dashboard: {options.html}")


def _serve(options: argparse.Namespace) -> None:
    from dashboards.live import serve

    given = {name: getattr(options, name) for name in ("host", "port")}
    serve(
        options.runs,
        **{name: value for name, value in given.items() if value is not None},
        allowed_hosts=options.allowed_host or (),
        announce=lambda address: print(f"Dashboard: {address}\nCtrl-C ends it.", flush=True),
    )


def write_dashboard(folders: Sequence[Path], page: Path) -> None:
    """Write the page of some runs.

    Args:
        folders: The runs, or folders that hold runs.
        page: The file to write.

    Raises:
        UsageError: If a run can't be read or the file can't be written.
    """
    from dashboards import write_page
    from gradlab.run import open_runs

    runs = open_runs(*folders)
    try:
        write_page(runs, page)
    except OSError as error:
        raise UsageError(
            f"{page} can't be written: {error.strerror}. Choose another --html."
        ) from None
    _print_problems(runs)


def export(options: argparse.Namespace) -> None:
    """`gradlab export`: all that a run recorded, or one agent's policy, for other tools.

    Args:
        options: The parsed command line.

    Raises:
        UsageError: If the format does not go with what is to be exported.
    """
    from analyses.export import FORMATS
    from analyses.export import export as export_run
    from gradlab.run import open_run
    from trainers.policy_files import POLICY_FORMATS, export_policy

    if options.agent is None and options.to in POLICY_FORMATS:
        raise UsageError(f"`--to {options.to}` is for a policy. Say whose: add --agent 0.")
    if options.agent is not None and options.to in FORMATS:
        raise UsageError(
            f"`--to {options.to}` is for what a run recorded. Leave out --agent, or choose from "
            f"{', '.join(POLICY_FORMATS)}."
        )
    run = open_run(options.run)
    if options.agent is None:
        export_run(run, options.to, options.file)
    else:
        export_policy(run, options.agent, options.to, options.file)
    _print_problems([run])
    print(f"Exported: {options.file}")


def runs(options: argparse.Namespace) -> None:
    """`gradlab runs`: list the runs in a folder; a run that can't be read does not hide others.

    Args:
        options: The parsed command line.

    Raises:
        UsageError: If there is no such folder, or no run in it.
    """
    from analyses.listing import list_runs

    if not options.folder.is_dir():
        raise UsageError(f"{options.folder} is not a folder. Give the folder that holds the runs.")
    found = list_runs(options.folder)
    if found.empty:
        raise UsageError(
            f"{options.folder} holds no run, at no depth. Give the folder that holds the runs, or "
            f"make one: gradlab train --out {options.folder / 'first'}"
        )
    _print_table(found, "table", f"Runs in {options.folder}")


def _print_problems(runs: "Sequence[Run]") -> None:
    for item in runs:
        for problem in item.problems:
            print(f"gradlab: {item.path}: {problem}", file=sys.stderr)


def _print_table(table: "pd.DataFrame", form: str, title: str) -> None:
    if form == "csv":
        print(table.to_csv(index=False).rstrip())
    elif form == "json":
        print(json.dumps(json.loads(table.to_json(orient="records")), indent=2))
    else:
        shown = Table(*map(str, table.columns), title=title)
        for row in table.itertuples(index=False):
            shown.add_row(*map(_text, row))
        Console().print(shown)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.4g}"
    return str(value)
