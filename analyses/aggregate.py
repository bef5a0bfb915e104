"""Across seeds: interquartile means with bootstrap intervals, and their differences."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
_BATCH = 4_000_000  # numbers that are resampled at a time, which bounds the memory

Interval = tuple[
    Float[np.ndarray, " point"], Float[np.ndarray, " point"], Float[np.ndarray, " point"]
]
"""Values at each point, and the lower and upper ends of their intervals."""


class Resampled(NamedTuple):
    """A number at each point, its 95 % interval, and what that is made of.

    Attributes:
        interval: Values and the ends of their intervals.
        drawn: The number of each resample, whose quantiles are the ends of intervals at any level;
            NaN where the ends are.
    """

    interval: Interval
    drawn: Float[np.ndarray, "point resample"]


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
    values: Float[np.ndarray, "seed point"], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interquartile mean at each point, and its 95 % interval.

    Args:
        values: One row for each seed; a point with a number that is not finite is NaN.
        resamples: How often the seeds are drawn anew, all points of a seed together.
        seed: Seed of these draws.

    Returns:
        Means, and the ends of their percentile bootstrap intervals, NaN for a single seed.
    """
    return bootstrap([values], interquartile_mean_of, resamples, seed)


def difference_across_seeds(
    values: Float[np.ndarray, "seed point"],
    others: Float[np.ndarray, "other_seed point"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Difference of two groups' interquartile means at each point, and its 95 % interval.

    Args:
        values: One row for each seed of one group.
        others: One row for each seed of the other; seeds are drawn independently.
        resamples: How often the seeds are drawn anew.
        seed: Seed of these draws.

    Returns:
        First less second, and the ends of its percentile bootstrap interval, NaN unless both groups
        have two seeds.
    """
    return bootstrap([values, others], difference_of, resamples, seed)


def difference_of(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], axis: int
) -> NDArray[np.float64]:
    """Difference of two groups' interquartile means.

    Args:
        ours: Draws of one group.
        theirs: Draws of the other; of the same shape but for the number of draws.
        axis: The axis of the draws.

    Returns:
        First less second, without that axis.
    """
    return interquartile_mean_of(ours, axis=axis) - interquartile_mean_of(theirs, axis=axis)


def interquartile_mean_of(*strata: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Mean of the middle half of all strata's numbers together, in which strata weigh the same.

    As many numbers' weight is cut off at either end as a quarter of all makes, rounded down: of
    strata of one size that is the trimmed mean at 25 % of the pooled numbers.

    Args:
        *strata: Arrays of one shape but for the number of draws, which may differ.
        axis: The axis of the draws.

    Returns:
        The means, without that axis.
    """
    pooled = np.concatenate([np.moveaxis(x, axis, -1) for x in strata], axis=-1)
    sizes = [x.shape[axis] for x in strata]
    if len(set(sizes)) == 1:  # several times as fast, as nothing is weighed
        return np.asarray(stats.trim_mean(pooled, 0.25, axis=-1))
    weights = np.repeat([1 / size for size in sizes], sizes)
    order = np.argsort(pooled, axis=-1)
    upto = np.cumsum(weights[order], axis=-1)
    cut = pooled.shape[-1] // 4 * len(sizes) / pooled.shape[-1]
    kept = np.minimum(upto, len(sizes) - cut) - np.maximum(upto - weights[order], cut)
    kept = np.maximum(kept, 0.0)
    sums = (kept * np.take_along_axis(pooled, order, -1)).sum(-1)
    return np.asarray(sums / (len(sizes) - 2 * cut))


def bootstrap(
    strata: Sequence[Float[np.ndarray, "_ point"]],
    statistic: Callable[..., Any],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Estimate a number at each point of draws in strata, and its 95 % interval.

    Args:
        strata: Draws of each stratum, which may differ in number.
        statistic: Takes each stratum's draws as an argument, and `axis`, the draws' axis.
        resamples: How often each stratum's draws are drawn anew from that stratum, with
            replacement, all points of a draw together.
        seed: Seed of these draws.

    Returns:
        Values, and the ends of their percentile bootstrap intervals: NaN at points where a draw is
        not finite; the ends also if any stratum has a single draw, whose spread is not known.
    """
    return resample(strata, statistic, resamples, seed).interval


def resample(
    strata: Sequence[Float[np.ndarray, "_ point"]],
    statistic: Callable[..., Any],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Resampled:
    """Do as `bootstrap` does, and keep the number of each resample.

    Args:
        strata: Draws of each stratum.
        statistic: Takes each stratum's draws as an argument, and `axis`, the draws' axis.
        resamples: How often each stratum's draws are drawn anew.
        seed: Seed of these draws.

    Returns:
        Values, their intervals, and the numbers of the resamples.
    """
    finite = np.logical_and.reduce([np.isfinite(draws).all(0) for draws in strata])
    # SciPy warns of what is not finite
    known = [np.where(finite, draws, 0.0) for draws in strata]
    value, low, high = (np.full(finite.shape, np.nan) for _ in range(3))
    drawn = np.full((*finite.shape, resamples), np.nan)
    value[finite] = statistic(*known, axis=0)[finite]
    if min(map(len, strata)) > 1 and finite.any():
        found = stats.bootstrap(
            known,
            statistic,
            vectorized=True,
            axis=0,
            n_resamples=resamples,
            batch=max(1, _BATCH // sum(draws.size for draws in known)),
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        ends = found.confidence_interval
        low[finite], high[finite] = np.asarray(ends.low)[finite], np.asarray(ends.high)[finite]
        drawn[finite] = found.bootstrap_distribution[finite]
    return Resampled((value, low, high), drawn)


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
