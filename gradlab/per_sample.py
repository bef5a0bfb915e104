"""Second moments of per-sample gradients, which themselves are never kept."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap

from gradlab.decomposition import Surrogate, Theta, batch_axes
from gradlab.parameters import ParameterLayout

DEFAULT_BUDGET = 256 * 2**20
"""Bytes that the per-sample gradients of one chunk may take."""


def mean_squared_norms(
    surrogate: Surrogate,
    theta: Theta,
    batch: Mapping[str, Tensor],
    *,
    budget: int = DEFAULT_BUDGET,
) -> Float[Tensor, "agent layer"]:
    r"""Mean over samples of the squared norm of each sample's gradient, by agent and layer.

    :math:`\frac1S \sum_s \| \nabla_{\theta_i} \ell(\theta_i, x_{i,s}) \|^2`, from
    `torch.func.vmap` of `torch.func.grad`; reduced chunk by chunk, so that memory does not grow
    with the number of samples.

    Args:
        surrogate: Loss of one sample, as for `decompose`.
        theta: Policy parameters [agent, ...] by name.
        batch: Tensors [agent, sample, ...] by name.
        budget: Bytes that one chunk's gradients may take.

    Returns:
        One value for each agent and layer, layers in the order of the policy's layout.
    """
    agents, samples = batch_axes(batch)
    layout = ParameterLayout.of(theta, batch_dims=1)
    itemsize = next(iter(theta.values())).element_size()
    chunk = max(1, budget // (agents * layout.size * itemsize))
    per_sample = vmap(vmap(grad(surrogate), in_dims=(None, 0)))
    sums = torch.zeros(agents, len(layout.layers), dtype=torch.float64)
    for start in range(0, samples, chunk):
        part = {name: tensor[:, start : start + chunk] for name, tensor in batch.items()}
        gradients = per_sample(theta, part)
        for name, gradient in gradients.items():
            layer = layout.layers.index(layout.layer_of[name])
            sums[:, layer] += gradient.flatten(1).square().sum(1, dtype=torch.float64)
    return sums / samples
