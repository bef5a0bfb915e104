r"""Where the spread of per-sample gradients comes from: within agents, or between them."""

import numpy as np
import torch
import xarray as xr

from gradlab.decomposition import Decomposition
from gradlab.parameters import WHOLE


def variance(decomposition: Decomposition) -> xr.Dataset:
    r"""Split the variance of per-sample gradients in theta-space by the law of total variance.

    With :math:`z_{i,s}` the gradient of sample s of agent i and :math:`Z_i` its mean over samples,

    .. math:: \underbrace{\tfrac1{NS}\sum_{i,s} \|z_{i,s} - \bar Z\|^2}_{total}
              = \underbrace{\tfrac1{NS}\sum_{i,s} \|z_{i,s} - Z_i\|^2}_{within}
              + \underbrace{\tfrac1N\sum_i \|Z_i - \bar Z\|^2}_{between}

    Each is the trace of a covariance matrix, of single samples (not of their mean), with division
    by the count so that the split is exact where all agents have equally many samples.

    Args:
        decomposition: What `decompose` returned.

    Returns:
        `variance_agent` over (layer, agent): the spread of one agent's samples;
        `variance_within` (its mean over agents) and `variance_between` over (layer).
    """
    d = decomposition
    means = dict(d.theta_layout.split_by_layer(d.z))
    squared_mean = torch.stack([m.square().sum(-1) for m in means.values()], 1)
    between = torch.stack([
        (m - m.mean(0)).square().sum(-1).mean() for m in means.values()
    ])
    # Rounding can leave a vanishing variance a hair below 0.
    within = (d.moments.mean_squared_norm - squared_mean).clamp(min=0).cpu().numpy()
    within = np.concatenate([within.sum(1, keepdims=True), within], axis=1)
    between_all = np.concatenate([[between.sum().item()], between.cpu().numpy()])
    attrs = {"unit": "loss^2", "estimator": "trace of the covariance of single samples, theta"}
    return xr.Dataset(
        {
            "variance_agent": (("layer", "agent"), within.T, attrs),
            "variance_within": (("layer",), within.mean(0), attrs),
            "variance_between": (("layer",), between_all, attrs),
        },
        coords={"layer": [WHOLE, *d.theta_layout.layers], "agent": range(d.agents)},
    )
