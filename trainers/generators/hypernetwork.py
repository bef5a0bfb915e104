"""Hypernetworks: each agent's network is made from its embedding (HyperMARL, section 4)."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.engine.per_sample import Lookup, Outer, PerSample, Rows
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.generators.generator import Generator
from trainers.generators.tangent_kernel import PartKernel, coupling_forms, part_kernel
from trainers.networks import MLP, Theta


class HyperNetwork(Generator):
    """theta_i = h(e_i): for each weight and bias of each layer, a trunk and a linear head.

    With no hidden layers the head reads the embedding itself (the linear hypernetwork).

    Attributes:
        embedding: Learned embeddings [agent, feature], or the fixed one-hot IDs.
    """

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        *,
        embedding_size: int | None,
        hidden: tuple[int, ...],
        scaled_init: bool,
        bias: bool = True,
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network to generate.
            agents: Number of agents.
            random: Source of randomness.
            embedding_size: Size of a learned embedding; None for fixed one-hot IDs.
            hidden: Widths of the trunks' ReLU layers.
            scaled_init: Scale the weight heads to PPO's gains, see `gain_scales`.
            bias: Give the heads a bias, the part of a policy that all agents share.
        """
        super().__init__(mlp, agents)
        self.embedding: Tensor
        if embedding_size is None:
            self.register_buffer("embedding", torch.eye(agents))
        else:
            table = torch.empty(agents, embedding_size)
            self.embedding = nn.Parameter(
                nn.init.orthogonal_(table, math.sqrt(2), generator=random)
            )
        self.learned = embedding_size is not None
        self.shapes = {
            f"{layer}.{kind}": shape
            for layer, (outputs, inputs) in mlp.layers.items()
            for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,)))
        }
        self.parts = nn.ModuleDict()
        # What the trunks read before the embedding; 0 as far as the initial scale goes.
        self.observation_size = mlp.sizes[0] if self.reads_observation else 0
        nothing = torch.zeros(agents, self.observation_size)
        inputs = torch.cat([nothing, self.embedding.detach()], dim=1)
        for name, shape in self.shapes.items():
            widths = (inputs.shape[1], *hidden)
            trunk = _trunk(widths, random)
            head = nn.Linear(widths[-1], math.prod(shape), bias=bias)
            with torch.no_grad():
                head.weight.zero_()
                if bias:
                    head.bias.zero_()
                if len(shape) == 2:
                    gain = mlp.gain(name.partition(".")[0])
                    units = _orthogonal_stack(head.in_features, shape, gain, random)
                    if scaled_init:
                        features = trunk(inputs)
                        units *= gain_scales(features, units, gain)[:, None, None]
                    head.weight.copy_(units.flatten(1).mT)
            self.parts[name.replace(".", "/")] = nn.ModuleDict({"trunk": trunk, "head": head})
        if mlp.log_std_size:
            self.log_std = nn.Parameter(torch.zeros(mlp.log_std_size))

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        return self.make(self.embedding[agents])

    def make(self, inputs: Float[Tensor, "n input"]) -> Theta:
        """Apply the trunks and heads.

        Args:
            inputs: What they read.

        Returns:
            Tensors [n, ...] by name, or [1, ...] where all share the tensor.
        """
        theta: Theta = {}
        for name, shape in self.shapes.items():
            part = self.parts[name.replace(".", "/")]
            assert isinstance(part, nn.ModuleDict)
            theta[name] = part["head"](part["trunk"](inputs)).view(-1, *shape)
        if self.mlp.log_std_size:
            theta["log_std"] = self.log_std[None]
        return theta

    @torch.no_grad()
    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`: the chain rule, row by row; features are made once."""
        found: dict[str, PerSample] = {}
        embedded = self.embedding[agents]
        of_embedding = torch.zeros_like(embedded)
        for name in self.shapes:
            path = name.replace(".", "/")
            part = self.parts[path]
            assert isinstance(part, nn.ModuleDict)
            assert isinstance(part["head"], nn.Linear)
            read, gradient = self.embedding, z[name].flatten(1)
            layers = [(f"trunk.{n}", m) for n, m in part["trunk"].named_children()]
            passed: list[tuple[str, nn.Linear, Tensor]] = []
            for place, module in (*layers, ("head", part["head"])):
                if isinstance(module, nn.Linear):
                    passed.append((place, module, read))
                read = module(read) if module is not part["head"] else read
            for place, module, inputs in reversed(passed):
                own = embedded if inputs is self.embedding else inputs[agents]
                found[f"parts.{path}.{place}.weight"] = Outer(
                    own[None, :, None], gradient[None, :, None]
                )
                if module.bias is not None:
                    found[f"parts.{path}.{place}.bias"] = Rows(gradient[None])
                gradient = gradient @ module.weight
                if module is not passed[0][1]:
                    gradient *= own > 0  # what a layer reads has passed a ReLU
            of_embedding += gradient
        if self.learned:
            found["embedding"] = Lookup(
                agents[None, :, None], of_embedding[None, :, None], self.embedding.shape
            )
        if self.mlp.log_std_size:
            found["log_std"] = Rows(z["log_std"][None])
        return found

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        if self.learned:
            return self.embedding.detach(), "learned agent embeddings"
        theta = self.policy_for(torch.zeros(self.agents, 1, self.observation_size))
        rows = torch.cat(
            [t.detach().flatten(1) for t in theta.values() if len(t) == self.agents], dim=1
        )
        return rows, "each agent's generated weights (its embedding is a fixed one-hot)"

    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`.

        Two agents' weights are tied by the head, the same for all of them, and by the trunk. A
        learned embedding, which is the agent's own, ties each weight to all others of the agent.
        """
        trained = self.learned and self.embedding.requires_grad
        kernels: list[PartKernel] = []
        for name in self.shapes:
            part = self.parts[name.replace(".", "/")]
            assert isinstance(part, nn.ModuleDict)
            trunk, head = part["trunk"], part["head"]
            assert isinstance(trunk, nn.Sequential)
            assert isinstance(head, nn.Linear)
            kernels.append(part_kernel(trunk, head, self.embedding, trained))
        if self.mlp.log_std_size:
            kernels.append(PartKernel.shared(self.log_std, self.agents, self.embedding.shape[1]))
        names = (*self.shapes, *(["log_std"] if self.mlp.log_std_size else []))
        return coupling_forms(names, kernels)

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        return parameter.removeprefix("parts.").partition("/")[0]


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


def _trunk(widths: tuple[int, ...], random: RandomGenerator) -> nn.Sequential:
    """ReLU layers as flax starts them: LeCun-normal weights, biases 0."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.normal_(0, math.sqrt(1 / inputs), generator=random)
            layer.bias.zero_()
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules)


def _orthogonal_stack(
    count: int, shape: tuple[int, ...], gain: float, random: RandomGenerator
) -> Float[Tensor, "feature outputs inputs"]:
    return torch.stack([
        nn.init.orthogonal_(torch.empty(shape), gain, generator=random) for _ in range(count)
    ])
