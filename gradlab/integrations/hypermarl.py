"""HyperMARL as a model of BenchMARL: a hypernetwork makes each agent's network.

Tessera, Rahman, Storkey & Albrecht, "HyperMARL: Adaptive Hypernetworks for Multi-Agent RL", NeurIPS
2025, section 4.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarl.models.common import Model, ModelConfig
from tensordict import TensorDictBase
from torch import Tensor, nn

from gradlab.checks import UsageError, check
from gradlab.integrations.agent_network import Axis, Piece, Read, name_of, pieces
from trainers.activations import ACTIVATIONS
from trainers.config import HypernetworkConfig
from trainers.generators.embeddings import EMBEDDINGS
from trainers.generators.hypernetwork import HyperNetwork
from trainers.networks import MLP, Theta


@dataclass
class HyperMarlConfig(ModelConfig):  # type: ignore[misc]
    """Settings of `HyperMarl`, of actors and critics alike.

    Whether parameters are shared (`share_policy_params`, `share_param_critic`) makes no difference:
    the hypernetwork is how they are. Only a centralised critic must not be shared, which would have
    no agents.

    Attributes:
        num_cells: Widths of the generated network's hidden layers.
        activation: Between them, "tanh" or "relu".
        embedding: What the hypernetwork reads of an agent: "learned", "one-hot", "orthogonal",
            "random" or "equiangular".
        embedding_size: Size of an embedding that is not one-hot or equiangular.
        cosine: Cosine of any two agents' equiangular embeddings, from 0 to 1.
        hidden: Widths of the hypernetwork's trunks; () for the linear hypernetwork.
        shared_trunk: One trunk for all weights and biases, not one for each.
        bias: Whether the heads have a bias, which all agents share.
        reset_fan: Start the generated layers with PPO's gains.
    """

    num_cells: Sequence[int] = (64, 64)
    activation: str = "tanh"
    embedding: str = "learned"
    embedding_size: int = 8
    cosine: float = 0.5
    hidden: Sequence[int] = (64,)
    shared_trunk: bool = False
    bias: bool = True
    reset_fan: bool = True

    def __post_init__(self) -> None:
        check(
            self.activation in ACTIVATIONS,
            "activation",
            f"be {' or '.join(ACTIVATIONS)}",
            self.activation,
        )
        _ = EMBEDDINGS[self.embedding]
        check(0 <= self.cosine <= 1, "cosine", "be from 0 to 1", self.cosine)
        for name in ("num_cells", "hidden"):
            widths = getattr(self, name)
            check(all(int(width) > 0 for width in widths), name, "hold widths above 0", widths)

    @staticmethod
    def associated_class() -> type["HyperMarl"]:
        """See `benchmarl.models.common.ModelConfig`."""
        return HyperMarl

    @classmethod
    def get_from_yaml(cls, path: str | None = None) -> "HyperMarlConfig":
        """See `benchmarl.models.common.ModelConfig`; the defaults are those of the class.

        Args:
            path: A YAML file with a `name` and settings.

        Returns:
            The settings.
        """
        if path is None:
            return cls()
        found: HyperMarlConfig = super().get_from_yaml(path)
        return found


class HyperMarl(Model):  # type: ignore[misc]
    """Each agent's network, made by a hypernetwork from the agent's embedding.

    Attributes:
        generator: The hypernetwork, `trainers.generators.hypernetwork.HyperNetwork`.
    """

    def __init__(
        self,
        *,
        num_cells: Sequence[int],
        activation: str,
        embedding: str,
        embedding_size: int,
        cosine: float,
        hidden: Sequence[int],
        shared_trunk: bool,
        bias: bool,
        reset_fan: bool,
        **of_benchmarl: Any,  # noqa: ANN401
    ) -> None:
        """Draw the initial parameters, by torch's random state.

        Args:
            num_cells: See `HyperMarlConfig`.
            activation: See `HyperMarlConfig`.
            embedding: See `HyperMarlConfig`.
            embedding_size: See `HyperMarlConfig`.
            cosine: See `HyperMarlConfig`.
            hidden: See `HyperMarlConfig`.
            shared_trunk: See `HyperMarlConfig`.
            bias: See `HyperMarlConfig`.
            reset_fan: See `HyperMarlConfig`.
            **of_benchmarl: What BenchMARL gives every model.

        Raises:
            UsageError: If it is asked for a centralised critic that all agents share.
        """
        super().__init__(**of_benchmarl)
        if not self.output_has_agent_dim:
            raise UsageError(
                "a HyperMarl critic that sees all agents must be each agent's own. Got "
                "share_param_critic=True; set it to False in the algorithm's configuration."
            )
        observed = sum(spec.shape[-1] for spec in self.input_spec.values(True, True))
        if self.centralised and self.input_has_agent_dim:
            observed *= self.n_agents
        mlp = MLP(
            sizes=(observed, *num_cells, self.output_leaf_spec.shape[-1]),
            activation=activation,
            head_gain=1.0 if self.is_critic else 0.01,
        )
        config = HypernetworkConfig(
            embedding=embedding,
            embedding_size=embedding_size,
            cosine=cosine,
            hidden=tuple(hidden),
            shared_trunk=shared_trunk,
            bias=bias,
        )
        random = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        made = HyperNetwork(mlp, self.n_agents, random, config, reset_fan=reset_fan)
        self.generator = made.to(self.device)

    def _forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Apply each agent's network to what it reads."""
        read = torch.cat([tensordict.get(key) for key in self.in_keys], dim=-1)
        if self.centralised:
            joined = read.flatten(-2) if self.input_has_agent_dim else read
            of_agents = joined.expand(self.n_agents, *joined.shape)
        else:
            of_agents = read.movedim(-2, 0)
        theta = self.generator(torch.arange(self.n_agents, device=read.device))
        # The network takes samples in one row; there may be none, or several axes of them.
        rows = of_agents.reshape(self.n_agents, -1, of_agents.shape[-1])
        made = self.generator.mlp.forward(theta, rows)
        made = made.view(*of_agents.shape[:-1], made.shape[-1]).movedim(0, -2)
        tensordict.set(self.out_key, made)
        return tensordict


@pieces.register
def _(module: HyperMarl) -> Iterator[Piece]:
    axis: Axis = "own"
    if module.centralised:
        axis = "all" if module.input_has_agent_dim else "common"
    mlp = module.generator.mlp
    yield Piece(
        name="hypermarl",
        reads=(Read(tuple(module.in_keys), axis),),
        writes=(name_of(module.out_key),),
        make=lambda agent, views: _Generated(mlp),  # noqa: ARG005
        generator=module.generator,
    )


class _Generated(nn.Module):
    """The network that parameters are made for, by their names."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self._mlp = mlp
        for layer, (outputs, inputs) in mlp.layers.items():
            self.add_module(layer, nn.utils.skip_init(nn.Linear, inputs, outputs))

    def forward(self, read: Tensor) -> Tensor:
        theta: Theta = {}
        for layer in self._mlp.layers:
            of = self.get_submodule(layer)
            assert isinstance(of, nn.Linear)
            theta |= {f"{layer}.weight": of.weight, f"{layer}.bias": of.bias}
        return self._mlp.forward(theta, read)
