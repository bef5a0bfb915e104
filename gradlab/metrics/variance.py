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
from gradlab.metrics.spaces import SpaceLabels, ratio
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
    found = measure_variance(decomposition, minibatches=minibatches, cosine=cosine)
    return dataset(found).assign_attrs(variance_attributes(decomposition, found))


def measure_variance(
    decomposition: Decomposition,
    *,
    minibatches: Sequence[int] = MINIBATCHES,
    cosine: float = RESOLVED,
) -> dict[str, Quantity]:
    """What `variance` labels.

    Args:
        decomposition: What `decompose` returned.
        minibatches: As for `variance`.
        cosine: As for `variance`.

    Returns:
        The quantities by name.

    Raises:
        UsageError: As for `variance`.
    """
    check(min(minibatches, default=1) >= 1, "minibatches", "be at least 1 each", minibatches)
    check(0 < abs(cosine) <= 1, "cosine", "be from -1 to 1 and not 0", cosine)
    d = decomposition
    present = d.moments.count > 0
    means = list(dict(d.theta_layout.split_by_layer(d.z)).values())
    squared_mean = torch.stack([mean.square().sum(1) for mean in means], 1)
    # Rounding can leave a vanishing variance a hair below 0.
    within = (d.moments.mean_squared_norm - squared_mean).clamp(min=0)
    within = torch.where(present[:, None], within, torch.nan)
    between = torch.stack([
        (mean - mean.mean(0)).square().sum(1).mean() for mean in (m[present] for m in means)
    ])
    label = SpaceLabels.of(d)

    def quantity(by_layer: torch.Tensor) -> Quantity:
        values = torch.cat([by_layer.sum(0, keepdim=True), by_layer]).cpu().numpy()
        how = "trace of the covariance of single samples, theta"
        return label.quantity(label.of_layers("theta", values), "loss^2", how, spaces=False)

    found = {
        "variance_agent": quantity(within.mT),
        "variance_within": quantity(within[present].mean(0)),
        "variance_between": quantity(between),
    }
    found["variance_minibatch"] = _of_minibatches(found["variance_agent"], d.moments, minibatches)
    found["coordinate_variance"] = Quantity.scalar(
        _over_coordinates(d), "loss^2", "variance over the coordinates of the whole gradient, psi"
    )
    if d.moments.square is not None:
        found["gsnr"] = label.quantity(
            label.of_layers("theta", _gsnr(d.moments)),
            "1",
            "mean over coordinates, noise of the mean taken off",
            spaces=False,
        )
    return found | _of_means(d, found["variance_agent"].values, cosine)


def _of_minibatches(single: Quantity, moments: Moments, minibatches: Sequence[int]) -> Quantity:
    """Drawing S / m of S samples without replacement: (m - 1) / (S - 1) of a sample's variance."""
    count = moments.count.cpu().numpy()
    parts = np.asarray(minibatches)[:, None]
    possible = (count > 1) & (parts <= count)  # no minibatch is without samples
    added = ratio(np.where(possible, parts - 1.0, np.nan), count - 1.0)
    return replace(
        single,
        values=single.values[:, None] * added,
        dims=("layer", "minibatches", "agent"),
        coords={**single.coords, "minibatches": list(minibatches)},
        estimator="trace of the covariance that random minibatches add, theta",
    )


def _over_coordinates(decomposition: Decomposition) -> float:
    parts = decomposition.contributions.values()
    total = sum(float(part.coordinate_sums().sum(dtype=torch.float64)) for part in parts)
    squared = sum(float(gram.sum()) for gram in decomposition.gram_psi().values())
    size = decomposition.psi_layout.size
    return float(np.maximum(squared / size - (total / size) ** 2, 0.0))  # NaN stays NaN


def _gsnr(moments: Moments) -> NDArray[np.float64]:
    """Of the whole and of each layer, [layer, agent]."""
    assert moments.square is not None
    count = moments.count.double()[:, None]
    mean = moments.mean
    spread = (moments.square / count - mean.square()) * count / (count - 1)
    each = torch.where(spread > 0, (mean.square() - spread / count) / spread, torch.nan)
    by_layer = [part.nanmean(1) for _, part in moments.layout.split_by_layer(each)]
    return torch.stack([each.nanmean(1), *by_layer]).cpu().numpy()


def _of_means(
    decomposition: Decomposition, of_sample: NDArray[np.float64], cosine: float
) -> dict[str, Quantity]:
    """What the spread of the copies says; nothing where they are not told apart."""
    d = decomposition
    estimates = d.estimates
    if estimates is None:
        return {}
    label, rows = SpaceLabels.of(d), estimates.rows
    clusters = d.moments.copy_count.shape[1] if d.moments.copy_count is not None else 0
    per_cluster = d.copies / clusters
    noise, signal, known, resolve = (
        label.of_estimates(rows, values)
        for values in (
            estimates.noise,
            estimates.signal,
            estimates.known.astype(float),
            estimates.clusters_to_resolve(cosine) * per_cluster,
        )
    )
    normalised = ratio(noise, np.where(known == 1, signal, 0.0))
    spread = f"spread of {clusters} clusters"
    unknown = "NaN unless the length is two standard errors above 0"
    found = {
        "squared_norm_debiased": label.quantity(
            signal, "loss^2", "U-statistic without products within a cluster"
        ),
        "variance_mean": label.quantity(noise, "loss^2", spread),
        "normalised_variance": label.quantity(normalised, "1", f"{spread}; {unknown}"),
        "noise_scale": label.quantity(normalised * d.copies, "copies", f"{spread}; {unknown}"),
        "copies_to_resolve": label.quantity(
            resolve, "copies", f"for a cosine of {cosine:g}, power 80 %"
        ),
    }
    independent = ratio(of_sample, d.moments.count.cpu().numpy() - 1.0)
    theta = label.of_layers("theta", estimates.noise[rows["theta"]])
    found["design_effect"] = label.quantity(
        ratio(theta, independent), "1", f"{spread}, over samples'", spaces=False
    )
    if "jacobian" in rows:
        jacobian = label.of_layers("psi", estimates.noise[rows["jacobian"]])
        found["variance_jacobian"] = label.quantity(
            jacobian, "loss^2", f"{spread}, of J^T Z with fixed Z", spaces=False
        )
    return found
