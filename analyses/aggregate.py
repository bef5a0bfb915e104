"""Across seeds: interquartile means with bootstrap intervals, and their differences."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

_RESAMPLES = 2000
_MEAN: Any = partial(stats.trim_mean, proportiontocut=0.25)


def interquartile_mean(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean without the lowest and highest quarter of the seeds, and its 95 % interval.

    Args:
        values: One number for each seed.

    Returns:
        The mean and the ends of its percentile bootstrap interval (Agarwal et al., "Deep RL at the
        edge of the statistical precipice", 2021); NaN ends for a single seed.
    """
    mean, low, high = across_seeds(values[:, None])
    return float(mean[0]), float(low[0]), float(high[0])


def across_seeds(
    values: Float[np.ndarray, "seed point"], resamples: int = _RESAMPLES
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """Interquartile mean at each point, and its 95 % interval.

    Args:
        values: One row for each seed; a point with a number that is not finite is NaN.
        resamples: How often the seeds are drawn anew, all points of a seed together.

    Returns:
        Means, and the ends of their percentile bootstrap intervals, NaN for a single seed.
    """
    mean = _of_finite(values)
    return mean, *_interval(mean, [values], _MEAN, resamples)


def difference_across_seeds(
    values: Float[np.ndarray, "seed point"],
    others: Float[np.ndarray, "other_seed point"],
    resamples: int = _RESAMPLES,
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """Difference of two groups' interquartile means at each point, and its 95 % interval.

    Args:
        values: One row for each seed of one group.
        others: One row for each seed of the other; seeds are drawn independently.
        resamples: How often the seeds are drawn anew.

    Returns:
        First less second, and the ends of its percentile bootstrap interval, NaN unless both groups
        have two seeds.
    """
    mean = _of_finite(values) - _of_finite(others)

    def statistic(a: Any, b: Any, axis: int = 0) -> Any:  # noqa: ANN401 -- SciPy's
        return _MEAN(a, axis=axis) - _MEAN(b, axis=axis)

    return mean, *_interval(mean, [values, others], statistic, resamples)


def _interval(
    mean: NDArray[np.float64],
    groups: Sequence[NDArray[np.float64]],
    statistic: Callable[..., Any],
    resamples: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of a percentile bootstrap interval, NaN if a group has a single seed."""
    if min(map(len, groups)) == 1:
        return np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    found = stats.bootstrap(
        [_known(values) for values in groups],
        statistic,
        vectorized=True,
        axis=0,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = (np.where(np.isfinite(mean), end, np.nan) for end in (found.low, found.high))
    return low, high


def at_equal_frames(
    curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    points: int = 60,
    until: float | None = None,
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, "seed point"]]:
    """Read curves at the same numbers of environment frames.

    Args:
        curves: For each seed its frames, ascending, and its values.
        points: How many numbers of frames.
        until: The last number of frames; by default that of the curve that ends first.

    Returns:
        The frames, evenly spaced over what all curves have, and each curve there, between its
        points on a straight line; empty if a curve has no finite point.

    >>> frames, values = at_equal_frames([(np.array([0.0, 4]), np.array([0.0, 4]))], points=3)
    >>> frames.tolist(), values.tolist()
    ([0.0, 2.0, 4.0], [[0.0, 2.0, 4.0]])
    """
    kept = [
        (frames[known], values[known])
        for frames, values in curves
        for known in [np.isfinite(frames) & np.isfinite(values)]
    ]
    if not kept or not all(len(frames) for frames, _ in kept):
        return np.empty(0), np.empty((len(curves), 0))
    first = max(float(frames[0]) for frames, _ in kept)
    last = min([float(frames[-1]) for frames, _ in kept] + ([] if until is None else [until]))
    grid = np.linspace(first, last, points) if last > first else np.array([first])
    return grid, np.stack([np.interp(grid, frames, values) for frames, values in kept])


def _of_finite(values: Float[np.ndarray, "seed point"]) -> Float[np.ndarray, " point"]:
    return np.where(np.isfinite(values).all(0), _MEAN(values, axis=0), np.nan)


def _known(values: Float[np.ndarray, "seed point"]) -> Float[np.ndarray, "seed point"]:
    """Put 0 where a point is NaN in the end, as SciPy warns of what is not finite."""
    return np.where(np.isfinite(values).all(0), values, 0.0)
