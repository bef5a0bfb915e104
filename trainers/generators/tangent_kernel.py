r"""How a hypernetwork ties agents together, in closed form.

Heads make :math:`\theta_p = W_p f(e_i) + b_p` from the features f of the trunk that they read. With
respect to the parameters of trunk, heads and embedding, the block with rows of policy parameter p
and columns of q is

.. math:: K_{ik}[p, q] = \delta_{pq} c_{ik} I + \sum_l s^l_{ik} (W_p B^l_i) (W_q B^l_k)^\top

(the neural tangent kernel of a network with several outputs; Jacot et al., NeurIPS 2018):
:math:`c = f(e_i) \cdot f(e_k) + 1` is the head's share; a layer l of the trunk that reads
:math:`x_i` has :math:`s = x_i \cdot x_k + 1` and the derivatives :math:`B_i` of the features with
respect to the layer's outputs; a learned embedding has :math:`s = \delta_{ik}` and the derivatives
with respect to it. A 1 is there only with a bias. Heads of different trunks have the embedding's
term alone in common. Traces and norms follow from :math:`G_p = W_p^\top W_p`, as small as the trunk
is wide; neither K nor J is formed. All in float64.
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
class TrunkKernel:
    """What is known of the blocks of K_ik that belong to the heads of one trunk.

    Attributes:
        head: Traces of the heads' own share, by head.
        trace: Traces of the whole, by head.
        squared: Squared Frobenius norms of the blocks between heads.
        embedding: (W B)^T (W B) of each agent's trained embedding, 0 without one: its inner
            product with another head's is the squared norm of the block between the two, if
            they have different trunks.
    """

    head: Float[Tensor, "head agent agent_other"]
    trace: Float[Tensor, "head agent agent_other"]
    squared: Float[Tensor, "head head_other agent agent_other"]
    embedding: Float[Tensor, "head agent input input"]

    @classmethod
    def free(cls, parameter: Tensor, agents: int, inputs: int, own: bool) -> "TrunkKernel":
        """Of a policy parameter that is trained as it is.

        Args:
            parameter: The trained parameter.
            agents: Number of agents.
            inputs: Size of an embedding.
            own: Whether each agent has its own, or all share one.

        Returns:
            The kernel of an identity, 0 between agents that share nothing; 0 if the parameter is
            frozen.
        """
        like = parameter.detach().double()
        size = parameter.numel() // (agents if own else 1) * parameter.requires_grad
        pairs = torch.eye(agents).to(like) if own else like.new_ones(agents, agents)
        whole = size * pairs[None]
        nothing = like.new_zeros(1, agents, inputs, inputs)
        return cls(head=whole, trace=whole, squared=whole[None], embedding=nothing)


@torch.no_grad()
def trunk_kernel(
    trunk: nn.Sequential,
    heads: Sequence[nn.Linear],
    embedding: Float[Tensor, "agent input"],
    trained: bool,
) -> TrunkKernel:
    """Take the kernel of a trunk and the heads that read it, of what requires a gradient.

    Args:
        trunk: Linear layers, each followed by a ReLU.
        heads: Each makes a policy parameter.
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
    grams = [weight.mT @ weight for weight in (head.weight.double() for head in heads)]
    seen = _FeatureKernel(torch.stack(grams), len(inputs))
    for layer, read, active in reversed(passed):
        seen.rectify(active)
        seen.add(_layer_scale(layer, read))
        seen.through(layer.weight.double())
    if trained:
        seen.add(torch.eye(len(inputs)).to(inputs))
    outputs = torch.tensor([head.out_features for head in heads]).to(inputs)[:, None, None]
    factor = torch.stack([_layer_scale(head, features) for head in heads])
    squared = seen.squared
    own = range(len(heads))
    squared[own, own] += outputs * factor.square() + 2 * factor * seen.trace
    return TrunkKernel(
        head=outputs * factor,
        trace=outputs * factor + seen.trace,
        squared=squared.clamp(min=0),  # with a factor below 0 it may cancel
        embedding=seen.sandwich * trained,
    )


class _FeatureKernel:
    """The sum over l, gathered from the features back to the embedding.

    Attributes:
        trace: Its trace, by head.
        squared: Its squared Frobenius norm, by two heads.
        sandwich: B^T G B of each head and agent, B being the derivatives with respect to where it
            stands.
    """

    def __init__(self, grams: Float[Tensor, "head feature feature"], agents: int) -> None:
        heads, features = grams.shape[:2]
        self.trace = grams.new_zeros(heads, agents, agents)
        self.squared = grams.new_zeros(heads, heads, agents, agents)
        self.sandwich = grams[:, None].expand(heads, agents, features, features)
        self._derivatives = torch.eye(features).to(grams).expand(1, agents, features, features)
        self._moved = self.sandwich  # G B
        # s and (B^l)^T G B of the terms l that are in the sum
        self._terms: list[tuple[Pairs, Tensor]] = []

    def add(self, scale: Pairs) -> None:
        """Add the term with this s."""
        self.trace += scale * _inner_products(self._derivatives, self._moved)[0]
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


def coupling_forms(names: tuple[str, ...], kernels: Sequence[TrunkKernel]) -> CouplingForms:
    """Put the kernels of all policy parameters together.

    Args:
        names: The policy parameters.
        kernels: Kernels of the trunks, which share nothing but the embedding; their heads make the
            policy parameters in this order.

    Returns:
        The forms, with the blocks between parameters.
    """
    embedding = torch.cat([kernel.embedding for kernel in kernels]).flatten(2)
    squared = torch.diag_embed(torch.einsum("pia,qia->pqi", embedding, embedding))
    start = 0
    for kernel in kernels:
        heads = slice(start, start + len(kernel.head))
        squared[heads, heads] = kernel.squared
        start = heads.stop
    return CouplingForms(
        names=names,
        head=torch.cat([kernel.head for kernel in kernels]),
        trace=torch.cat([kernel.trace for kernel in kernels]),
        squared=squared,
    )


def _layer_scale(layer: nn.Linear, inputs: Float[Tensor, "agent input"]) -> Pairs:
    """The multiple of the identity that the kernel of a layer's outputs is."""
    scale = inputs @ inputs.mT * layer.weight.requires_grad
    return scale + (layer.bias is not None and layer.bias.requires_grad)


def _inner_products(
    one: Float[Tensor, "some agent row column"], other: Float[Tensor, "more agent_other row column"]
) -> Float[Tensor, "some more agent agent_other"]:
    flat = one.flatten(2).flatten(0, 1) @ other.flatten(2).flatten(0, 1).mT
    return flat.view(*one.shape[:2], *other.shape[:2]).transpose(1, 2)
