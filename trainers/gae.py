"""Generalised advantage estimation (Schulman et al., 2016)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def advantages(
    reward: Float[Tensor, "agent time copy"],
    value: Float[Tensor, "agent time copy"],
    next_value: Float[Tensor, "agent time copy"],
    terminated: Bool[Tensor, "*each time copy"],
    truncated: Bool[Tensor, "time copy"],
    *,
    discount: float,
    gae_lambda: float,
) -> Float[Tensor, "agent time copy"]:
    r"""Exponentially weighted sums of temporal differences, cut at episode ends.

    :math:`\delta_t = r_t + \gamma (1 - terminated_t) V(s'_t) - V(s_t)` and
    :math:`A_t = \delta_t + \gamma\lambda (1 - ended_t) A_{t+1}`.

    Args:
        reward: Reward of each step.
        value: Value of the observation that was acted on.
        next_value: Value of the observation that followed, before any reset.
        terminated: The episode ended in a terminal state, or, with a leading axis of agents, the
            agent left it: the value of what follows is not used.
        truncated: The episode was cut off: the value of its last observation is used.
        discount: Gamma.
        gae_lambda: Lambda.

    Returns:
        The advantages.
    """
    delta = reward + discount * next_value * ~terminated - value
    keep = discount * gae_lambda * (~(terminated | truncated)).to(delta.dtype)
    result = torch.empty_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for time in reversed(range(delta.shape[1])):
        running = delta[:, time] + keep[..., time, :] * running
        result[:, time] = running
    return result
