import numpy as np
import pytest
import torch
import xarray as xr
from scipy import optimize
from scipy.spatial import procrustes as scipy_procrustes
from scipy.stats import ortho_group

import gradlab
from gradlab.checks import UsageError
from gradlab.metrics.procrustes import procrustes, procrustes_path

SIZES = [(1, 3), (2, 2), (3, 1), (3, 64), (4, 3), (30, 8)]


def rows_of(agents, features, seed=0):
    return np.random.default_rng(seed).normal(size=(agents, features))


def turn_of(features, seed=0):
    if features == 1:
        return np.array([[-1.0]])
    return ortho_group.rvs(features, random_state=seed)


@pytest.mark.parametrize("size", SIZES)
def test_a_turn_is_undone(size):
    reference = rows_of(*size)
    found = procrustes(reference, reference @ turn_of(size[1]))
    np.testing.assert_allclose(found.aligned, reference, atol=1e-10)
    assert found.disparity < 1e-20


@pytest.mark.parametrize("size", SIZES)
def test_a_shift_and_a_stretch_are_undone_on_demand_only(size):
    reference = rows_of(*size) + 3
    moved = reference @ turn_of(size[1]) + 5
    found = procrustes(reference, moved, translation=True)
    np.testing.assert_allclose(found.aligned, reference, atol=1e-10)
    assert procrustes(reference, moved).disparity > 0.01
    if size[0] > 1:  # one agent, from its own mean, has no size
        found = procrustes(reference, moved * 2, translation=True, scaling=True)
        np.testing.assert_allclose(found.aligned, reference, atol=1e-10)
        # twice as long rows miss the reference by its own length
        found = procrustes(reference, moved * 2, translation=True)
        np.testing.assert_allclose(found.disparity, 1, atol=1e-10)


@pytest.mark.parametrize("size", [(4, 3), (12, 5), (30, 8)])
def test_with_both_options_the_disparity_is_scipy_s(size):
    reference, rows = rows_of(*size), rows_of(*size, seed=1)
    expected = scipy_procrustes(reference, rows)[2]
    found = procrustes(reference, rows, translation=True, scaling=True)
    np.testing.assert_allclose(found.disparity, expected, atol=1e-10)


@pytest.mark.parametrize("translation", [False, True])
@pytest.mark.parametrize("scaling", [False, True])
def test_no_other_turn_comes_nearer(translation, scaling):
    reference, rows = rows_of(5, 2) + 0.7, rows_of(5, 2, seed=1)

    def miss(angle, mirror, shift, scale):
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]]) @ np.diag([1, mirror])
        return np.square(reference - scale * rows @ turn - shift).sum()

    found = np.inf
    for mirror in (1, -1):
        for angle in np.linspace(0, 2 * np.pi, 8):
            best = optimize.minimize(
                lambda x, mirror=mirror: miss(
                    x[0], mirror, x[1:3] * translation, np.exp(x[3]) if scaling else 1.0
                ),
                [angle, 0, 0, 0],
                options={"gtol": 1e-9},
            )
            found = min(found, best.fun)
    extent = np.square(reference - reference.mean(0) * translation).sum()
    disparity = procrustes(reference, rows, translation=translation, scaling=scaling).disparity
    np.testing.assert_allclose(disparity, found / extent, rtol=1e-8)


@pytest.mark.parametrize("size", SIZES)
def test_turning_keeps_lengths_and_angles(size):
    reference, rows = rows_of(*size), rows_of(*size, seed=1)
    aligned = procrustes(reference, rows).aligned.values
    np.testing.assert_allclose(aligned @ aligned.T, rows @ rows.T, atol=1e-10)


def test_disparity_is_what_is_left():
    reference, rows = rows_of(6, 4), rows_of(6, 4, seed=1)
    found = procrustes(reference, rows)
    left = np.square(found.aligned - reference).sum() / np.square(reference).sum()
    np.testing.assert_allclose(found.disparity, left, atol=1e-10)


def test_rows_without_extent():
    rows, zero = rows_of(3, 2), np.zeros((3, 2))
    same = np.full((3, 2), 0.1)
    for options in ({}, {"translation": True}, {"scaling": True}):
        found = procrustes(rows, zero, **options)
        np.testing.assert_allclose(found.disparity, 1, atol=1e-10)
        assert np.isnan(procrustes(zero, rows, **options).disparity)
    assert np.isnan(procrustes(same, rows, translation=True).disparity)
    assert np.isfinite(procrustes(same, rows).disparity)
    assert "without extent" in procrustes(zero, rows).disparity.estimator


def test_a_path_that_only_turns_stands_still():
    first = rows_of(5, 3)
    frames = np.stack([first @ turn_of(3, seed) for seed in range(4)])
    found = procrustes_path(frames)
    np.testing.assert_allclose(found.aligned, np.stack([frames[0]] * 4), atol=1e-10)
    assert np.isnan(found.disparity[0])
    assert (found.disparity[1:] < 1e-20).all()


def test_a_path_is_aligned_step_by_step():
    frames = np.stack([rows_of(5, 3, seed) for seed in range(4)])
    for options in ({}, {"translation": True}, {"translation": True, "scaling": True}):
        found = procrustes_path(frames, **options)
        np.testing.assert_array_equal(found.aligned[0], frames[0])
        for time in range(1, 4):
            step = procrustes(found.aligned[time - 1].values, frames[time], **options)
            np.testing.assert_allclose(found.aligned[time], step.aligned, atol=1e-10)
            np.testing.assert_allclose(found.disparity[time], step.disparity, atol=1e-10)


def test_a_path_shows_the_one_agent_that_moves():
    first = rows_of(6, 3)
    moved = first.copy()
    moved[2] += 0.01
    found = procrustes_path(np.stack([first, moved @ turn_of(3)]))
    apart = np.linalg.norm(found.aligned[1] - found.aligned[0], axis=-1)
    assert apart.argmax() == 2


def test_a_single_frame_is_a_path():
    found = procrustes_path(rows_of(3, 2)[None])
    assert found.sizes == {"time": 1, "agent": 3, "feature": 2}
    assert np.isnan(found.disparity).all()


def test_torch_and_labelled_arrays_are_taken():
    reference, rows = rows_of(4, 3), rows_of(4, 3, seed=1)
    found = procrustes(reference, rows)
    xr.testing.assert_identical(
        found, procrustes(torch.from_numpy(reference), xr.DataArray(rows, dims=("agent", "x")))
    )


def test_wrong_rows_are_named():
    rows = rows_of(4, 3)
    wrong = rows.copy()
    wrong[2, 1] = np.nan
    with pytest.raises(
        UsageError, match=r"`reference` must be finite. Got nan at agent 2, feature 1"
    ):
        procrustes(wrong, rows)
    with pytest.raises(UsageError, match=r"`frames` .*at time 1, agent 2, feature 1"):
        procrustes_path(np.stack([rows, wrong]))
    with pytest.raises(UsageError, match=r"shape of the reference, \(4, 3\). Got rows=\(4, 2\)"):
        procrustes(rows, rows[:, :2])
    with pytest.raises(UsageError, match=r"be that of \[agent, feature\]"):
        procrustes(rows[0], rows[0])


def test_the_package_exports_them():
    assert gradlab.procrustes is procrustes
    assert gradlab.procrustes_path is procrustes_path
