"""The general engine: `torch.func.vmap` of `torch.func.grad`, for any module and any loss."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import grad, vmap

from gradlab.engine.part import Part, agent_axes, masked, without_agent_axis
from gradlab.engine.per_sample import Rows, Taken
from gradlab.engine.rewrites import Rewrites
from gradlab.engine.surrogate import Surrogate, Theta, checked_loss, explained, unwritten


def general_gradients(
    surrogate: Surrogate, theta: Mapping[str, Tensor], part: Part, *, plain: bool = False
) -> Taken:
    """Form every sample's gradient.

    Args:
        surrogate: The per-sample loss.
        theta: Parameters [agent, ...] or [1, ...] by name.
        part: The samples.
        plain: Whether to take the agents' sums as well, by a pass of their own; `theta` must then
            be [agent, ...].

    Returns:
        The gradients of every parameter, by name.
    """
    agents, _ = part.sizes
    axes = agent_axes(theta, agents)

    def loss(theta: Theta, sample: dict[str, Tensor], context: dict[str, Tensor]) -> Tensor:
        return checked_loss(surrogate, dict(theta), {**sample, **context}, Rewrites())

    per_sample = vmap(vmap(grad(loss), in_dims=(None, 0, None)), in_dims=(axes, 0, 0))
    given = {**theta, **part.batch, **part.context}
    with torch.no_grad(), explained(), unwritten(given):  # no graph above the one of `grad`
        rows = per_sample(without_agent_axis(theta, axes), dict(part.batch), dict(part.context))
        found = Taken({name: Rows(masked(values, part.mask)) for name, values in rows.items()}, {})
    if not plain:
        return found
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
    with torch.enable_grad(), explained(), unwritten(given):
        losses = vmap(vmap(loss, in_dims=(None, 0, None)))(
            leaves, dict(part.batch), dict(part.context)
        )
        sums = torch.autograd.grad(
            masked(losses, part.mask).sum(), list(leaves.values()), materialize_grads=True
        )
    return found._replace(plain=dict(zip(leaves, sums, strict=True)))
