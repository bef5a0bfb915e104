r"""Where the spread of per-sample gradients comes from: within agents, or between them."""

import torch
import xarray as xr
from torch import Tensor

from gradlab.decomposition import Decomposition
from gradlab.parameters import WHOLE
from gradlab.quantity import Quantity, dataset


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
    return dataset(measure_variance(decomposition))


def measure_variance(decomposition: Decomposition) -> dict[str, Quantity]:
    """What `variance` labels.

    Args:
        decomposition: What `decompose` returned.

    Returns:
        The quantities by name.
    """
    d = decomposition
    means = list(dict(d.theta_layout.split_by_layer(d.z)).values())
    squared_mean = torch.stack([mean.square().sum(1) for mean in means], 1)
    between = torch.stack([(mean - mean.mean(0)).square().sum(1).mean() for mean in means])
    # Rounding can leave a vanishing variance a hair below 0.
    within = (d.moments.mean_squared_norm - squared_mean).clamp(min=0)

    def quantity(by_layer: Tensor, *dims: str) -> Quantity:
        values = torch.cat([by_layer.sum(0, keepdim=True), by_layer]).cpu().numpy()
        labels = {"layer": [WHOLE, *d.theta_layout.layers], "agent": range(d.agents)}
        return Quantity(
            values=values,
            dims=dims,
            coords={dim: labels[dim] for dim in dims},
            unit="loss^2",
            estimator="trace of the covariance of single samples, theta",
        )

    return {
        "variance_agent": quantity(within.mT, "layer", "agent"),
        "variance_within": quantity(within.mean(0), "layer"),
        "variance_between": quantity(between, "layer"),
    }
