import math
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from dashboards.colours import Mark
from dashboards.live.runs import RunIndex
from dashboards.live.watch import Watched
from dashboards.tables import ALL, Limits, RunTables
from dashboards.thinned import read_thinned
from gradlab.quantity import Quantity
from gradlab.run import open_run
from gradlab.run_writer import RunWriter

MOST = 8
NAN = math.nan


def write(writer, update, number):
    matrix = Quantity(values=np.full(3, update), dims=("place",), coords={"place": ["a", "b", "c"]})
    writer.write(update, {"matrix": matrix, "number": Quantity.scalar(number)})


@settings(max_examples=10)
@given(
    numbers=st.lists(st.sampled_from([NAN, 1.0, 2.0]), min_size=1, max_size=60),
    looks=st.sets(st.integers(1, 60), max_size=4),
    held=st.sampled_from([0, 10**9]),
)
def test_a_growing_run_is_read_as_one_that_had_its_length(tmp_path_factory, numbers, looks, held):
    folder = tmp_path_factory.mktemp("thinned") / "r"
    before = dict.fromkeys(("matrix", "number"))
    with RunWriter(folder) as writer:
        for update, number in enumerate(numbers):
            write(writer, 3 * update, number)
            if update + 1 in looks | {len(numbers)}:
                run = open_run(folder)
                before = {
                    name: read_thinned(run, name, most=MOST, held=held, before=known)
                    for name, known in before.items()
                }
    run = open_run(folder)
    for name, known in before.items():
        fresh = read_thinned(run, name, most=MOST, held=held)
        xr.testing.assert_identical(known.array, fresh.array)
        np.testing.assert_array_equal(known.places, fresh.places)
        assert known.count == fresh.count == len(numbers)
        whole = run.quantity(name)
        xr.testing.assert_equal(known.array, whole[known.places])
        assert {0, len(numbers) - 1} <= set(known.places) or name == "number"
        assert min(MOST / 2, len(numbers)) <= len(known.places) <= MOST


@pytest.mark.parametrize("known", range(4))
def test_numbers_that_are_rarely_known_are_kept(tmp_path, known):
    with RunWriter(tmp_path / "r") as writer:
        for update in range(100):
            write(writer, update, 1.0 if update % 4 == known else NAN)
    found = read_thinned(open_run(tmp_path / "r"), "number", most=MOST, held=0).array.to_numpy()
    assert len(found) >= MOST / 2
    assert np.isfinite(found[:-1]).all()  # the last is the last, whatever it is


@pytest.mark.parametrize("held", [0, 10**9])
@pytest.mark.parametrize("name", ["matrix", "number"])
def test_a_record_that_is_not_whole_is_counted_and_left_out(tmp_path, name, held):
    with RunWriter(tmp_path / "r") as writer:
        for update in range(32):
            write(writer, update, 1.0)
    file = tmp_path / "r" / "records.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute('UPDATE record SET array = substr(array, 2) WHERE "update" IN (8, 31)')
    found = read_thinned(open_run(tmp_path / "r"), name, most=MOST, held=held)
    assert found.count == 32
    # of a number the next in the stretch can be taken
    kept = [0, *([8 + 1] if name == "number" else []), 16, 24]
    assert found.places.tolist() == found.array["update"].to_numpy().tolist() == kept
    assert np.isfinite(found.array.to_numpy()).all()


def test_what_a_view_holds_of_a_run_does_not_grow_with_it(tmp_path, write_run, monkeypatch):
    monkeypatch.setattr("dashboards.live.watch.LIVE", Limits(updates=8, read=8))
    run = write_run(tmp_path / "r", updates=4, every=1)
    values = {
        name: run.quantity(name, since=3, until=3)[0].drop_vars("update") for name in run.quantities
    }
    watched = Watched(RunIndex([tmp_path / "r"]), ["r"])
    parts = [
        [panel.name, number]
        for panel in watched._view.panels.values()
        for number in range(len(panel.parts))
        if not panel.name.startswith("tsne")  # slow to draw
    ]
    held = []
    with RunWriter(tmp_path / "r", resume=True) as writer:
        for update in range(4, 84):
            writer.write(update, values)
            if update in {43, 83}:
                watched.refresh(-1)
                watched.page()
                watched.figures("", parts)
                (tables,) = watched._view.runs.values()
                read = tables._read
                held.append({name: known.array.sizes["update"] for name, known in read.items()})
                # What was read before is held no more by what was read after.
                assert not tables._before.keys() & read.keys()
    assert held[0].keys() == held[1].keys()
    assert len(held[0]) > 5
    assert max(max(sizes.values()) for sizes in held) <= 8


def test_frames_are_known_at_every_update_whatever_is_held_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("dashboards.tables._TOLD", 3)
    frames = np.cumsum(np.arange(1.0, 41.0))
    lost = 7
    before = None
    with RunWriter(tmp_path / "r") as writer:
        for update, so_far in enumerate(frames):
            if update != lost:
                writer.write(update, {"frames": Quantity.scalar(so_far)})
            if update not in {20, 39}:
                continue
            run = open_run(tmp_path / "r")
            for limits in (Limits(read=MOST), ALL):
                tables = RunTables(run, Mark("r", "#000000", "circle"), limits, before)
                for wanted in ([update, 3, 5], [lost], range(update + 1), [3, lost], [], [1000]):
                    wanted = np.array(wanted, int)
                    at = np.where((wanted > update) | (wanted == lost), np.nan, 0)
                    at[at == 0] = frames[wanted[at == 0]]
                    np.testing.assert_array_equal(tables.frames_at(wanted), at)
                held = len(tables.frames[0])
                assert held <= MOST if limits is not ALL else held == update
            before = RunTables(run, Mark("r", "#000000", "circle"), Limits(read=MOST))
            before.frames_at(np.arange(update))


def test_drawn_figures_are_kept_up_to_a_size(tmp_path, write_run, monkeypatch):
    write_run(tmp_path / "r", updates=12, every=1)
    watched = Watched(RunIndex([tmp_path / "r"]), ["r"])
    one = [["pair-history", 0], ["returns", 0]]
    first = watched.figures("", one)
    monkeypatch.setattr("dashboards.live.watch._KEPT", sum(map(len, first)))
    for layer in ("all", "layer0", "layer1", "head"):
        texts = watched.figures(f"layer={layer}", one)
        assert len(texts) == 2
        assert sum(map(len, watched._drawn.values())) == watched._size <= sum(map(len, first))
    assert watched.figures("", one) == first
