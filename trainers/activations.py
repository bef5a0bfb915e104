"""The networks' activation functions."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor


class _Tanh(torch.autograd.Function):
    """With the derivative of tanh itself, from its value: one pass, and nothing else is kept."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401, ARG004
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        (output,) = ctx.saved_tensors
        found: Tensor = torch.ops.aten.tanh_backward(gradient, output)
        return found


def tanh(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hyperbolic tangent as 2 sigmoid(2 x) - 1, of which torch's vectorised form is faster.

    Args:
        x: Any numbers.

    Returns:
        Their tangents, within a rounding error of 1.
    """
    # A function of one's own takes long to call, under transforms longer than to compute.
    if is_functorch_wrapped_tensor(x):
        return torch.tanh(x)
    if not torch.is_grad_enabled():
        return _value(x)
    found: Tensor = _Tanh.apply(x)  # type: ignore[no-untyped-call]
    return found


def _value(x: Tensor) -> Tensor:
    return torch.mul(x, 2).sigmoid_().mul_(2).sub_(1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": tanh, "relu": torch.relu}
"""By name."""
