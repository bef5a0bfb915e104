import json

import numpy as np
import pytest
import torch
import xarray as xr

from gradlab.checks import UsageError
from gradlab.probe import SKETCH_SIZE, sketch
from gradlab.run import open_run
from gradlab.run_writer import RunWriter


def record(folder, updates=300):
    with RunWriter(folder) as writer:
        writer.describe(method="fups", state="done", updates=updates)
        for update in range(updates):
            writer.write(update, {"matrix": xr.DataArray(np.full((9, 9), update), dims=("a", "b"))})
    return folder


def test_run_returns_what_was_written(tmp_path):
    run = open_run(record(tmp_path / "r"))
    assert run.problems == []
    assert run.state == "done"
    np.testing.assert_array_equal(run.quantity("matrix")[:, 3, 4], np.arange(300))
    assert run.metrics.sizes == {"update": 300, "a": 9, "b": 9}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_cut_off_records_show_what_is_whole_and_say_what_is_missing(tmp_path, share):
    file = record(tmp_path / "r") / "records.sqlite"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    run = open_run(tmp_path / "r")
    values = run.quantity("matrix")[:, 0, 0].values
    np.testing.assert_array_equal(values, np.arange(len(values)))
    assert 0 < len(values) < 300
    assert f"whole up to update {len(values) - 1} of 300 planned" in " ".join(run.problems)


def test_lost_description_is_a_problem_not_an_error(tmp_path):
    (record(tmp_path / "r") / "run.json").unlink()
    run = open_run(tmp_path / "r")
    assert "run.json is missing" in run.problems[0]
    assert run.quantity("matrix").sizes["update"] == 300


def test_newer_schema_is_refused(tmp_path):
    file = record(tmp_path / "r") / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 99}))
    with pytest.raises(UsageError, match="schema version 99"):
        open_run(tmp_path / "r")


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is an empty folder"):
        open_run(tmp_path)


def test_folded_rows_keep_distances():
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 20_000, generator=random, dtype=torch.float64)
    folded = sketch(rows)
    assert folded.shape == (6, SKETCH_SIZE)
    kept = torch.pdist(folded) / torch.pdist(rows)
    assert (kept - 1).abs().max() < 4 * 0.5 * (2 / SKETCH_SIZE) ** 0.5
    torch.testing.assert_close(sketch(rows[:2] - rows[2:4]), folded[:2] - folded[2:4])
