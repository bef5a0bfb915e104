r"""Where the spread of per-sample gradients comes from: within agents, or between them."""

from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gradlab.decomposition import Decomposition, Surrogate, Theta
from gradlab.parameters import WHOLE
from gradlab.per_sample import mean_squared_norms


def variance(
    decomposition: Decomposition,
    surrogate: Surrogate,
    theta: Theta,
    batch: Mapping[str, Tensor],
) -> xr.Dataset:
    r"""Split the variance of per-sample gradients in theta-space by the law of total variance.

    With :math:`z_{i,s}` the gradient of sample s of agent i and :math:`Z_i` its mean over samples,

    .. math:: \underbrace{\tfrac1{NS}\sum_{i,s} \|z_{i,s} - \bar Z\|^2}_{total}
              = \underbrace{\tfrac1{NS}\sum_{i,s} \|z_{i,s} - Z_i\|^2}_{within}
              + \underbrace{\tfrac1N\sum_i \|Z_i - \bar Z\|^2}_{between}

    Each is the trace of a covariance matrix, of single samples (not of their mean), with division
    by the count so that the split is exact.

    Args:
        decomposition: What `decompose` returned for the same surrogate and batch.
        surrogate: Loss of one sample.
        theta: Policy parameters [agent, ...] by name.
        batch: Tensors [agent, sample, ...] by name.

    Returns:
        `variance_agent` over (layer, agent): the spread of one agent's samples;
        `variance_within` (its mean over agents) and `variance_between` over (layer).
    """
    layout = decomposition.theta_layout
    second = mean_squared_norms(surrogate, theta, batch)
    z = decomposition.z
    means = dict(layout.split_by_layer(z))
    squared_mean = torch.stack([m.square().sum(-1, dtype=torch.float64) for m in means.values()], 1)
    between = torch.stack([
        (m - m.mean(0)).square().sum(-1, dtype=torch.float64).mean() for m in means.values()
    ])
    # Rounding can leave a vanishing variance a hair below 0.
    within = (second - squared_mean).clamp(min=0).cpu().numpy()
    within = np.concatenate([within.sum(1, keepdims=True), within], axis=1)
    between_all = np.concatenate([[between.sum().item()], between.cpu().numpy()])
    layers = [WHOLE, *layout.layers]
    attrs = {"unit": "loss^2", "estimator": "trace of the covariance of single samples, theta"}
    return xr.Dataset(
        {
            "variance_agent": (("layer", "agent"), within.T, attrs),
            "variance_within": (("layer",), within.mean(0), attrs),
            "variance_between": (("layer",), between_all, attrs),
        },
        coords={"layer": layers, "agent": range(z.shape[0])},
    )
