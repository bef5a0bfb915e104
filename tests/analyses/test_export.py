import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import nn

import gradlab
from gradlab.cli import run as command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "run"
    torch.manual_seed(0)

    def loss(policy, sample):
        return policy(sample["x"]).square().sum()

    with gradlab.Probe(nn.Linear(3, 2), loss, agents=2, every=2, out=path) as probe:
        for step in range(3):
            x = torch.randn(2, 32, 3)
            probe({"x": x}, copy=torch.arange(32) % 16, scalars={"episode_return": step + 0.5})
    return path


def test_netcdf_gives_back_what_was_recorded(folder, tmp_path, capsys):
    assert command(["export", str(folder), "--to", "netcdf", str(tmp_path / "a.nc")]) == 0
    assert "Exported" in capsys.readouterr().out
    with xr.open_dataset(tmp_path / "a.nc", engine="scipy") as found:
        same_as_recorded(found, folder)


def test_zarr_gives_back_what_was_recorded(folder, tmp_path, capsys):
    pytest.importorskip("zarr")
    store = tmp_path / "a.zarr"
    for _ in range(2):  # what stands there is written over
        assert command(["export", str(folder), "--to", "zarr", str(store)]) == 0
    with xr.open_zarr(store) as found:
        same_as_recorded(found, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert command(["export", str(folder), "--to", "zarr", str(tmp_path / "mine")]) == 2
    assert "no Zarr store" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").exists()


def same_as_recorded(found, folder):
    run = gradlab.open_run(folder)
    xr.testing.assert_allclose(found["cosine"].dropna("update", how="all"), run.quantity("cosine"))
    assert found["norm"].attrs == run.quantity("norm").attrs
    assert found["episode_return"].values.tolist() == [0.5, 1.5, 2.5]
    rows = found["embedding_actor"].dropna("update", how="all")
    np.testing.assert_array_equal(rows, run.embeddings["actor"])
    assert found.attrs["environment"] == "own loop"


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_table_has_a_row_for_every_number(form, folder, tmp_path):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / "table"
    assert command(["export", str(folder), "--to", form, str(file)]) == 0
    table = pd.read_csv(file) if form == "csv" else pd.read_parquet(file)
    run = gradlab.open_run(folder)
    assert len(table) == sum(run.quantity(name).size for name in run.quantities)
    norm = run.quantity("norm").sel(network="actor", space="psi", layer="all", agent=1, update=2)
    row = table.query(
        "quantity == 'norm' and space == 'psi' and layer == 'all' and agent == 1 and update == 2"
    )
    np.testing.assert_allclose(row["value"], [norm], rtol=1e-12)
    returns = table.query("quantity == 'episode_return'")
    assert returns["value"].tolist() == [0.5, 1.5, 2.5]
    assert returns["agent"].isna().all()


@pytest.mark.parametrize(
    ("form", "file", "message"),
    [("cvs", "a", "Did you mean 'csv'"), ("csv", "no/such/a", "can't be written")],
)
def test_what_cannot_be_exported_is_said(form, file, message, folder, tmp_path, capsys):
    assert command(["export", str(folder), "--to", form, str(tmp_path / file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
