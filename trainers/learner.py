"""What an algorithm is to the training loop: it collects, and it learns from what it collected."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import UsageError
from gradlab.quantity import Quantity
from trainers.aggregation import Aggregation
from trainers.aggregators import make_aggregator
from trainers.checkpoints import Checkpoint
from trainers.config import CRITICS, TrainConfig
from trainers.diagnosis import Diagnosis
from trainers.envs.vector_env import EnvSpec
from trainers.generators import make_generator
from trainers.generators.generator import Generator
from trainers.networks import MLP
from trainers.policies import Policy
from trainers.rollout import Collector, Rollout
from trainers.samples import of_network


class Learner(ABC):
    """Networks, what trains them, and what they are trained on.

    A learner makes its networks when it is made, drawing them from the training's randomness.

    Attributes:
        collector: Steps the environment.
        policy: The policies' form.
        networks: Generators of all that is trained, by name: "actor" and "critic" at least.
        optimiser: Of all of them.
        diagnosis: What is measured of them.
        aggregations: By network what makes one gradient of the agents'; empty: their sum.
        findings: What there is to say of the last update, as what went wrong without ending it, a
            sentence each.
    """

    collector: Collector
    policy: Policy
    networks: dict[str, Generator]
    optimiser: torch.optim.Adam
    diagnosis: Diagnosis
    aggregations: dict[str, Aggregation]
    findings: list[str]

    @abstractmethod
    def begin(self, left: float) -> None:
        """Let fall what falls over the run, before an update.

        Args:
            left: Share of the updates that are not done, from 1 to 1 / updates.
        """

    @abstractmethod
    def collect(self, random: RandomGenerator) -> Rollout:
        """Step every copy of the environment, and keep what there is to learn from it.

        Args:
            random: Source of the actions' randomness.

        Returns:
            What was collected, as `update` takes it and `diagnosis` looks at it.

        Raises:
            NotFinite: If an observation, a value, an action or a reward is not finite.
        """

    @abstractmethod
    def update(self, samples: Mapping[str, Tensor], random: RandomGenerator) -> dict[str, Quantity]:
        """Learn.

        Args:
            samples: Those of the rollout.
            random: Source of what is drawn.

        Returns:
            Losses and the like, by name.

        Raises:
            NotFinite: If a loss or a gradient is not finite. No step was made with it.
        """

    def adapt(
        self,
        rollout: Rollout,
        random: RandomGenerator,  # noqa: ARG002 -- others draw
    ) -> dict[str, Quantity]:
        """Set, after an update, what is not trained but hangs on what agents saw.

        Args:
            rollout: What the update trained on.
            random: Source of what is drawn.

        Returns:
            What there is to record of it, by name.
        """
        self.networks["actor"].adapt(of_network(rollout.samples, "actor"))
        return {}

    def state(self) -> dict[str, Tensor]:
        """What the rest of the training depends on, but for the environment.

        Returns:
            Tensors by name.
        """
        tensors = self.collector.state()
        for network, generator in self.networks.items():
            for name, tensor in generator.state_dict().items():
                tensors[f"{network}.{name}"] = tensor
        for network, aggregation in self.aggregations.items():
            for name, tensor in aggregation.aggregator.state().items():
                tensors[f"aggregator.{network}.{name}"] = tensor
        for number, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
        return tensors

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go on from what `state` returned; the networks are loaded already.

        Args:
            checkpoint: Holds it.
        """
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        for name, tensor in checkpoint.under("adam.").items():
            number, _, kind = name.partition(".")
            if tensor.dim():  # fused Adam takes all to lie in memory as the parameter does
                tensor = torch.empty_like(parameters[int(number)]).copy_(tensor)
            moments.setdefault(int(number), {})[kind] = tensor
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        for network, aggregation in self.aggregations.items():
            aggregation.aggregator.load_state(checkpoint.under(f"aggregator.{network}."))
        self.collector.load_state(checkpoint)

    def load_networks(self, checkpoint: Checkpoint) -> None:
        """Take over what agents act with, and what judges it; not to train on.

        Args:
            checkpoint: Holds what `state` returned.
        """
        for network, generator in self.networks.items():
            generator.load_state_dict(checkpoint.under(f"{network}."))
        for kind, normaliser in self.collector.normalisers.items():
            normaliser.load_state(checkpoint.under(f"normaliser.{kind}."))


def generator_of(
    config: TrainConfig,
    network: str,
    mlp: MLP,
    spec: EnvSpec,
    random: RandomGenerator,
    *,
    ensemble: bool = False,
) -> Generator:
    """Make the generator of one network as it is configured.

    Args:
        config: The sharing schemes and sizes.
        network: "actor" or "critic".
        mlp: The network.
        spec: What the environment looks like.
        random: Source of randomness.
        ensemble: Whether to make an ensemble of such networks, if the scheme has one.

    Returns:
        The generator.

    Raises:
        UsageError: If its method is unknown, or not one of value functions, or nothing can be
            matched.
    """
    method = config.methods[network]
    if network == "critic" and method in CRITICS:
        raise UsageError(
            f"`critic_method` must be a sharing scheme of value functions: {method} shapes "
            f"policies; with it critics have {CRITICS[method]!r} unless told otherwise. Got "
            f"critic_method={method!r}."
        )
    return make_generator(
        method, mlp, spec.agents, random, config.network, config, ensemble=ensemble
    )


def aggregations_of(
    config: TrainConfig, networks: Mapping[str, Generator]
) -> dict[str, Aggregation]:
    """Make what combines the agents' gradients of each network, if that is configured.

    Args:
        config: The aggregator.
        networks: Generators by name.

    Returns:
        One for each network; none if the gradients are summed.

    Raises:
        UsageError: If there is no such aggregator.
    """
    found = {}
    for network, generator in networks.items():
        size = sum(p.numel() for p in generator.parameters() if p.requires_grad)
        shape = (generator.agents, size)
        made = make_aggregator(config.aggregate, config.aggregate_args, shape)
        if made is not None:
            found[network] = Aggregation(made)
    return found
