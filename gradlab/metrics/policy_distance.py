"""Distances between two action distributions, at each observation by itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax, xlog1py

from gradlab.checks import UsageError, check, unknown_name
from gradlab.metrics.rows import Array, float64

Distance = Literal["jensen-shannon", "wasserstein", "hellinger"]
Kind = Literal["discrete", "gaussian"]
Policy = list[NDArray[np.float64]]

_SUM_TOLERANCE = 1e-2  # of probabilities in 16 bits


@dataclass(frozen=True, kw_only=True)
class PolicyDistance:
    """A distance between two agents' policies.

    Attributes:
        title: Its name in an estimator's text.
        between: Its values [observation] for two policies.
        unit: Their unit.
        most: The largest possible.
    """

    title: str
    between: Callable[[Policy, Policy], NDArray[np.float64]]
    unit: str
    most: float


def policies(given: Mapping[str, Array]) -> tuple[Kind, Policy]:
    """Take over all agents' action distributions.

    Args:
        given: `probabilities` or `logits` [agent, observation, action], or `mean` and `std`
            [agent, observation, dim], by these names.

    Returns:
        What kind of distributions they are; and their parameters, each [agent, observation, ...]:
        the probabilities, or mean and standard deviation.

    Raises:
        UsageError: If they are given in another way, differ in shape, or are not distributions.
    """
    ways = ({"probabilities"}, {"logits"}, {"mean", "std"})
    if set(given) not in ways:
        raise UsageError(
            "Policies must be given as `probabilities`, as `logits`, or as `mean` and `std`. Got "
            f"{', '.join(given) or 'none'}."
        )
    if "mean" in given:
        axes = ("agent", "observation", "dim")
        mean, std = (float64(name, given[name], axes) for name in ("mean", "std"))
        check(
            mean.shape == std.shape,
            "std",
            f"have the shape of the mean, {mean.shape} (use expand_as)",
            std.shape,
        )
        check(bool((std >= 0).all()), "std", "be at least 0", float(std.min()))
        return "gaussian", [mean, std]
    axes = ("agent", "observation", "action")
    if "logits" in given:
        logits = float64("logits", given["logits"], axes, finite=False)
        # not finite for NaN, for infinity, and where no action at all is available
        float64("logits.max(-1)", logits.max(-1), axes[:2])
        return "discrete", [softmax(logits, axis=-1)]
    probabilities = float64("probabilities", given["probabilities"], axes)
    lowest = float(probabilities.min())
    check(lowest >= 0, "probabilities", "be at least 0 (or are they logits?)", lowest)
    totals = probabilities.sum(-1, keepdims=True)
    agent, observation, _ = np.unravel_index(np.abs(totals - 1).argmax(), totals.shape)
    farthest = float(totals[agent, observation, 0])
    rule = f"sum to 1 over the actions (agent {agent}, observation {observation})"
    check(abs(farthest - 1) <= _SUM_TOLERANCE, "probabilities", rule, farthest)
    return "discrete", [probabilities / totals]


def distance_between(kind: Kind, name: str | None = None) -> PolicyDistance:
    """Choose a distance.

    Args:
        kind: Of the distributions.
        name: Of the distance; by default the first that suits them.

    Returns:
        The distance.

    Raises:
        UsageError: If there is no distance of that name for such distributions.
    """
    known = _DISTANCES[kind]
    if name is not None and name not in known:
        raise unknown_name(f"distance between {kind} policies", name, known)
    return known[name or next(iter(known))]


def _jensen_shannon(one: Policy, other: Policy) -> NDArray[np.float64]:
    (p,), (q,) = one, other
    total = p + q
    # With h the relative difference, half of total * phi(h) is the actions' share of the
    # divergence in nats, phi = (1 + h) log(1 + h) + (1 - h) log(1 - h). Its terms are never
    # negative, so that the sum is 0 for equal policies only.
    h = np.divide(p - q, total, out=np.zeros_like(total), where=total > 0)
    small = np.where(np.abs(h) < 0.5, h, 0.0)  # where the plain form loses all digits
    phi = np.where(
        np.abs(h) < 0.5,
        2 * small * np.arctanh(small) + np.log1p(-(small**2)),
        xlog1py(1 + h, h) + xlog1py(1 - h, -h),
    )
    divergence = (total * phi).sum(-1) / (4 * np.log(2))
    distances: NDArray[np.float64] = np.sqrt(np.minimum(divergence, 1.0))
    return distances


def _wasserstein(one: Policy, other: Policy) -> NDArray[np.float64]:
    squares = [((a - b) ** 2).sum(-1) for a, b in zip(one, other, strict=True)]
    distances: NDArray[np.float64] = np.sqrt(squares[0] + squares[1])
    return distances


def _hellinger(one: Policy, other: Policy) -> NDArray[np.float64]:
    (mean, std), (mean_other, std_other) = one, other
    spread = np.hypot(std, std_other)
    apart = mean - mean_other
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_coefficient = np.where(
            spread > 0,
            np.log1p(-np.minimum(((std - std_other) / spread) ** 2, 1)) / 2
            - (apart / spread) ** 2 / 4,
            np.where(apart == 0, 0.0, -np.inf),  # two point masses
        ).sum(-1)
    distances: NDArray[np.float64] = np.sqrt(-np.expm1(log_coefficient))
    return distances


_DISTANCES: dict[Kind, dict[str, PolicyDistance]] = {
    "discrete": {
        "jensen-shannon": PolicyDistance(
            title="Jensen-Shannon distance (base 2, over actions)",
            between=_jensen_shannon,
            unit="1",
            most=1.0,
        )
    },
    "gaussian": {
        "wasserstein": PolicyDistance(
            title="2-Wasserstein distance", between=_wasserstein, unit="action", most=np.inf
        ),
        "hellinger": PolicyDistance(
            title="Hellinger distance", between=_hellinger, unit="1", most=1.0
        ),
    },
}
