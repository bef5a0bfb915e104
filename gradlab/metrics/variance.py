r"""Where the spread of per-sample gradients comes from, and what it does to their means."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from gradlab.checks import check
from gradlab.decomposition import Decomposition
from gradlab.engine.moments import Moments
from gradlab.metrics.spaces import SPACES, SideBySide, alone, ratio, with_whole
from gradlab.metrics.summary import variance_attributes
from gradlab.quantity import Quantity, dataset

MINIBATCHES = (2, 4, 8, 16)
RESOLVED = 0.1
"""The cosine for which `copies_to_resolve` is reckoned by default."""


def variance(
    decomposition: Decomposition,
    *,
    minibatches: Sequence[int] = MINIBATCHES,
    cosine: float = RESOLVED,
) -> xr.Dataset:
    r"""Variance of the gradients, of their means, and how it compares with the signal.

    With :math:`z_{i,s}` the gradient of sample s of agent i in theta-space, which has the same size
    for all sharing schemes, and :math:`Z_i` its mean over samples, the law of total variance reads

    .. math:: \underbrace{\tfrac1{NS}\sum_{i,s} \|z_{i,s} - \bar Z\|^2}_{total}
              = \underbrace{\tfrac1{NS}\sum_{i,s} \|z_{i,s} - Z_i\|^2}_{within}
              + \underbrace{\tfrac1N\sum_i \|Z_i - \bar Z\|^2}_{between}

    Each is the trace of a covariance matrix of single samples, with division by the count so that
    the split is exact where all agents have equally many samples. Where `decompose` was
    told the samples' copies, also the variance of the agents' mean gradients, from the spread of
    the copies, which holds what samples of one copy share.

    Args:
        decomposition: What `decompose` returned.
        minibatches: Numbers of parts that a batch may be cut into, for `variance_minibatch`.
        cosine: The cosine for `copies_to_resolve`.

    Returns:
        NaN for a layer that a space lacks:

        - (layer, agent) `variance_agent`, (layer) `variance_within`, `variance_between`: traces of
          covariance matrices of single samples in theta-space
        - (layer, minibatches, agent) `variance_minibatch`: trace of the covariance that cutting
          the batch at random into so many equal minibatches adds to a minibatch's gradient,
          theta; NaN where there are more of them than samples
        - () `coordinate_variance`: what the official HyperMARL code calls gradient variance, the
          variance *over the coordinates* of the one gradient of the trained parameters; about
          its squared length over their number
        - with coordinates, (layer, agent) `gsnr`: mean over coordinates of the squared mean over
          the variance of a sample (Liu et al., 2020), the mean's own noise taken off; theta
        - with copies, (space, layer, agent): `squared_norm_debiased`, the true gradient's squared
          length, an unbiased estimate that may be below 0; `variance_mean`, trace of the covariance
          of the mean gradient; `normalised_variance`, their ratio, which compares between spaces of
          different size; `noise_scale`, the number of copies at which both are equal, the "simple"
          noise scale of McCandlish et al. (2018, eq. 2.9) in copies; both NaN where the length is
          not two standard errors above 0 (with fewer than 8 clusters: not above 0)
        - with copies, (layer, agent) `design_effect`: by what the samples' dependence multiplies
          the variance of their mean; theta
        - with copies, (space, layer, agent, agent_other) `copies_to_resolve`: how many copies give
          a verdict on a pair whose true cosine is `cosine` in 80 % of cases
        - where the generator reads the observation and with copies, (layer, agent)
          `variance_jacobian`: trace of the covariance of J^T Z from J's noise alone, psi; the rest
          of `variance_mean` in psi is Z's noise. Other generators' J has none.

        An agent without samples has NaN everywhere, and is left out of `variance_within` and
        `variance_between`. The attribute `summary` says in a sentence how noise and signal compare.

    Raises:
        UsageError: If a number of minibatches is below 1, or the cosine 0 or not from -1 to 1.
    """
    parts = SideBySide({"": decomposition})
    found = alone(measure_variance(parts, minibatches=minibatches, cosine=cosine))
    return dataset(found).assign_attrs(variance_attributes(decomposition, found))


def measure_variance(
    parts: SideBySide,
    *,
    minibatches: Sequence[int] = MINIBATCHES,
    cosine: float = RESOLVED,
) -> dict[str, Quantity]:
    """What `variance` labels, of several networks at once.

    Args:
        parts: What `decompose` returned for each.
        minibatches: As for `variance`.
        cosine: As for `variance`.

    Returns:
        The quantities by name, with a leading axis `network`.

    Raises:
        UsageError: As for `variance`.
    """
    check(min(minibatches, default=1) >= 1, "minibatches", "be at least 1 each", minibatches)
    check(0 < abs(cosine) <= 1, "cosine", "be from -1 to 1 and not 0", cosine)
    networks = parts.of_networks.values()
    within, between = (list(each) for each in zip(*map(_of_samples, networks), strict=True))
    how = "trace of the covariance of single samples, theta"

    def of_theta(by_layer: list[torch.Tensor]) -> Quantity:
        return parts.quantity(parts.of_theta(by_layer), "loss^2", how, spaces=False)

    present = parts.first.moments.count > 0
    found = {
        "variance_agent": of_theta(within),
        "variance_within": of_theta([w[:, present].mean(1) for w in within]),
        "variance_between": of_theta(between),
    }
    found["variance_minibatch"] = _of_minibatches(found["variance_agent"], parts.count, minibatches)
    found["coordinate_variance"] = parts.quantity(
        np.asarray([_over_coordinates(d) for d in networks]),
        "loss^2",
        "variance over the coordinates of the whole gradient, psi",
    )
    if parts.first.moments.square is not None:
        found["gsnr"] = parts.quantity(
            parts.of_theta([_gsnr(d.moments) for d in networks]),
            "1",
            "mean over coordinates, noise of the mean taken off",
            spaces=False,
        )
    return found | _of_means(parts, found["variance_agent"].values, cosine)


def _of_samples(d: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance of samples within each agent [1 + layer, agent] and between agents [1 + layer]."""
    present = d.moments.count > 0
    z = d.z
    apart = (z - z[present].mean(0)).square()
    squares = [
        part.sum(1) for _, part in d.theta_layout.split_by_layer(torch.cat([z.square(), apart]))
    ]
    squared_mean, spread = torch.stack(squares).split(d.agents, dim=1)
    # Rounding can leave a vanishing variance a hair below 0.
    within = (d.moments.mean_squared_norm.mT - squared_mean).clamp(min=0)
    within = torch.where(present, within, torch.nan)
    return with_whole(within), with_whole(spread[:, present].mean(1))


def _of_minibatches(
    single: Quantity, count: NDArray[np.int64], minibatches: Sequence[int]
) -> Quantity:
    """Drawing S / m of S samples without replacement: (m - 1) / (S - 1) of a sample's variance."""
    parts = np.asarray(minibatches)[:, None]
    possible = (count > 1) & (parts <= count)  # no minibatch is without samples
    added = ratio(np.where(possible, parts - 1.0, np.nan), count - 1)
    return replace(
        single,
        values=single.values[:, :, None] * added,
        dims=("network", "layer", "minibatches", "agent"),
        coords={**single.coords, "minibatches": list(minibatches)},
        estimator="trace of the covariance that random minibatches add, theta",
    )


def _over_coordinates(decomposition: Decomposition) -> float:
    sums = [
        part.coordinate_sums().sum(dtype=torch.float64)
        for part in decomposition.contributions.values()
    ]
    grams = decomposition.gram_psi().values()
    total, squared = torch.stack([
        torch.stack(sums).sum(),
        torch.stack([gram.sum() for gram in grams]).sum(),
    ]).tolist()
    size = decomposition.psi_layout.size
    return float(np.maximum(squared / size - (total / size) ** 2, 0.0))  # NaN stays NaN


def _gsnr(moments: Moments) -> torch.Tensor:
    """Of the whole and of each layer, [1 + layer, agent]."""
    assert moments.square is not None
    count = moments.count.double()[:, None]
    mean = moments.mean
    spread = (moments.square / count - mean.square()) * count / (count - 1)
    each = torch.where(spread > 0, (mean.square() - spread / count) / spread, torch.nan)
    by_layer = [part.nanmean(1) for _, part in moments.layout.split_by_layer(each)]
    return torch.stack([each.nanmean(1), *by_layer])


def _of_means(
    parts: SideBySide, of_sample: NDArray[np.float64], cosine: float
) -> dict[str, Quantity]:
    """What the spread of the copies says; nothing where they are not told apart."""
    e, copies = parts.estimates, parts.first.copies
    if e is None:
        return {}
    by_cluster = parts.first.moments.copy_count
    clusters = by_cluster.shape[1] if by_cluster is not None else 0
    noise, signal, known, resolve = map(
        parts.placed,
        (
            e.noise,
            e.signal,
            e.known.astype(float),
            e.clusters_to_resolve(cosine) * (copies / clusters),
        ),
    )
    normalised = ratio(noise, np.where(known == 1, signal, 0.0))
    spread = f"spread of {clusters} clusters"
    unknown = "NaN unless the length is two standard errors above 0"
    quantity = parts.quantity
    found = {
        "squared_norm_debiased": quantity(
            signal, "loss^2", "U-statistic without products within a cluster"
        ),
        "variance_mean": quantity(noise, "loss^2", spread),
        "normalised_variance": quantity(normalised, "1", f"{spread}; {unknown}"),
        "noise_scale": quantity(normalised * copies, "copies", f"{spread}; {unknown}"),
        "copies_to_resolve": quantity(resolve, "copies", f"for a cosine of {cosine:g}, power 80 %"),
    }
    independent = ratio(of_sample, parts.count - 1)
    found["design_effect"] = quantity(
        ratio(noise[:, SPACES.index("theta")], independent),
        "1",
        f"{spread}, over samples'",
        spaces=False,
    )
    jacobian = np.full_like(noise[:, 0], np.nan)
    for number, (network, d) in enumerate(parts.of_networks.items()):
        rows = e.rows.get((network, "jacobian"))
        if rows is not None:
            jacobian[number, parts.columns(d.psi_layout.layers)] = e.noise[rows]
            found["variance_jacobian"] = quantity(
                jacobian, "loss^2", f"{spread}, of J^T Z with fixed Z", spaces=False
            )
    return found
