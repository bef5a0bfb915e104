r"""Debiased inner products and cosines of gradients, with intervals from independent clusters.

With :math:`s_i^e` agent i's summed gradient in cluster e (`gradlab.cluster_products`) and
:math:`n_i^e` its number of samples, products within a cluster are left out:

.. math:: D_{ik} = \frac{s_i \cdot s_k - \sum_e s_i^e \cdot s_k^e}
                        {n_i n_k - \sum_e n_i^e n_k^e}

is an unbiased estimate of the inner product of the true gradients, a U-statistic of order two, for
i = k as well (where it may be below 0). Its variance is estimated by leaving out one cluster at a
time (Efron and Stein, 1981). For a U-statistic of n clusters that jackknife estimates, exactly,

.. math:: \frac{4}{n (n-2)} (\zeta_2 + (n-4) \zeta_1) \quad\text{instead of}\quad
          \frac{2}{n (n-1)} (\zeta_2 + 2 (n-2) \zeta_1),

:math:`\zeta_1` and :math:`\zeta_2` being the variances of the kernel's projection and of the kernel
:math:`\frac12 (s_i^e \cdot s_k^f + s_i^f \cdot s_k^e)` (Hoeffding, 1948): twice too much where
noise prevails. Products of neighbouring clusters estimate :math:`\zeta_2`, which mends that.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from gradlab.cluster_products import Array, ClusterProducts
from gradlab.verdicts import UNDECIDED

LEVEL = 0.95
"""Coverage of the intervals; one minus it is the false discovery rate of the verdicts."""

FEWEST = 8
"""Clusters without which there is no interval."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Estimates and their 95 % intervals, NaN where there is none.

    Attributes:
        value: The estimates.
        low: Lower ends.
        high: Upper ends.
    """

    value: Array
    low: Array
    high: Array


@dataclass(frozen=True, kw_only=True)
class _Covariances:
    """Covariances of estimates of inner products, [row, agent, agent] each.

    Attributes:
        pair: Variance of D_ik.
        own: Of D_ik with D_ii.
        other: Of D_ik with D_kk.
        both: Of D_ii with D_kk.
        first: Variance of D_ii.
        second: Variance of D_kk.
    """

    pair: Array
    own: Array
    other: Array
    both: Array
    first: Array
    second: Array

    @classmethod
    def of(cls, deviations: Array, scale: Array) -> "_Covariances":
        """Sums of products of deviations [row, cluster, agent, agent], times a scale."""
        diagonal = np.diagonal(deviations, axis1=-2, axis2=-1)
        own = np.einsum("leik,lei->lik", deviations, diagonal) * scale
        both = np.einsum("lei,lek->lik", diagonal, diagonal) * scale
        variance = np.diagonal(both, axis1=-2, axis2=-1)
        return cls(
            pair=np.square(deviations).sum(1) * scale,
            own=own,
            other=np.swapaxes(own, -1, -2),
            both=both,
            first=np.broadcast_to(variance[..., :, None], both.shape),
            second=np.broadcast_to(variance[..., None, :], both.shape),
        )

    def variance(self, pair: Array | float, own: Array | float, other: Array | float) -> Array:
        """Variance of pair * D_ik + own * D_ii + other * D_kk."""
        found: Array = (
            pair * (pair * self.pair + 2 * own * self.own + 2 * other * self.other)
            + own * (own * self.first + 2 * other * self.both)
            + other * other * self.second
        )
        return found


Key = TypeVar("Key", bound=Hashable)


class Estimates(Generic[Key]):
    """Everything that cluster products say about the agents' true gradients.

    The leading axis of every array, `row` below, runs over spaces, and in each over its layers with
    the whole network first: the same few operations serve them all. A space has any key, also one
    that tells of which network it is.

    Attributes:
        rows: Which rows of an array are a space's.
        clusters: In how many clusters agent i, or agent k, has samples, [agent, agent].
    """

    @np.errstate(invalid="ignore")  # gradients that are not finite
    def __init__(self, of_spaces: Mapping[Key, ClusterProducts]) -> None:
        """Estimate nothing yet.

        Args:
            of_spaces: Products by space, all from the same samples.
        """
        self.rows: dict[Key, slice] = {}
        start = 0
        for space, products in of_spaces.items():
            self.rows[space] = slice(start, start + 1 + len(products.layers))
            start = self.rows[space].stop

        def with_whole(kind: str) -> Array:
            parts = [getattr(products, kind) for products in of_spaces.values()]
            return np.concatenate([p for own in parts for p in (own.sum(0, keepdims=True), own)])

        self._count = count = next(iter(of_spaces.values())).count.astype(np.float64)
        self._within, self._across, self._following = map(
            with_whole, ("within", "across", "following")
        )
        self._total = self._across.sum(1)
        self._products = self._total - self._within.sum(1)
        samples = count.sum(1)
        of_cluster = np.einsum("ie,ke->eik", count, count)
        self._pairs = np.multiply.outer(samples, samples) - of_cluster.sum(0)
        self._pairs_without = (
            (samples[:, None] - count).T[:, :, None] * (samples[:, None] - count).T[:, None, :]
            - of_cluster.sum(0)
            + of_cluster
        )
        self._present = (count.T[:, :, None] + count.T[:, None, :]) > 0
        self.clusters: NDArray[np.int64] = self._present.sum(0)

    @cached_property
    def inner_product(self) -> Array:
        """D_ik, [row, agent, agent]; NaN where no two clusters hold samples of both."""
        return _ratio(self._products, self._pairs)

    @cached_property
    def inner_product_interval(self) -> Interval:
        """D_ik and its interval, by Student's t."""
        half = self._quantile * self.inner_product_error
        return Interval(
            value=self.inner_product, low=self.inner_product - half, high=self.inner_product + half
        )

    @cached_property
    def inner_product_error(self) -> Array:
        """Standard error of D_ik; NaN with fewer than `FEWEST` clusters."""
        return np.sqrt(self._jackknife.pair * self._correction(1.0, 0.0, 0.0))

    @cached_property
    def cosine_interval(self) -> Interval:
        r"""D_ik / sqrt(D_ii D_kk), and the c for which D_ik - c sqrt(D_ii D_kk) may be 0.

        Fieller's interval (1954), the root less its bias of second order. NaN, with the interval
        from -1 to 1, unless both D_ii and D_kk are two standard errors above 0; without any
        interval if there are too few clusters.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            root = np.sqrt(np.where(self.signal > 0, self.signal, np.nan))
            to_own = root[..., None, :] / root[..., :, None] / 2
            to_other = 1 / (4 * to_own)
            scale = self._geometric_mean(root)
            cosine = self.inner_product / scale
            correction = self._correction(1.0, -cosine * to_own, -cosine * to_other)
            stretch = correction * self._quantile**2
            v = self._jackknife
            of_scale = v.variance(0.0, to_own, to_other) * stretch
            mixed = (v.own * to_own + v.other * to_other) * stretch
            a = scale**2 - of_scale
            b = self.inner_product * scale - mixed
            root_of = np.sqrt(
                np.maximum(b**2 - a * (self.inner_product**2 - v.pair * stretch), 0.0)
            )
            low, high = (b - root_of) / a, (b + root_of) / a
        has_interval = (self.clusters >= FEWEST) & np.isfinite(self.inner_product)
        unbounded = np.where(has_interval, 1.0, np.nan)
        same = np.eye(len(self.clusters), dtype=bool)
        cosine = np.where(same, 1.0, cosine)
        low, high = (np.where(same, unbounded, end) for end in (low, high))
        resolved = self.known[..., :, None] & self.known[..., None, :] & (same | ~(a <= 0))
        value = np.where(resolved, cosine, np.nan)
        low = np.where(resolved, np.clip(low, -1.0, 1.0), -unbounded)
        high = np.where(resolved, np.clip(high, -1.0, 1.0), unbounded)
        return Interval(value=value, low=low, high=high)

    def _geometric_mean(self, root: Array) -> Array:
        r"""sqrt(D_ii D_kk) less its bias of second order, which too few clusters leave as it is.

        :math:`E \sqrt{XY} \approx \sqrt{E X \, E Y} (1 - \frac18 Var(X / E X - Y / E Y))`.
        """
        own, other = 1 / np.square(root[..., :, None]), -1 / np.square(root[..., None, :])
        spread = self._jackknife.variance(0.0, own, other) * self._correction(0.0, own, other)
        mean: Array = root[..., :, None] * root[..., None, :] * (1 + np.nan_to_num(spread) / 8)
        return mean

    @cached_property
    def p_value(self) -> Array:
        """Two-sided p-value of D_ik = 0, [row, agent, agent]; 1 where it is 0 by structure."""
        with np.errstate(invalid="ignore", divide="ignore"):
            t = np.abs(self.inner_product) / self.inner_product_error
            p = 2 * special.stdtr(self.clusters - 1, -t)
        structural = (self.inner_product == 0) & (self.inner_product_error == 0)
        return np.where(structural, 1.0, p)

    @cached_property
    def verdict(self) -> Array:
        """CONFLICT, UNDECIDED or ALIGNED for each pair, [row, agent, agent]; NaN if unknown.

        Decided at a false discovery rate of 5 % over the pairs of a row (Benjamini and Hochberg,
        1995).
        """
        verdict = np.full_like(self.p_value, np.nan)
        rows, columns = np.triu_indices(verdict.shape[-1], k=1)
        p, sign = (v[:, rows, columns] for v in (self.p_value, np.sign(self.inner_product)))
        known = np.isfinite(p)
        found = np.full_like(p, np.nan)
        if known.all() and p.size:
            adjusted = stats.false_discovery_control(p, axis=1, method="bh")
            found = np.where(adjusted <= 1 - LEVEL, sign, UNDECIDED)
        else:  # scipy takes no NaN
            for row in np.flatnonzero(known.any(1)):
                of_row = known[row]
                adjusted = stats.false_discovery_control(p[row, of_row], method="bh")
                found[row, of_row] = np.where(adjusted <= 1 - LEVEL, sign[row, of_row], UNDECIDED)
        verdict[:, rows, columns] = verdict[:, columns, rows] = found
        return verdict

    @cached_property
    def noise(self) -> Array:
        """Trace of the covariance of each agent's mean gradient, [row, agent].

        From the spread of the clusters, which holds whatever samples of one cluster share.
        """
        count, samples = self._count.T, self._count.sum(1)
        within, across = (np.diagonal(p, axis1=-2, axis2=-1) for p in (self._within, self._across))
        total = np.diagonal(self._total, axis1=-2, axis2=-1)[:, None]
        share = _ratio(count, samples)
        spread = (within - 2 * share * across + share**2 * total).sum(1)
        clusters = np.diagonal(self.clusters)
        return np.maximum(_ratio(spread * clusters, (clusters - 1) * samples**2), 0.0)

    @property
    def signal(self) -> Array:
        """D_ii, the squared length of each agent's true gradient, [row, agent]."""
        return np.diagonal(self.inner_product, axis1=-2, axis2=-1)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Whether D_ii is two standard errors (or, without any, at all) above 0, [row, agent]."""
        error = np.diagonal(self.inner_product_error, axis1=-2, axis2=-1)
        found: NDArray[np.bool_] = np.where(
            np.isnan(error), self.signal > 0, self.signal > 2 * error
        )
        return found

    def clusters_to_resolve(self, cosine: float, power: float = 0.8) -> Array:
        """How many clusters would tell a cosine from 0, [row, agent, agent].

        Args:
            cosine: The true cosine.
            power: Probability of a verdict, were it the only pair.

        Returns:
            The number for which the cosine is as many standard errors away from 0 as that needs;
            NaN unless both lengths are known as for a cosine.
        """
        n = self.clusters
        kernel = self._kernel.pair
        projection = np.maximum(_ratio(self._jackknife.pair * n * (n - 2) / 4 - kernel, n - 4), 0.0)
        needed = special.ndtri((1 + LEVEL) / 2) + special.ndtri(power)
        own = np.where(self.known, self.signal, np.nan)
        target = cosine**2 * own[..., :, None] * own[..., None, :] / needed**2
        return (2 * projection + np.sqrt(4 * projection**2 + 2 * kernel * target)) / target

    @cached_property
    def _quantile(self) -> Array:
        enough = np.where(self.clusters >= FEWEST, self.clusters - 1, np.nan)
        return np.asarray(special.stdtrit(enough, (1 + LEVEL) / 2))

    @cached_property
    def _jackknife(self) -> _Covariances:
        without = _ratio(
            self._products[:, None]
            - self._across
            - np.swapaxes(self._across, -1, -2)
            + 2 * self._within,
            self._pairs_without,
        )
        present, n = self._present, self.clusters
        mean = _ratio(np.where(present, without, 0.0).sum(1), n)
        deviations = np.where(present, without - mean[:, None], 0.0)
        return _Covariances.of(deviations, _ratio(np.where(n >= FEWEST, n - 1.0, np.nan), n))

    @cached_property
    def _kernel(self) -> _Covariances:
        """Covariances of the kernel, from neighbouring clusters, in units of D."""
        both = (self._following + np.swapaxes(self._following, -1, -2)) / 2
        n = self.clusters
        kernel = _ratio(both * (n * (n - 1)), self._pairs)
        pairs = kernel.shape[1]
        deviations = kernel - kernel.sum(1, keepdims=True) / max(1, pairs)
        return _Covariances.of(deviations, np.asarray(1.0 / max(1, pairs - 1)))

    def _correction(self, pair: Array | float, own: Array | float, other: Array | float) -> Array:
        """By what to multiply the jackknife's variance of a combination of D_ik, D_ii and D_kk.

        At least 1/2, its limit where noise prevails.
        """
        n = self.clusters.astype(np.float64)
        plain = self._jackknife.variance(pair, own, other)
        # A cosine that is exactly 1 or -1 has none, and rounding may leave it below 0.
        kernel = np.maximum(self._kernel.variance(pair, own, other), 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            corrected = ((n - 2) ** 2 * plain - 2 * kernel) / ((n - 1) * (n - 4))
            ratio = np.where(plain > 0, corrected / plain, 1.0)
        return np.maximum(ratio, 0.5)


def _ratio(numerator: Array, denominator: Array | NDArray[np.int64]) -> Array:
    """Divide; NaN by 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(denominator != 0, numerator / denominator, np.nan)
    return found
