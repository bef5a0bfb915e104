"""A linear layer of one agent, of all agents at once, or with weights for every sample."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def linear(x: Float[Tensor, "*batch inputs"], weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a layer; each agent's samples meet only its own parameters, in one batched product.

    Args:
        x: What it reads: [*batch, inputs] of one agent, or [agent, *batch, inputs] with *batch of
            one axis or more.
        weight: [outputs, inputs] of one agent, [agent, outputs, inputs], or [1, outputs, inputs]
            where the agents share it; or one for each of the rows of x,
            [*rows, outputs, inputs].
        bias: The same without the last axis; it may be each agent's own where the weight is shared.

    Returns:
        What it makes, as x with outputs in place of inputs.
    """
    if weight.dim() == 2:
        return functional.linear(x, weight, bias)
    if weight.dim() == x.dim() + 1:
        return (weight @ x[..., None]).squeeze(-1) + bias
    rows = x.flatten(1, -2)
    if weight.shape[0] > 1:
        made = torch.baddbmm(bias[:, None], rows, weight.mT)
    elif bias.shape[0] > 1:
        made = functional.linear(rows, weight[0]) + bias[:, None]
    else:
        made = functional.linear(rows, weight[0], bias[0])
    return made.unflatten(1, x.shape[1:-1]) if x.dim() > 3 else made
