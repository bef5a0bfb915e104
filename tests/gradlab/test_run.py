import json
import os
import platform
import sqlite3
import tracemalloc
from contextlib import closing

import numpy as np
import pytest
import torch
import xarray as xr

from gradlab.checks import UsageError
from gradlab.probe import SKETCH_SIZE, sketch
from gradlab.run import open_run, open_runs
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


def test_a_part_of_a_quantity_is_that_part_of_the_whole(tmp_path):
    labels = {"layer": ["a", "b"], "agent": [0, 1, 2], "other": [0, 1, 2]}
    shape = (5, 2, 3, 3)
    numbers = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with RunWriter(tmp_path / "r") as writer:
        for update, matrix in enumerate(numbers):
            array = xr.DataArray(matrix, dims=tuple(labels), coords=labels)
            writer.write(10 * update, {"matrix": array, "mean": xr.DataArray(matrix.mean())})
    run = open_run(tmp_path / "r")
    whole = run.quantity("matrix")
    assert run.axes("matrix") == labels
    assert run.updates("matrix") == whole["update"].values.tolist() == [0, 10, 20, 30, 40]
    for where in ({}, {"other": 1}, {"layer": "b", "agent": 2}, {"layer": "a", "other": 0}):
        part = run.quantity("matrix", since=10, until=35, where=where)
        xr.testing.assert_identical(
            part, whole.sel(update=slice(10, 35)).sel(where).drop_vars(where)
        )
    assert run.quantity("matrix", since=1, until=9).shape == (0, *shape[1:])
    assert run.quantity("mean", since=40).values.tolist() == [numbers[-1].mean()]
    with pytest.raises(UsageError, match="Unknown layer of matrix 'c'"):
        run.quantity("matrix", where={"layer": "c"})
    with pytest.raises(UsageError, match="Unknown axis of matrix 'space'"):
        run.quantity("matrix", where={"space": "psi"})


def test_a_run_that_is_written_tells_that_it_has_changed(tmp_path):
    with RunWriter(tmp_path / "r") as writer:
        writer.describe(state="running")
        writer.write(0, {"loss": xr.DataArray(1.0)})
        run = open_run(tmp_path / "r")
        versions = [run.version()]
        assert run.version() == versions[0]
        writer.write(1, {"loss": xr.DataArray(0.5)})
        versions.append(run.version())
        assert run.version() == versions[1]
        writer.describe(state="done")
        versions.append(run.version())
    versions.append(run.version())  # the writer has left
    assert len(set(versions)) == 4


def test_versions_are_recorded_and_going_on_in_others_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "r"
    monkeypatch.setattr("gradlab.versions.version", {"torch": "2.9", "vmas": "1.5"}.__getitem__)
    monkeypatch.setattr("gradlab.versions._ALWAYS", ("torch",))
    with RunWriter(folder, packages=["vmas"]) as writer:
        writer.describe(state="stopped")
        assert not writer.notes
    python = platform.python_version()
    assert open_run(folder).versions == {"python": python, "torch": "2.9", "vmas": "1.5"}
    monkeypatch.setattr("gradlab.versions.version", {"torch": "2.13", "vmas": "1.5"}.__getitem__)
    with RunWriter(folder, resume=True, packages=["vmas"]) as writer:
        (note,) = writer.notes
        assert f"{folder} was begun with torch 2.9 (now 2.13): what follows may differ" in note
        writer.describe(state="done")
    assert open_run(folder).versions["torch"] == "2.13"


@pytest.mark.parametrize("said", [3, ["torch"], {"torch": [1] * 99}])
def test_versions_that_somebody_wrote_end_no_run(tmp_path, said):
    folder = tmp_path / "r"
    with RunWriter(folder) as writer:
        writer.describe(state="stopped")
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"versions": said}))
    assert set(open_run(folder).versions) <= {"torch"}
    with RunWriter(folder, resume=True) as writer:
        assert all(len(note) < 300 + len(str(folder)) for note in writer.notes)


def test_a_run_whose_writer_left_without_a_word_died(tmp_path):
    with RunWriter(tmp_path / "r") as writer:
        writer.describe(state="running")
        assert open_run(tmp_path / "r").state == "running"
    assert open_run(tmp_path / "r").state == "died"
    (tmp_path / "r" / "lock").unlink()
    assert open_run(tmp_path / "r").state == "died"
    assert not (tmp_path / "r" / "lock").exists()


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


@pytest.mark.parametrize(("labels", "known"), [(10_000, True), (20_000, False)])
def test_a_size_that_no_record_has_is_not_allocated(tmp_path, labels, known):
    file = record(tmp_path / "r", updates=3) / "records.sqlite"
    axes = json.dumps({axis: list(range(labels)) for axis in ("a", "b")})
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE quantity SET coordinates = ?", (axes,))
    tracemalloc.start()
    try:
        run = open_run(tmp_path / "r")
        if known:
            assert run.quantity("matrix").shape == (0, labels, labels)
            assert run.quantity("matrix", where={"a": 3}).shape == (0, labels)
        else:
            assert "which no file holds" in run.problems[0]
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_folded_rows_keep_distances():
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 20_000, generator=random, dtype=torch.float64)
    folded = sketch(rows)
    assert folded.shape == (6, SKETCH_SIZE)
    kept = torch.pdist(folded) / torch.pdist(rows)
    assert (kept - 1).abs().max() < 4 * 0.5 * (2 / SKETCH_SIZE) ** 0.5
    torch.testing.assert_close(sketch(rows[:2] - rows[2:4]), folded[:2] - folded[2:4])


def test_some_updates_are_read_and_the_newest_is_known(tmp_path):
    with RunWriter(tmp_path / "r") as writer:
        for update in range(0, 20, 2):
            values = {"a": xr.DataArray(float(update))}
            writer.write(update, values | ({"b": xr.DataArray(1.0)} if update < 5 else {}))
    run = open_run(tmp_path / "r")
    assert (run.newest("a"), run.newest("b")) == (18, 4)
    assert run.updates("a", since=11) == [12, 14, 16, 18]
    found = run.quantity("a", at=[2, 3, 16])
    assert found["update"].values.tolist() == found.values.tolist() == [2, 16]
    assert run.quantity("a", at=[]).sizes["update"] == 0


def test_a_record_that_is_not_whole_is_not_the_newest(tmp_path):
    with RunWriter(tmp_path / "r") as writer:
        for update in range(3):
            writer.write(update, {"a": xr.DataArray(np.arange(3.0), dims="x")})
    with closing(sqlite3.connect(tmp_path / "r" / "records.sqlite", isolation_level=None)) as d:
        d.execute('UPDATE record SET array = substr(array, 2) WHERE "update" = 2')
    assert open_run(tmp_path / "r").newest("a") == 1
    with closing(sqlite3.connect(tmp_path / "r" / "records.sqlite", isolation_level=None)) as d:
        d.execute("UPDATE record SET array = x''")
    assert open_run(tmp_path / "r").newest("a") is None


def test_records_that_are_more_than_their_file_holds_are_not_gone_on_reading(tmp_path, monkeypatch):
    with RunWriter(tmp_path / "r") as writer:
        for update in range(9):
            writer.write(update, {"a": xr.DataArray(np.zeros(1000), dims="x")})
    run = open_run(tmp_path / "r")
    assert run.quantity("a").sizes["update"] == 9
    monkeypatch.setattr("gradlab.records.most_stored", lambda _: 20_000)
    for read in (lambda run: run.quantity("a")["update"], lambda run: run.marks("a")):
        run = open_run(tmp_path / "r")
        assert len(read(run)) < 9
        assert "its records are larger than the file" in run.problems[-1]


def test_marks_are_the_records_whole_or_not(tmp_path):
    with RunWriter(tmp_path / "r") as writer:
        for update in range(0, 20, 2):
            writer.write(update, {"a": xr.DataArray(np.arange(3.0), dims="x")})
    with closing(sqlite3.connect(tmp_path / "r" / "records.sqlite", isolation_level=None)) as d:
        d.execute('UPDATE record SET array = substr(array, 2) WHERE "update" = 6')
        d.execute('UPDATE record SET "update" = 8.5 WHERE "update" = 8')
    run = open_run(tmp_path / "r")
    assert run.marks("a").tolist() == [0, 2, 4, 6, 10, 12, 14, 16, 18]
    assert run.marks("a", since=13).tolist() == [14, 16, 18]
    assert run.marks("a", since=19).tolist() == []
    assert run.updates("a") == [0, 2, 4, 10, 12, 14, 16, 18]
    assert run.updates("a", at=[12, 6, 5, 4]) == [4, 12]
    assert run.quantity("a", at=[12, 6, 5, 4])["update"].to_numpy().tolist() == [4, 12]
    with pytest.raises(UsageError, match="b"):
        run.marks("b")


def test_a_quantity_of_gradlabs_name_and_other_axes_is_passed_over(tmp_path):
    pair = {"agent": [0, 1], "agent_other": [0, 1]}
    right = xr.DataArray(np.ones((2, 2)), dims=tuple(pair), coords=pair)
    with RunWriter(tmp_path / "r") as writer:
        writer.write(0, {"behavioural_distance": right, "snd": xr.DataArray(1.0)})
        for wrong in (right.rename(agent="row"), right.assign_coords(agent_other=[1, 2])):
            with pytest.raises(UsageError, match=r"`behavioural_distance_low` has .* another name"):
                writer.write(1, {"behavioural_distance_low": wrong})
    with closing(sqlite3.connect(tmp_path / "r" / "records.sqlite", isolation_level=None)) as d:
        d.execute("UPDATE quantity SET name = 'cosine' WHERE name = 'behavioural_distance'")
    run = open_run(tmp_path / "r")
    assert run.quantities == ("snd",)
    assert run.problems[1:] == [
        "cosine has axes ('agent', 'agent_other') where gradlab records ('network', 'space', "
        "'layer', 'agent', 'agent_other'): it is passed over"
    ]


def test_folders_too_deep_to_look_into_hide_no_other_run(tmp_path):
    with RunWriter(tmp_path / "whole") as writer:
        writer.describe(state="done")
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(20):  # more than a path may be long
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
    finally:
        os.chdir(here)
    assert [run.path.name for run in open_runs(tmp_path)] == ["whole"]
