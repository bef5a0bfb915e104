"""A run in files that other tools read."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import xarray as xr

from gradlab.checks import UsageError
from gradlab.registry import Registry
from gradlab.run import Run


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


FORMATS: Registry[Callable[[Run, Path], None]] = Registry(
    "format", {"netcdf": _netcdf, "parquet": _parquet, "csv": _csv}
)


def export(run: Run, form: str, file: Path) -> None:
    """Write all that a run recorded into one file.

    Args:
        run: The run.
        form: A name in `FORMATS`.
        file: The file, which is written over.

    Raises:
        UsageError: If there is no such format or nothing recorded, or the file can't be written.
    """
    write = FORMATS[form]
    try:
        write(run, file)
    except OSError as error:
        raise UsageError(
            f"{file} can't be written: {error.strerror or error}. Choose another file."
        ) from error
