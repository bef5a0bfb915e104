r"""How a hypernetwork ties agents together, in closed form.

A head makes :math:`\theta_i = W f(e_i) + b` from the features f of its trunk. With respect to the
parameters of all three,

.. math:: K_{ik} = c_{ik} I + \sum_l s^l_{ik} (W B^l_i) (W B^l_k)^\top

(the neural tangent kernel of a network with several outputs; Jacot et al., NeurIPS 2018):
:math:`c = f(e_i) \cdot f(e_k) + 1` is the head's share; a layer l of the trunk that reads
:math:`x_i` has :math:`s = x_i \cdot x_k + 1` and the derivatives :math:`B_i` of the features with
respect to the layer's outputs; a learned embedding has :math:`s = \delta_{ik}` and the derivatives
with respect to it. A 1 is there only with a bias. Traces and norms follow from
:math:`G = W^\top W`, as small as the trunk is wide; neither K nor J is formed. All in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from gradlab.metrics.coupling_forms import CouplingForms

Pairs = Float[Tensor, "agent agent_other"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PartKernel:
    """What is known of one policy parameter's K_ik.

    Attributes:
        head: Traces of the head's share.
        trace: Traces of the whole.
        squared: Squared Frobenius norms.
        embedding: (W B)^T (W B) of each agent's trained embedding, 0 without one: its inner
            product with another parameter's is the squared norm of the block between the two.
    """

    head: Pairs
    trace: Pairs
    squared: Pairs
    embedding: Float[Tensor, "agent input input"]

    @classmethod
    def shared(cls, parameter: Tensor, agents: int, inputs: int) -> "PartKernel":
        """Of a parameter that all agents share.

        Args:
            parameter: The trained parameter, which is the policy parameter.
            agents: Number of agents.
            inputs: Size of an embedding.

        Returns:
            The kernel of an identity; 0 if the parameter is frozen.
        """
        like = parameter.detach().double()
        size = like.new_full((agents, agents), parameter.numel() * parameter.requires_grad)
        nothing = like.new_zeros(agents, inputs, inputs)
        return cls(head=size, trace=size, squared=size, embedding=nothing)


@torch.no_grad()
def part_kernel(
    trunk: nn.Sequential,
    head: nn.Linear,
    embedding: Float[Tensor, "agent input"],
    trained: bool,
) -> PartKernel:
    """Take the kernel of one head and its trunk, with respect to what requires a gradient.

    Args:
        trunk: Linear layers, each followed by a ReLU.
        head: Makes the policy parameter.
        embedding: What the trunk reads.
        trained: Whether the embedding is learned with them.

    Returns:
        The kernel.
    """
    inputs = embedding.double()
    passed: list[tuple[nn.Linear, Tensor, Tensor]] = []
    features = inputs
    for layer in trunk:
        if isinstance(layer, nn.Linear):
            read = features
            features = functional.linear(read, layer.weight.double(), layer.bias.double()).relu()
            passed.append((layer, read, (features > 0).to(features)))
    weight = head.weight.double()
    seen = _FeatureKernel(weight.mT @ weight, len(inputs))
    for layer, read, active in reversed(passed):
        seen.rectify(active)
        seen.add(_layer_scale(layer, read))
        seen.through(layer.weight.double())
    if trained:
        seen.add(torch.eye(len(inputs)).to(inputs))
    outputs, factor = len(weight), _layer_scale(head, features)
    squared = outputs * factor.square() + 2 * factor * seen.trace + seen.squared
    return PartKernel(
        head=outputs * factor,
        trace=outputs * factor + seen.trace,
        squared=squared.clamp(min=0),  # with a factor below 0 it may cancel
        embedding=seen.sandwich * trained,
    )


class _FeatureKernel:
    """The sum over l, gathered from the features back to the embedding.

    Attributes:
        trace: Its trace.
        squared: Its squared Frobenius norm.
        sandwich: B^T G B of each agent, B being the derivatives with respect to where it stands.
    """

    def __init__(self, gram: Float[Tensor, "feature feature"], agents: int) -> None:
        self.trace = gram.new_zeros(agents, agents)
        self.squared = gram.new_zeros(agents, agents)
        self.sandwich = gram.expand(agents, *gram.shape)
        self._derivatives = torch.eye(len(gram)).to(gram).expand_as(self.sandwich)
        self._moved = self.sandwich  # G B
        # s and (B^l)^T G B of the terms l that are in the sum
        self._terms: list[tuple[Pairs, Tensor]] = []

    def add(self, scale: Pairs) -> None:
        """Add the term with this s."""
        self.trace += scale * _inner_products(self._derivatives, self._moved)
        for other, block in self._terms:
            self.squared += 2 * scale * other * _inner_products(block, block)
        self.squared += scale.square() * _inner_products(self.sandwich, self.sandwich)
        self._terms.append((scale, self.sandwich))

    def rectify(self, active: Float[Tensor, "agent unit"]) -> None:
        """Go back through a ReLU, elementwise: most of a shallow trunk's cost is saved here."""
        columns = active[:, None]
        self._derivatives, self._moved = self._derivatives * columns, self._moved * columns
        self._terms = [(scale, block * columns) for scale, block in self._terms]
        self.sandwich = active[:, :, None] * self.sandwich * columns

    def through(self, weight: Float[Tensor, "output input"]) -> None:
        """Go back through a linear layer."""
        self._derivatives, self._moved = self._derivatives @ weight, self._moved @ weight
        self._terms = [(scale, block @ weight) for scale, block in self._terms]
        self.sandwich = weight.mT @ self.sandwich @ weight


def coupling_forms(names: tuple[str, ...], kernels: Sequence[PartKernel]) -> CouplingForms:
    """Put the kernels of all policy parameters together.

    Args:
        names: The policy parameters.
        kernels: Their kernels, which share nothing but the embedding.

    Returns:
        The forms, with the blocks between each agent's parameters.
    """
    embedding = torch.stack([kernel.embedding for kernel in kernels]).flatten(2)
    between = torch.einsum("pia,qia->pqi", embedding, embedding)
    squared = torch.diag_embed(between)
    own = range(len(names))
    squared[own, own] = torch.stack([kernel.squared for kernel in kernels])
    return CouplingForms(
        names=names,
        head=torch.stack([kernel.head for kernel in kernels]),
        trace=torch.stack([kernel.trace for kernel in kernels]),
        squared=squared,
    )


def _layer_scale(layer: nn.Linear, inputs: Float[Tensor, "agent input"]) -> Pairs:
    """The multiple of the identity that the kernel of a layer's outputs is."""
    scale = inputs @ inputs.mT * layer.weight.requires_grad
    return scale + (layer.bias is not None and layer.bias.requires_grad)


def _inner_products(
    one: Float[Tensor, "agent row column"], other: Float[Tensor, "agent_other row column"]
) -> Pairs:
    return one.flatten(1) @ other.flatten(1).mT
