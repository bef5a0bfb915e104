import json
import shutil
import time

import numpy as np
import pytest
import xarray as xr

from dashboards.live.runs import RunIndex
from dashboards.live.watch import Watched
from dashboards.on_demand import on_demand
from dashboards.page import page_html
from dashboards.tables import Limits
from gradlab.checks import UsageError
from gradlab.run import Run, open_run
from gradlab.run_writer import RunWriter


@pytest.fixture
def runs(tmp_path):
    """Two runs, at different depths."""
    for name in ("a", "deep/er/b"):
        record(tmp_path / "runs" / name)
    return tmp_path / "runs"


def record(folder, updates=3):
    with RunWriter(folder) as writer:
        writer.describe(method="fups", environment="e", agents=2, seed=7, state="done")
        for update in range(updates):
            ended = 2.5 if update == 1 else np.nan
            numbers = {"frames": 100.0 * (update + 1), "episode_return": ended}
            writer.write(update, {name: xr.DataArray(value) for name, value in numbers.items()})


def test_runs_are_found_at_any_depth_and_named_by_where_they_are(runs):
    assert RunIndex([runs]).paths() == {"a": runs / "a", "deep/er/b": runs / "deep/er/b"}
    several = RunIndex([runs / "a", runs / "deep", runs])
    assert list(several.paths()) == ["a", "er/b", "runs/a", "deep/er/b"]
    again = RunIndex([runs, runs])
    assert list(again.paths()) == ["a", "deep/er/b", "runs/a", "runs/deep/er/b"]


def test_rows_say_what_a_run_is_and_what_it_came_to(runs):
    row = RunIndex([runs]).rows()[0]
    assert row.pop("changed") == pytest.approx(
        (runs / "a" / "records.sqlite").stat().st_mtime, abs=9
    )
    assert row == {
        "name": "a",
        "method": "fups",
        "environment": "e",
        "agents": 2,
        "seed": 7,
        "frames": 300.0,
        "return": 2.5,
        "evaluation": None,
        "state": "done",
        "problem": "",
    }


def test_a_damaged_and_a_newer_run_are_lines_and_the_others_are_listed(runs):
    (runs / "a" / "run.json").write_text("{")
    newer = json.loads((runs / "deep/er/b" / "run.json").read_text()) | {"schema": 99}
    (runs / "deep/er/b" / "run.json").write_text(json.dumps(newer))
    record(runs / "c")
    rows = {row["name"]: row for row in RunIndex([runs]).rows()}
    assert "run.json is damaged" in rows["a"]["problem"]
    assert rows["deep/er/b"]["state"] == "unreadable"
    assert "schema version 99" in rows["deep/er/b"]["problem"]
    assert (rows["c"]["state"], rows["c"]["problem"]) == ("done", "")


def test_a_run_that_can_not_be_read_in_some_way_nobody_thought_of_is_a_line(
    runs, caplog, monkeypatch
):
    def last(run, quantity):
        if run.path == runs / "a":
            raise KeyError(quantity)
        return 1.0

    monkeypatch.setattr("dashboards.live.runs.last_number", last)
    rows = {row["name"]: row for row in RunIndex([runs]).rows()}
    assert rows["a"]["state"] == "unreadable"
    assert "Error" in rows["a"]["problem"]
    assert "could not be read" in caplog.text
    assert rows["deep/er/b"]["state"] == "done"


def test_only_what_has_changed_is_read_again(runs, monkeypatch):
    index = RunIndex([runs])
    before = index.rows()
    opened = []
    monkeypatch.setattr("dashboards.live.runs.open_run", lambda p: opened.append(p) or open_run(p))
    assert index.rows() == before
    assert opened == []
    with RunWriter(runs / "a", resume=True) as writer:
        writer.describe(state="running")
        rows = index.rows()
        assert (rows[0]["state"], opened) == ("running", [runs / "a"])
    assert index.rows()[0]["state"] == "died"


def test_new_runs_appear_and_deleted_ones_go(runs, monkeypatch):
    monkeypatch.setattr("dashboards.live.runs._FRESH", -1)
    index = RunIndex([runs])
    shutil.rmtree(runs / "a")
    record(runs / "c")
    assert [row["name"] for row in index.rows()] == ["c", "deep/er/b"]


def test_links_are_not_followed(runs, tmp_path):
    record(tmp_path / "secret" / "run")
    (runs / "link").symlink_to(tmp_path / "secret", target_is_directory=True)
    (runs / "c").mkdir()
    for file in ("run.json", "records.sqlite"):
        (runs / "c" / file).symlink_to(tmp_path / "secret" / "run" / file)
    index = RunIndex([runs])
    rows = {row["name"]: row for row in index.rows()}
    assert set(rows) == {"a", "c", "deep/er/b"}
    assert (rows["c"]["state"], rows["c"]["frames"]) == ("unreadable", None)
    with pytest.raises(UsageError, match="is a link to elsewhere"):
        index.open("c")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../a",
        "/etc/passwd",
        "./a",
        "a/",
        "a/../a",
        "deep\\er\\b",
        "a\x00",
        "A",
        "x" * 9999,
    ],
)
def test_a_name_is_looked_up_and_never_a_path(runs, name):
    with pytest.raises(UsageError, match="There is no run"):
        RunIndex([runs]).open(name)


@pytest.mark.parametrize(("made", "said"), [(False, "does not exist"), (True, "holds no run")])
def test_nothing_to_serve_is_said(tmp_path, made, said):
    if made:
        (tmp_path / "runs" / "empty").mkdir(parents=True)
    with pytest.raises(UsageError, match=said):
        RunIndex([tmp_path / "runs"])


def test_a_large_quantity_reads_what_is_looked_at(tmp_path, monkeypatch):
    labels = {"layer": ["a", "b"], "agent": [0, 1, 2]}
    numbers = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(np.float32)
    with RunWriter(tmp_path / "r") as writer:
        for update, matrix in enumerate(numbers):
            array = xr.DataArray(matrix, dims=tuple(labels), coords=labels)
            writer.write(5 * update, {"matrix": array})
    run = open_run(tmp_path / "r")
    array, whole = on_demand(run, "matrix", run.updates("matrix")), run.quantity("matrix")
    asked = []
    read = Run.quantity

    def counting(self, name, **what):
        found = read(self, name, **what)
        asked.append(found.size)
        return found

    monkeypatch.setattr(Run, "quantity", counting)
    np.testing.assert_array_equal(array.isel(update=4, layer=1).to_numpy(), numbers[4, 1])
    np.testing.assert_array_equal(array.isel(layer=0, agent=2).to_numpy(), numbers[:, 0, 2])
    assert asked == [3, 9]
    np.testing.assert_array_equal(array.sel(update=[40, 0]).to_numpy(), numbers[[8, 0]])
    np.testing.assert_array_equal(array[2:4, ::-1, 1:].to_numpy(), numbers[2:4, ::-1, 1:])
    xr.testing.assert_equal(array.load(), whole)


@pytest.mark.parametrize("kept", ["held", "on demand"])
def test_a_view_grows_with_its_run_and_reads_only_what_is_new(
    write_run, tmp_path, monkeypatch, kept
):
    held = {"held": 10**9, "on demand": 0}[kept]
    monkeypatch.setattr("dashboards.live.watch.LIVE", Limits(held=held))
    write_run(tmp_path / "whole", updates=8, every=1)
    write_run(tmp_path / "r", updates=4, every=1)
    watched = Watched(RunIndex([tmp_path / "r"]), ["r"])
    drawn = ("returns", "seeds", "pair-history", "conflict-layers", "pca", "quantity-runs")
    parts = [*([name, 0] for name in drawn), ["", 0], ["returns", 99]]
    first = watched.figures("update=3", parts)
    assert watched.refresh(-1) == 0
    assert first[-2:] == ["null", "null"]
    append(tmp_path / "whole", tmp_path / "r", since=4)
    asked = []
    read = Run.quantity

    def counting(self, name, **what):
        asked.append((name, what.get("at")))
        return read(self, name, **what)

    monkeypatch.setattr(Run, "quantity", counting)
    assert watched.refresh(-1) == 1
    grown = watched.figures("update=7", parts)
    if kept == "held":
        assert [at for name, at in asked if name == "episode_return"] == [[4, 5, 6, 7]]
    fresh = Watched(RunIndex([tmp_path / "r"]), ["r"])
    assert grown == fresh.figures("update=7", parts)
    assert all(new != old for new, old in zip(grown[:-2], first[:-2], strict=True))
    assert watched.page() == fresh.page()


def test_pages_that_ask_seldom_are_shown_the_same_updates(write_run, tmp_path):
    write_run(tmp_path / "whole", updates=8, every=1)
    write_run(tmp_path / "r", updates=4, every=1)
    watched = Watched(RunIndex([tmp_path / "r"]), ["r"])
    append(tmp_path / "whole", tmp_path / "r", since=4)
    watched._looked = time.monotonic() - 2
    assert watched.refresh(5.0) == 0  # fifty pages' pause
    assert watched.refresh(1.0) == 1  # one page's


def test_a_page_keeps_what_it_reads(write_run, tmp_path, monkeypatch):
    asked = []
    read = Run.quantity
    monkeypatch.setattr(
        Run, "quantity", lambda self, name, **what: asked.append(name) or read(self, name, **what)
    )
    page_html([write_run(tmp_path / "r", updates=4, every=1)])
    assert asked.count("cosine") <= 2  # for all figures, and for the run in words


def append(source, target, since):
    """Record in one run what another has recorded since an update."""
    run = open_run(source)
    with RunWriter(target, resume=True) as writer:
        for update in range(since, 8):
            writer.write(
                update,
                {
                    name: run.quantity(name, since=update, until=update)[0].drop_vars("update")
                    for name in run.quantities
                    if update in run.updates(name)
                },
            )


def test_records_that_were_replaced_are_read_anew(write_run, tmp_path):
    write_run(tmp_path / "r", updates=4, seed=0)
    watched = Watched(RunIndex([tmp_path / "r"]), ["r"])
    before = watched.figures("", [["returns", 0]])
    write_run(tmp_path / "new", updates=6, seed=1)
    shutil.rmtree(tmp_path / "r")
    (tmp_path / "new").rename(tmp_path / "r")
    assert watched.refresh(-1) == 1
    fresh = Watched(RunIndex([tmp_path / "r"]), ["r"])
    assert watched.figures("", [["returns", 0]]) == fresh.figures("", [["returns", 0]])
    assert watched.figures("", [["returns", 0]]) != before


def test_a_panel_that_fails_leaves_the_others(write_run, tmp_path, caplog):
    write_run(tmp_path / "r")
    watched = Watched(RunIndex([tmp_path / "r"]), ["r"])

    def fail(_):
        raise RuntimeError("no")

    panel = watched._view.panels["returns"]
    object.__setattr__(panel.parts[0], "draw", fail)
    failed, other = watched.figures("", [["returns", 0], ["conflict-rate", 0]])
    assert "could not be drawn" in failed
    assert json.loads(other)["figure"]["data"]
    assert "RuntimeError: no" in caplog.text
