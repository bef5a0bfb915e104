"""How memories, and a hypernetwork's trunks and heads, start."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from trainers.memory import ENCODER, GRU, Memory


def gain_scales(
    features: Float[Tensor, "agent feature"],
    units: Float[Tensor, "feature outputs inputs"],
    gain: float,
) -> Float[Tensor, " feature"]:
    r"""Factors that give every agent's generated weight a wanted gain.

    Agent i's weight is :math:`\sum_f s_f z_{if} U_f`. Its gain is its root mean square singular
    value, :math:`\|W_i\|_F / \sqrt{\min(in, out)}`. Starting from equal factors, Newton steps of
    least norm solve :math:`\|W_i\|_F^2 = gain^2 \min(in, out)` for all agents; with more agents
    than features they find the least-squares compromise.

    Args:
        features: What the trunk makes of each agent's embedding.
        units: One matrix for each feature.
        gain: The wanted gain.

    Returns:
        The factors.
    """
    z = features.double()
    flat = units.double().flatten(1)
    gram = (flat @ flat.mT) / (gain**2 * min(units.shape[1:]))
    forms = z[:, :, None] * gram * z[:, None, :]  # agent i's squared gain is s' forms[i] s
    ones = torch.ones(z.shape[1], dtype=z.dtype)
    squared = torch.einsum("f,ifg,g->i", ones, forms, ones)
    scales = ones / squared.mean().sqrt()
    for _ in range(8):
        rows = forms @ scales  # half the Jacobian of the squared gains
        error = 1 - rows @ scales
        scales = (
            scales + torch.linalg.lstsq(2 * rows, error[:, None], driver="gelsd").solution[:, 0]
        )
    return scales.to(units.dtype)


def make_trunk(widths: tuple[int, ...], random: RandomGenerator) -> nn.Sequential:
    """Make ReLU layers as flax starts them: LeCun-normal weights, biases 0.

    Args:
        widths: From what they read to what they make.
        random: Source of randomness.

    Returns:
        The layers, each followed by a ReLU; none if there is only one width.
    """
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.normal_(0, math.sqrt(1 / inputs), generator=random)
            layer.bias.zero_()
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules)


def initial_memory(
    memory: Memory, random: RandomGenerator, *, id_columns: int = 0
) -> dict[str, Tensor]:
    """Draw a memory's parameters as the official recurrent networks start.

    The dense layer orthogonal with gain sqrt 2; of the gated unit each gate's weights of the state
    orthogonal with gain 1, those of the input LeCun-normal (as flax starts it); biases 0.

    Args:
        memory: Its form.
        random: Source of randomness.
        id_columns: Number of further inputs to the dense layer, the last ones.

    Returns:
        Tensors by name.
    """
    drawn = {name: torch.zeros(shape) for name, shape in memory.shapes.items()}
    weight = torch.empty(memory.size, memory.inputs + id_columns)
    drawn[f"{ENCODER}.weight"] = nn.init.orthogonal_(weight, math.sqrt(2), generator=random)
    drawn[f"{GRU}.weight_ih"].normal_(0, math.sqrt(1 / memory.size), generator=random)
    for gate in drawn[f"{GRU}.weight_hh"].chunk(3):
        nn.init.orthogonal_(gate, generator=random)
    return drawn


def orthogonal_units(
    features: int, shape: tuple[int, ...], gain: float, random: RandomGenerator
) -> Float[Tensor, "feature outputs inputs"]:
    """Draw one orthogonal matrix for each feature (the official "reset fan-in/out" start).

    Args:
        features: How many.
        shape: Outputs and inputs of the generated layer.
        gain: Their gain.
        random: Source of randomness.

    Returns:
        The matrices.
    """
    return torch.stack([
        nn.init.orthogonal_(torch.empty(shape), gain, generator=random) for _ in range(features)
    ])


def plain_units(
    features: int, shape: tuple[int, ...], random: RandomGenerator
) -> Float[Tensor, "feature outputs inputs"]:
    """Draw a head's weight as flax starts any dense layer: LeCun-normal, blind to what it makes.

    Args:
        features: How many the head reads.
        shape: Outputs and inputs of the generated layer.
        random: Source of randomness.

    Returns:
        What one feature adds to the generated weight, for each.
    """
    return torch.empty(features, *shape).normal_(0, math.sqrt(1 / features), generator=random)
