"""The networks' activation functions."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _Tanh(torch.autograd.Function):
    """With the derivative of tanh itself, from its value: one pass, and nothing else is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401, ARG004
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        (output,) = ctx.saved_tensors
        found: Tensor = torch.ops.aten.tanh_backward(gradient, output)
        return found

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # noqa: ANN401
        (output,) = ctx.saved_tensors
        found: Tensor = torch.ops.aten.tanh_backward(tangent, output)
        return found


def tanh(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hyperbolic tangent as 2 sigmoid(2 x) - 1, of which torch's vectorised form is faster.

    Args:
        x: Any numbers.

    Returns:
        Their tangents, within a rounding error of 1.
    """
    if not torch.is_grad_enabled():  # a function of one's own takes longer to call than to compute
        return _value(x)
    found: Tensor = _Tanh.apply(x)  # type: ignore[no-untyped-call]
    return found


def _value(x: Tensor) -> Tensor:
    return torch.mul(x, 2).sigmoid_().mul_(2).sub_(1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": tanh, "relu": torch.relu}
"""By name."""
