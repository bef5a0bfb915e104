import numpy as np
import pytest
import xarray as xr

from analyses.curves import evenly_spaced, frames_by_update, learning_curve, series
from gradlab.checks import UsageError
from gradlab.run import open_run
from gradlab.run_writer import RunWriter

RATES = np.arange(12.0).reshape(2, 2, 3)


@pytest.fixture
def run(tmp_path):
    with RunWriter(tmp_path / "run") as writer:
        writer.describe(method="fups")
        for update, episode_return in enumerate([np.nan, -3.0, np.nan, -1.0]):
            values = {
                "frames": xr.DataArray(np.int64(100 * (update + 1))),
                "episode_return": xr.DataArray(episode_return),
            }
            if update in {0, 3}:
                coords = {"network": ["actor", "critic"], "space": ["psi", "theta"]}
                coords["layer"] = ["all", "layer0", "head"]
                values["conflict_rate"] = xr.DataArray(
                    RATES + 100 * update, dims=tuple(coords), coords=coords
                )
            writer.write(update, values)
    return open_run(tmp_path / "run")


def test_learning_curve_leaves_out_updates_without_an_episode(run):
    table = learning_curve(run)
    assert table.columns.tolist() == ["update", "frames", "episode_return"]
    assert table.to_numpy().tolist() == [[1, 200, -3.0], [3, 400, -1.0]]


def test_series_is_long_and_keeps_every_number_with_its_labels(run):
    table = series(run, "conflict_rate")
    assert len(table) == 24
    row = table[
        (table["update"] == 3)
        & (table["network"] == "critic")
        & (table["space"] == "psi")
        & (table["layer"] == "head")
    ]
    assert row["value"].tolist() == [RATES[1, 0, 2] + 300]
    assert row["frames"].tolist() == [400]


def test_series_of_an_unknown_quantity_names_those_there_are(run):
    with pytest.raises(UsageError, match=r"conflict_rat.*Did you mean 'conflict_rate'"):
        series(run, "conflict_rat")


def test_missing_frames_are_nan(tmp_path):
    with RunWriter(tmp_path / "run") as writer:
        writer.write(0, {"episode_return": xr.DataArray(1.0)})
    run = open_run(tmp_path / "run")
    assert frames_by_update(run).empty
    assert learning_curve(run)["frames"].isna().all()


@pytest.mark.parametrize("count", [0, 1, 2, 39, 40, 41, 1000])
def test_evenly_spaced_keeps_both_ends_and_at_most_the_limit(count):
    updates = list(range(0, 7 * count, 7))
    kept = evenly_spaced(updates, limit=40)
    assert len(kept) == min(count, 40) == len(set(kept))
    assert kept == sorted(kept)
    assert kept[:1] == updates[:1]
    assert kept[-1:] == updates[-1:]
    if count > 40:
        gaps = np.diff(kept) / 7
        assert gaps.max() - gaps.min() <= 1
