"""The policy and value networks as plain functions of their parameters.

One implementation serves training, acting and diagnostics: tensors may come for one agent and one
sample (as `torch.func.vmap` presents them), or for all agents and samples at once. With all agents,
a parameter has a leading agent axis, of size 1 where the agents share it; each agent's samples meet
only its own parameters, in one batched product.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from trainers.activations import ACTIVATIONS

Theta = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MLP:
    """A multi-layer perceptron's form; its parameters are handed in.

    Attributes:
        sizes: Widths from input to output.
        activation: Between layers: "tanh" or "relu".
        head_gain: Gain of the last layer's orthogonal initialisation; that of the others is
            sqrt 2.
        log_std_size: Length of the free vector `log_std` of a Gaussian policy; 0 for none.
    """

    sizes: tuple[int, ...]
    activation: str
    head_gain: float
    log_std_size: int = 0

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer by name, in order."""
        names = [f"layer{i}" for i in range(len(self.sizes) - 2)] + ["head"]
        shapes = zip(self.sizes[1:], self.sizes[:-1], strict=True)
        return dict(zip(names, shapes, strict=True))

    @property
    def size(self) -> int:
        """Number of weights and biases, without `log_std`."""
        return sum(outputs * (inputs + 1) for outputs, inputs in self.layers.values())

    def gain(self, layer: str) -> float:
        """Gain of a layer's orthogonal initialisation.

        Args:
            layer: A name in `layers`.

        Returns:
            The gain, PPO's usual one.
        """
        return self.head_gain if layer == "head" else math.sqrt(2)

    def forward(
        self, theta: Theta, x: Float[Tensor, "*batch inputs"]
    ) -> Float[Tensor, "*batch outputs"]:
        """Apply the network.

        Args:
            theta: Parameters by name, "layer0.weight" [outputs, inputs] and so on; or each with a
                leading axis [agent] or [1], or axes [agent, sample].
            x: Inputs; [agent, sample, inputs] if the parameters have an agent axis.

        Returns:
            Outputs.
        """
        *hidden, head = self.layers
        activation = ACTIVATIONS[self.activation]
        for layer in hidden:
            x = activation(_linear(x, theta[f"{layer}.weight"], theta[f"{layer}.bias"]))
        return _linear(x, theta[f"{head}.weight"], theta[f"{head}.bias"])


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.dim() == 2:
        return functional.linear(x, weight, bias)
    if weight.dim() == 4:
        return (weight @ x[..., None]).squeeze(-1) + bias
    if weight.shape[0] > 1:
        return torch.baddbmm(bias[:, None], x, weight.mT)
    if bias.shape[0] > 1:
        return functional.linear(x, weight[0]) + bias[:, None]
    return functional.linear(x, weight[0], bias[0])


def per_agent(parameter: Tensor, x: Tensor) -> Tensor:
    """Give a free vector the axes of what it is combined with.

    Args:
        parameter: A vector [size], one with an agent axis [agent, size] or [1, size], or one for
            every sample [agent, sample, size].
        x: A tensor [*batch, size], with batch axes [agent, sample] in the latter cases.

    Returns:
        The parameter, ready to be broadcast against `x`.
    """
    return parameter[:, None].expand_as(x) if parameter.dim() == 2 else parameter
