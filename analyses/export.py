"""A run in files that other tools read."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import xarray as xr

from gradlab.checks import Failed, UsageError
from gradlab.extras import require
from gradlab.quantity import Quantity
from gradlab.registry import Registry
from gradlab.run import Run
from gradlab.sinks.known import SINKS
from gradlab.sinks.record import Record
from gradlab.sinks.sink import About, Sink

_BLOCK = 64  # updates that are read at once


def long_table(run: Run) -> pd.DataFrame:
    """All recorded numbers, a row each.

    Args:
        run: A run.

    Returns:
        Columns `quantity`, `update`, each axis that any quantity has (empty where one lacks it),
        `value` and `unit`; of the embeddings too, as `embedding_actor` and so on.

    Raises:
        UsageError: If nothing is recorded.
    """
    tables = []
    for name in run.quantities:
        array = run.quantity(name)
        table = array.rename("value").to_dataframe().reset_index()
        tables.append(table.assign(quantity=name, unit=array.attrs["unit"]))
    if not tables:
        raise UsageError(f"{run.path} has no records to export.")
    whole = pd.concat(tables, ignore_index=True)
    ends = ["value", "unit"]
    axes = [c for c in whole.columns if c not in {"quantity", "update", *ends}]
    # Numbers of agents stay whole numbers beside quantities without agents.
    whole = whole.assign(**{axis: whole[axis].convert_dtypes() for axis in axes})
    return whole[["quantity", "update", *axes, *ends]]


def labelled(run: Run) -> xr.Dataset:
    """All that is recorded, labelled, with what run.json says.

    Args:
        run: A run.

    Returns:
        `Run.metrics` and the embeddings as `embedding_actor` and so on, NaN at updates at which a
        quantity was not recorded.
    """
    named = {f"embedding_{network}": rows for network, rows in run.embeddings.items()}
    rows = {name: array.rename(feature=f"feature_{name}") for name, array in named.items()}
    found = xr.merge([run.metrics, *(a.rename(n) for n, a in rows.items())], join="outer")
    about = {"run": run.name, "method": run.method, "environment": run.environment}
    return found.assign_attrs(about, state=run.state)


def _netcdf(run: Run, file: Path) -> None:
    labelled(run).to_netcdf(file, engine="scipy")


def _csv(run: Run, file: Path) -> None:
    long_table(run).to_csv(file, index=False)


def _parquet(run: Run, file: Path) -> None:
    table = long_table(run)
    try:
        table.to_parquet(file, engine="pyarrow", index=False)
    except ImportError as error:
        raise UsageError(
            "Parquet needs pyarrow: pip install 'gradlab[parquet]'. CSV and NetCDF need nothing."
        ) from error


def _zarr(run: Run, folder: Path) -> None:
    require("zarr", "zarr", needs="Zarr needs")
    if folder.exists() and not (folder / ".zgroup").is_file():  # all of it would be removed
        raise UsageError(
            f"{folder} is there, and no Zarr store of gradlab's. Choose another folder."
        )
    # Format 3 has no specification yet of labels that are text.
    labelled(run).to_zarr(folder, mode="w", zarr_format=2, consolidated=True)


def replay(run: Run, sink: Sink) -> None:
    """Hand all that a run recorded to a sink, as if it were being recorded.

    Args:
        run: The run.
        sink: The sink, which is opened and closed.

    Raises:
        UsageError: If nothing is recorded.
    """
    updates = sorted({update for name in run.quantities for update in run.updates(name)})
    if not updates:
        raise UsageError(f"{run.path} has no records to export.")
    sink.open(About(folder=run.path, info=run.info))
    for start in range(0, len(updates), _BLOCK):
        block = updates[start : start + _BLOCK]
        arrays = {
            name: run.quantity(name, since=block[0], until=block[-1]) for name in run.quantities
        }
        found: dict[int, dict[str, Quantity]] = {}
        for name, array in arrays.items():
            for update, part in zip(array["update"].values.tolist(), array, strict=True):
                found.setdefault(update, {})[name] = Quantity.of(part)
        for update, quantities in sorted(found.items()):
            sink.write(Record(update=update, quantities=quantities))
    sink.close(run.state if run.state in {"done", "failed"} else "stopped")


def _to_sink(name: str) -> Callable[[Run, Path], None]:
    def write(run: Run, folder: Path) -> None:
        sink = SINKS[name](folder)
        try:
            replay(run, sink)
        except (UsageError, OSError):
            raise
        except Exception as error:  # whatever a tool raises when its service does not answer
            said = " ".join(str(error).split())
            raise Failed(f"{name} did not take it: {type(error).__name__}: {said}") from error

    return write


FORMATS: Registry[Callable[[Run, Path], None]] = Registry(
    "format",
    {
        "netcdf": _netcdf,
        "zarr": _zarr,
        "parquet": _parquet,
        "csv": _csv,
        **{name: _to_sink(name) for name in SINKS},
    },
)


def export(run: Run, form: str, file: Path) -> None:
    """Write all that a run recorded into one file, or a tool's folder.

    Args:
        run: The run.
        form: A name in `FORMATS`.
        file: The file, which is written over; of sinks the folder, where others may stand already.

    Raises:
        UsageError: If there is no such format or nothing recorded, or the file can't be written.
        Failed: If a tool does not take it.
    """
    write = FORMATS[form]
    try:
        write(run, file)
    except OSError as error:
        raise UsageError(
            f"{file} can't be written: {error.strerror or error}. Choose another file."
        ) from error
