"""Hypernetworks: each agent's network is made from its embedding (HyperMARL, section 4)."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.engine.per_sample import Lookup, Outer, PerSample, Rows
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.config import HypernetworkConfig
from trainers.generators.embeddings import EMBEDDINGS
from trainers.generators.generator import LOG_STD, Generator
from trainers.generators.initialisation import (
    gain_scales,
    initial_memory,
    make_trunk,
    orthogonal_units,
    plain_units,
)
from trainers.generators.tangent_kernel import TrunkKernel, coupling_forms, trunk_kernel
from trainers.networks import MLP, Theta


class HyperNetwork(Generator):
    """theta_i = h(e_i): for each weight and bias of each layer, a trunk and a linear head.

    All heads may read one trunk instead. With no hidden layers they read the embedding itself (the
    linear hypernetwork). The memory of a recurrent network is not made but trained as it is, one
    for all agents, and so is `log_std` (HyperMARL, appendix G.2).

    Attributes:
        embedding: Embeddings [agent, feature], learned or fixed.
        learned: Whether they are learned.
        config: Form and initialisation.
        shapes: Shapes of what the heads make, by policy parameter.
        observation_size: How much of an observation the trunks read before the embedding.
        own_log_std: Whether each agent has its own `log_std`.
    """

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        config: HypernetworkConfig,
        *,
        reset_fan: bool = True,
        own_log_std: bool = False,
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network to generate.
            agents: Number of agents.
            random: Source of randomness.
            config: Form and initialisation; `embedding` names one.
            reset_fan: Start the weight heads so that they make layers of PPO's gains; otherwise
                as any dense layer, whatever `scaled_init`.
            own_log_std: Give each agent a `log_std` of its own.
        """
        super().__init__(mlp, agents)
        self.config = config
        self.own_log_std = own_log_std
        self.embedding: Tensor
        table = EMBEDDINGS[config.embedding].draw(agents, config, random)
        self.learned = config.embedding == "learned"
        if self.learned:
            self.embedding = nn.Parameter(table)
        else:
            self.register_buffer("embedding", table)
        self.shapes = {
            f"{layer}.{kind}": shape
            for layer, (outputs, inputs) in mlp.layers.items()
            for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,)))
        }
        self.parts = nn.ModuleDict()
        # What the trunks read before the embedding; 0 as far as the initial scale goes.
        self.observation_size = mlp.observation_size if self.reads_observation else 0
        nothing = torch.zeros(agents, self.observation_size)
        inputs = torch.cat([nothing, table], dim=1)
        widths = (inputs.shape[1], *config.hidden)
        if config.shared_trunk:
            self.trunk = make_trunk(widths, random)
        for name, shape in self.shapes.items():
            trunk = self.trunk if config.shared_trunk else make_trunk(widths, random)
            head = nn.Linear(widths[-1], math.prod(shape), bias=config.bias)
            with torch.no_grad():
                head.weight.zero_()
                if config.bias:
                    head.bias.zero_()
                if len(shape) == 2:
                    gain = mlp.gain(name.partition(".")[0])
                    if not reset_fan:
                        units = plain_units(head.in_features, shape, random)
                    else:
                        units = orthogonal_units(head.in_features, shape, gain, random)
                        if config.scaled_init:
                            units *= gain_scales(trunk(inputs), units, gain)[:, None, None]
                    head.weight.copy_(units.flatten(1).mT)
            part = nn.ModuleDict(
                {"head": head} if config.shared_trunk else {"trunk": trunk, "head": head}
            )
            self.parts[name.replace(".", "/")] = part
        if mlp.log_std_size:
            shape = (agents, mlp.log_std_size) if own_log_std else (mlp.log_std_size,)
            self.log_std = nn.Parameter(torch.zeros(shape))
        if mlp.memory is not None:
            drawn = initial_memory(mlp.memory, random)
            self.memory = nn.ParameterDict({
                name.replace(".", "/"): nn.Parameter(tensor) for name, tensor in drawn.items()
            })

    @classmethod
    def count(
        cls, mlp: MLP, agents: int, config: HypernetworkConfig, own_log_std: bool = False
    ) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network to generate.
            agents: Number of agents.
            config: As for the constructor.
            own_log_std: As for the constructor.

        Returns:
            Those of embeddings, trunks, heads, memory and log standard deviations.
        """
        size = EMBEDDINGS[config.embedding].size(agents, config.embedding_size)
        reads = size + (mlp.observation_size if cls.reads_observation else 0)
        widths = (reads, *config.hidden)
        trunk = sum(outputs * (inputs + 1) for inputs, outputs in pairwise(widths))
        return (
            (agents * size if config.embedding == "learned" else 0)
            + trunk * (1 if config.shared_trunk else 2 * len(mlp.layers))
            + (widths[-1] + config.bias) * mlp.size_of_layers
            + (mlp.size - mlp.size_of_layers)
            + mlp.log_std_size * (agents if own_log_std else 1)
        )

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        return self.make(self.embedding[agents], agents)

    def make(self, inputs: Float[Tensor, "n *step input"], agents: Int[Tensor, " n"]) -> Theta:
        """Apply the trunks and heads.

        Args:
            inputs: What they read.
            agents: For which agents.

        Returns:
            Tensors [n, *step, ...] by name, or [1, ...] where all share the tensor.
        """
        theta: Theta = {name: self._memory(name)[None] for name in self.mlp.remembering}
        for _, trunk, names in self._trunks():
            features = trunk(inputs)
            for name in names:
                theta[name] = self._head(name)(features).view(
                    *inputs.shape[:-1], *self.shapes[name]
                )
        if self.mlp.log_std_size:
            theta[LOG_STD] = self.log_std[agents] if self.own_log_std else self.log_std[None]
        return theta

    @torch.no_grad()
    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`: the chain rule, row by row.

        All trunks have the same widths and go together: many small operations are what costs.
        """
        found: dict[str, PerSample] = {}

        def note(place: str, layer: nn.Linear, own: Tensor, gradient: Tensor) -> None:
            """Note the gradients of a layer that reads `own`."""
            found[f"{place}.weight"] = Outer(own[None, :, None], gradient[None, :, None])
            if layer.bias is not None:
                found[f"{place}.bias"] = Rows(gradient[None])

        trunks = self._trunks()
        steps = [  # for each step into the trunks, the layers that stand there
            [
                (f"{path}.{place}", layer)
                for (path, _, _), (place, layer) in zip(trunks, step, strict=True)
            ]
            for step in zip(*(_linear_layers(trunk) for _, trunk, _ in trunks), strict=True)
        ]
        weights = [torch.stack([layer.weight for _, layer in step]) for step in steps]
        reads = [self.embedding.expand(len(trunks), -1, -1)]
        for step, weight in zip(steps, weights, strict=True):
            bias = torch.stack([layer.bias for _, layer in step])[:, None]
            reads.append(torch.baddbmm(bias, reads[-1], weight.mT).relu_())
        own = [read[:, agents] for read in reads]
        gradient = torch.zeros_like(own[-1])
        for of_trunk, read, (_, _, names) in zip(gradient, own[-1], trunks, strict=True):
            for name in names:
                head, rows = self._head(name), z[name].flatten(1)
                note(_of_head(name), head, read, rows)
                of_trunk.addmm_(rows, head.weight)
        for number, step in reversed([*enumerate(steps)]):
            gradient *= own[number + 1] > 0  # back through the ReLU
            for (place, layer), read, rows in zip(step, own[number], gradient, strict=True):
                note(place, layer, read, rows)
            gradient = gradient @ weights[number]
        of_embedding = gradient.sum(0)
        if self.learned:
            found["embedding"] = Lookup(
                agents[None, :, None], of_embedding[None, :, None], self.embedding.shape
            )
        if self.mlp.log_std_size:
            rows = z[LOG_STD]
            found[LOG_STD] = (
                Lookup(agents[None, :, None], rows[None, :, None], self.log_std.shape)
                if self.own_log_std
                else Rows(rows[None])
            )
        found |= {_of_memory(name): Rows(z[name][None]) for name in self.mlp.remembering}
        return found

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        if self.learned:
            return self.embedding.detach(), "learned agent embeddings"
        theta = self.policy_for(torch.zeros(self.agents, 1, self.observation_size))
        rows = torch.cat(
            [t.detach().flatten(1) for t in theta.values() if len(t) == self.agents], dim=1
        )
        what = f"its embedding is fixed: {self.config.embedding}"
        return rows, f"each agent's generated weights ({what})"

    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`.

        Two agents' weights are tied by the head, the same for all of them, and by the trunk. A
        learned embedding, which is the agent's own, ties each weight to all others of the agent,
        and so does a trunk that all heads read, between agents as well.
        """
        trained = self.learned and self.embedding.requires_grad
        inputs = self.embedding.shape[1]
        kernels = [
            TrunkKernel.free(self._memory(name), self.agents, inputs, False)
            for name in self.mlp.remembering
        ]
        kernels += [
            trunk_kernel(trunk, [self._head(name) for name in names], self.embedding, trained)
            for _, trunk, names in self._trunks()
        ]
        if self.mlp.log_std_size:
            kernels.append(TrunkKernel.free(self.log_std, self.agents, inputs, self.own_log_std))
        names = (*self.mlp.remembering, *self.shapes, *([LOG_STD] if self.mlp.log_std_size else []))
        return coupling_forms(names, kernels)

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`; a trunk that all heads read is a layer of its own."""
        inside = parameter.removeprefix("parts.").removeprefix("memory.")
        return inside.partition("/")[0].partition(".")[0]

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        config = self.config
        if not (config.hidden or self.learned):
            scale = "(e_i . e_k + 1)" if config.bias else "(e_i . e_k)"
            parts = [f"J_i J_k^T = {scale} I, e the agents' fixed {config.embedding} embeddings"]
        else:
            trunks = "one trunk" if config.shared_trunk else "a trunk for each weight and bias"
            through = f"heads and {trunks}" if config.hidden else "heads"
            read = "learned" if self.learned else f"fixed {config.embedding}"
            parts = [f"chain rule through {through}, from the agent's {read} embedding"]
            if config.bias:
                parts.append("identity for the heads' biases, which all agents share")
        if self.mlp.log_std_size:
            parts.append(
                "selects the agent's own log_std"
                if self.own_log_std
                else "identity for the shared log_std"
            )
        if self.mlp.memory is not None:
            parts.append("identity for the shared memory")
        return "; ".join(parts)

    def _memory(self, name: str) -> Tensor:
        held: Tensor = self.memory[name.replace(".", "/")]
        return held

    def _part(self, name: str) -> nn.ModuleDict:
        part = self.parts[name.replace(".", "/")]
        assert isinstance(part, nn.ModuleDict)
        return part

    def _head(self, name: str) -> nn.Linear:
        head = self._part(name)["head"]
        assert isinstance(head, nn.Linear)
        return head

    def _trunks(self) -> list[tuple[str, nn.Sequential, tuple[str, ...]]]:
        """Each trunk's name, the trunk, and the policy parameters whose heads read it."""
        if self.config.shared_trunk:
            return [("trunk", self.trunk, tuple(self.shapes))]
        found: list[tuple[str, nn.Sequential, tuple[str, ...]]] = []
        for name in self.shapes:
            trunk = self._part(name)["trunk"]
            assert isinstance(trunk, nn.Sequential)
            found.append((f"parts.{name.replace('.', '/')}.trunk", trunk, (name,)))
        return found


def _linear_layers(trunk: nn.Sequential) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in trunk.named_children() if isinstance(layer, nn.Linear)]


def _of_memory(name: str) -> str:
    return f"memory.{name.replace('.', '/')}"


def _of_head(name: str) -> str:
    return f"parts.{name.replace('.', '/')}.head"
