"""A sharing scheme by its registered name: what makes it, and how large it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Generator as RandomGenerator

from gradlab.checks import check
from trainers.config import SharingConfig
from trainers.generators.generator import Generator
from trainers.networks import MLP

Factory = Callable[[MLP, int, RandomGenerator, SharingConfig, bool], Generator]
"""Of a network, the number of agents, randomness, settings, and whether `log_std` is per agent."""

Count = Callable[[MLP, int, SharingConfig, bool], int]
"""Number of trained parameters, from the same."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One sharing scheme.

    Attributes:
        factory: Makes its generator.
        count: Number of parameters that the generator trains, without making it.
        own_log_std: Whether each agent has its own `log_std` unless told otherwise.
        ensemble: What makes an ensemble of off-policy critics, if the scheme has one.
    """

    factory: Factory
    count: Count
    own_log_std: bool = False
    ensemble: "Method | None" = None

    def __call__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        config: SharingConfig,
        own_log_std: bool | None = None,
    ) -> Generator:
        """Make a generator with new parameters.

        Args:
            mlp: The network whose parameters it makes.
            agents: Number of agents.
            random: Source of randomness.
            config: Settings of the sharing schemes.
            own_log_std: Whether each agent has its own `log_std`; None: as the method has it.

        Returns:
            The generator.
        """
        own = self.own_log_std if own_log_std is None else own_log_std
        return self.factory(mlp, agents, random, config, own)

    def parameters(
        self,
        mlp: MLP,
        agents: int,
        config: SharingConfig,
        own_log_std: bool | None = None,
    ) -> int:
        """Count what a generator would train.

        Args:
            mlp: As for making one.
            agents: As for making one.
            config: As for making one.
            own_log_std: As for making one.

        Returns:
            The number of trained parameters.
        """
        own = self.own_log_std if own_log_std is None else own_log_std
        return self.count(mlp, agents, config, own)


def matched(mlp: MLP, count: Callable[[MLP], int], target: int) -> MLP:
    """Choose hidden widths for a number of trained parameters.

    Args:
        mlp: A network; all its hidden widths are scaled by one factor and rounded.
        count: Number of trained parameters of a network of this form, which grows with its widths.
        target: The wanted number.

    Returns:
        The network whose number comes nearest; of two that come equally near, the smaller one.

    Raises:
        UsageError: If the network has no hidden layer.
    """
    rule = "name a layer whose width can be chosen, for `network.match`"
    check(len(mlp.sizes) > 2, "network.hidden", rule, mlp.sizes[1:-1])
    first = mlp.sizes[1]

    def of_width(width: int) -> MLP:
        hidden = (max(1, round(size * width / first)) for size in mlp.sizes[1:-1])
        return replace(mlp, sizes=(mlp.sizes[0], *hidden, mlp.sizes[-1]))

    low, high = 1, 2
    while count(of_width(high)) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(of_width(middle)) < target else (low, middle)
    return min(of_width(low), of_width(high), key=lambda sized: abs(count(sized) - target))
