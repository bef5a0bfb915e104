import numpy as np
import pytest
from sklearn.utils import resample

from analyses.aggregate import (
    across_seeds,
    at_equal_frames,
    difference_across_seeds,
    interquartile_mean,
)


def test_interquartile_means_and_their_intervals():
    values = np.array([0.1, 0.9, 0.8, 0.7, 1.0])
    mean, low, high = interquartile_mean(values)
    assert mean == pytest.approx((0.7 + 0.8 + 0.9) / 3)  # a seed is left out at either end
    resampled = np.random.default_rng(1).choice(values, (4000, 5))
    slow = np.sort(resampled, axis=1)[:, 1:4].mean(1)
    assert (low, high) == pytest.approx(np.quantile(slow, (0.025, 0.975)), abs=0.03)
    assert interquartile_mean(np.full(5, 0.25)) == pytest.approx((0.25, 0.25, 0.25))
    assert np.isnan(interquartile_mean(np.array([0.5]))[1:]).all()


def test_points_have_the_interquartile_mean_of_their_own_seeds():
    values = np.random.default_rng(0).normal(size=(5, 7))
    mean, low, high = across_seeds(values)
    alone = [interquartile_mean(column) for column in values.T]
    np.testing.assert_allclose(mean, [one[0] for one in alone])
    assert (low < mean).all()
    assert (mean < high).all()
    values[2, 3] = np.nan
    for found in across_seeds(values):
        assert np.isnan(found[3])
        assert np.isfinite(np.delete(found, 3)).all()


def test_difference_of_groups_and_its_interval():
    rng = np.random.default_rng(0)
    ours, others = rng.normal(1.0, 0.3, size=(6, 1)), rng.normal(0.0, 0.3, size=(8, 1))
    mean, low, high = difference_across_seeds(ours, others)
    first, second = (interquartile_mean(v[:, 0])[0] for v in (ours, others))
    assert mean[0] == pytest.approx(first - second)
    drawn = [
        interquartile_mean_alone(resample(ours[:, 0], random_state=n))
        - interquartile_mean_alone(resample(others[:, 0], random_state=n + 10_000))
        for n in range(3000)
    ]
    assert (low[0], high[0]) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.05)
    assert np.isnan(difference_across_seeds(ours[:1], others)[1]).all()


def interquartile_mean_alone(values):
    cut = len(values) // 4
    return np.sort(values)[cut : len(values) - cut].mean()


def test_curves_are_read_at_frames_that_all_have():
    curves = [
        (np.array([0.0, 10, 20, 40]), np.array([0.0, 1, 2, 4])),
        (np.array([5.0, 25, np.nan]), np.array([1.0, 1, 9])),
    ]
    frames, values = at_equal_frames(curves, points=3)
    assert frames.tolist() == [5, 15, 25]
    np.testing.assert_allclose(values, [[0.5, 1.5, 2.5], [1, 1, 1]])
    assert at_equal_frames([*curves, (np.array([]), np.array([]))])[1].shape == (3, 0)
