"""One update: passes over a rollout in minibatches."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from gradlab.quantity import Quantity, join
from trainers.aggregation import Aggregation
from trainers.config import A2CConfig, PPOConfig
from trainers.critic_input import CriticInput, critic_source, read_once
from trainers.finite import check_gradient, finite_mean
from trainers.generators.generator import Generator
from trainers.parameters import AgentParameters, Parameters
from trainers.ppo import PolicyLoss, Surrogate, normalise
from trainers.processes import Share
from trainers.samples import READ, Weights, exist, of_network, of_samples

ROWS = 4096
"""Samples (of recurrent networks segments) of all agents together that go through at once."""

_OF_LAST_PASS = "mean over agents and samples of the last pass, each before its minibatch's step"
_NUMBERS = {
    "policy_loss": ("loss", "mean over the minibatches of all passes"),
    "value_loss": ("loss", "mean over the minibatches of all passes"),
    "approximate_kl": ("nats", f"(r - 1) - log r; {_OF_LAST_PASS}"),
    "clip_fraction": ("1", f"|r - 1| > clip; {_OF_LAST_PASS}"),
    "epochs_done": ("passes", "mean over agents, if they are updated apart; else exact"),
}
_LOSSES = ("policy_loss", "value_loss")
_OF_ALL = ("advantage", "active", "starts")
"""Samples of which every process has those of all copies, to scale and weigh minibatches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part(ABC):
    """A network that is trained.

    Attributes:
        generator: Makes its parameters.
        first: Number of the first agent that it makes them for.
        network: "actor" or "critic".
        loss_name: What its loss is called.
    """

    generator: Generator
    first: int = 0
    network: ClassVar[str]
    loss_name: ClassVar[str]

    @property
    def reads(self) -> frozenset[str]:
        """Names of the samples that it reads."""
        return frozenset((*READ[self.network], "starts", "active", f"{self.network}_memory"))

    @abstractmethod
    def losses(
        self, parameters: Parameters, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each sample's loss, and what is told beside it.

        Args:
            parameters: What the generator makes.
            batch: Samples [agent, sample, ...] by name.

        Returns:
            The losses, and numbers of each sample by name, without a gradient.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Actor(Part):
    """Policies.

    Attributes:
        loss: What they minimise.
    """

    loss: PolicyLoss
    network: ClassVar[str] = "actor"
    loss_name: ClassVar[str] = "policy_loss"

    def losses(
        self, parameters: Parameters, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Part.losses`; with a clip range how far the policies have moved."""
        losses, log_ratio = self.loss.with_log_ratio(
            parameters.of(batch["observation"]), of_network(batch, "actor")
        )
        if self.loss.clip is None:
            return losses, {}
        log_ratio = log_ratio.detach()
        change = log_ratio.expm1()  # r - 1
        out = (change.abs() > self.loss.clip).double()
        return losses, {
            "approximate_kl": of_samples(change - log_ratio, batch),
            "clip_fraction": of_samples(out, batch),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Critic(Part):
    """Value functions.

    Attributes:
        loss: What they minimise.
        input: What they read of the observations, or world states.
    """

    loss: Surrogate
    input: CriticInput
    network: ClassVar[str] = "critic"
    loss_name: ClassVar[str] = "value_loss"

    def losses(
        self, parameters: Parameters, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Part.losses`."""
        read = self.input(batch[critic_source(batch)])
        theta = parameters.of(read)
        if "starts" not in batch:  # memories are each agent's own
            read = read_once(read, theta)
        return self.loss(theta, of_network({**batch, "observation": read}, "critic")), {}


class Updater:
    """Trains actor and critic on what was collected (Schulman et al., 2017, algorithm 1).

    Of A2C (Mnih et al., 2016) with one step on all of it. Advantages are normalised over each
    minibatch, if so configured; actor and critic are clipped apart. Every agent's mean over its own
    samples counts alike (`Weights`).

    Attributes:
        findings: What went wrong with the aggregation in the last update, a sentence each.
    """

    def __init__(
        self,
        config: PPOConfig | A2CConfig,
        parts: Sequence[Part],
        optimiser: torch.optim.Optimizer,
        share: Share,
        aggregations: Mapping[str, Aggregation] | None = None,
        *,
        normalises: bool = False,
    ) -> None:
        """Train nothing yet.

        Args:
            config: Epochs, minibatches and the like.
            parts: What is trained, step by step together.
            optimiser: Of the parameters of all of it.
            share: Of which copies this process has the samples. All processes make the same steps,
                on the samples of all copies.
            aggregations: By network what makes one gradient of its agents'; None: their sum.
            normalises: Whether advantages are normalised over each minibatch.
        """
        self.findings: list[str] = []
        self._config = config
        self._parts = parts
        self._optimiser = optimiser
        self._share = share
        self._aggregations = aggregations or {}
        self._normalises = normalises
        self._reads = frozenset().union(*(part.reads for part in parts))

    def __call__(
        self, samples: Mapping[str, Tensor], random: RandomGenerator
    ) -> dict[str, Quantity]:
        """Train.

        Args:
            samples: As for `passes`.
            random: Shuffles the samples, those of all agents alike.

        Returns:
            What `passes` does, and what came of an aggregation.

        Raises:
            NotFinite: If a loss or a gradient is not finite. No step was made with it.
        """
        return recorded(self.passes(samples, random)) | self._accounts()

    def passes(self, samples: Mapping[str, Tensor], random: RandomGenerator) -> dict[str, float]:
        """Train.

        Args:
            samples: Tensors [agent, sample, ...] by name: `observation`, `action`, `log_prob`,
                `value`, `advantage`, `target`, and what `trainers.samples` says; those that the
                parts read.
            random: Shuffles the samples, those of all agents alike.

        Returns:
            `policy_loss` and `value_loss`, means over minibatches; and of PPO `approximate_kl` from
            the policy that collected, as Schulman's estimator k3 ("Approximating KL divergence",
            2020), and `clip_fraction`, the share of samples whose ratio is out of the clip range,
            both of the last pass, and `epochs_done`.

        Raises:
            NotFinite: If a loss or a gradient is not finite. No step was made with it.
        """
        config = self._config
        samples = {name: tensor for name, tensor in samples.items() if name in self._reads}
        of_all = {n: self._share.whole(samples[n]) for n in _OF_ALL if n in samples}
        weights = Weights.of(exist(of_all))
        places = self._share.count(samples["observation"].shape[1])
        sums: dict[str, float] = {}
        last: dict[str, float] = {}
        epochs = 0
        while epochs < config.epochs:
            last = {}
            order = torch.randperm(places, generator=random)
            for part in order.tensor_split(config.minibatches):
                found = self._step(samples, of_all, part, weights.part(part), random)
                for name, value in found.items():
                    of = sums if name in _LOSSES else last
                    of[name] = of.get(name, 0.0) + value
            last = {name: value / config.minibatches for name, value in last.items()}
            epochs += 1
            if config.target_kl is not None and last.get("approximate_kl", 0.0) > config.target_kl:
                break
        steps = epochs * config.minibatches
        numbers = {name: value / steps for name, value in sums.items()} | last
        return numbers | ({"epochs_done": float(epochs)} if last else {})

    def _accounts(self) -> dict[str, Quantity]:
        """What came of the aggregations, by network."""
        accounts = {name: of.account() for name, of in self._aggregations.items()}
        self.findings = [f"{name}: {said}" for name, (_, said) in accounts.items() if said]
        return join({name: found for name, (found, _) in accounts.items()}, "network", "")

    def _parameters(
        self, network: str, generator: Generator, random: RandomGenerator
    ) -> Parameters:
        aggregation = self._aggregations.get(network)
        if aggregation is None:
            return Parameters(generator)
        return AgentParameters(generator, partial(aggregation, random=random))

    def _step(
        self,
        samples: Mapping[str, Tensor],
        of_all: Mapping[str, Tensor],
        part: Tensor,
        weigh: Weights,
        random: RandomGenerator,
    ) -> dict[str, float]:
        """Make one step on some samples of all copies, which weigh so much; an aggregator may draw.

        Returns:
            Losses, and what is told beside them, before the step.
        """
        agents, places = len(samples["observation"]), len(part)
        own, numbers = self._share.places(part)
        counts = len(own) > 0
        if not counts:  # what is added up is then made of a sample that counts for nothing
            own = numbers = torch.zeros(1, dtype=torch.int64)
        samples = dict(samples)
        if self._normalises:
            active = of_all.get("active")
            advantage = normalise(
                of_all["advantage"].index_select(1, part),
                None if active is None else active.index_select(1, part),
            )
            del samples["advantage"]
        self._optimiser.zero_grad(set_to_none=True)
        trained = [(of, self._parameters(of.network, of.generator, random)) for of in self._parts]
        found: dict[str, float] = {}
        # Rows enough to multiply fast, few enough that what is kept for the backward pass stays in
        # the processor's cache and in memory that the process has already.
        most = max(1, ROWS // agents)
        for chunk, rows in zip(own.split(most), numbers.split(most), strict=True):
            batch = {name: tensor.index_select(1, rows) for name, tensor in samples.items()}
            if self._normalises:
                batch["advantage"] = advantage[:, chunk]
            of_chunk = weigh.part(chunk)
            share = counts * len(rows) / places
            means: dict[str, Tensor] = {}
            told: dict[str, Tensor] = {}
            for of, parameters in trained:
                losses, beside = of.losses(parameters, batch)
                means[of.loss_name] = share * finite_mean(of.loss_name, of_chunk(losses), of.first)
                told |= beside
            torch.autograd.backward([*means.values()])
            means |= {name: share * of_chunk(values).mean() for name, values in told.items()}
            for name, value in means.items():
                found[name] = found.get(name, 0.0) + value.item()
        numbers = torch.tensor([*found.values()], dtype=torch.float64)
        to_add = [tensor for _, parameters in trained for tensor in parameters.backward()]
        self._share.group.sum_([*to_add, numbers])
        found = dict(zip(found, numbers.tolist(), strict=True))
        for of, parameters in trained:
            parameters.settle()
            of.generator.regularise(found[of.loss_name])
            norm = of.generator.clip_gradients(self._config.max_gradient_norm)
            check_gradient(of.network, norm, of.first)
        self._optimiser.step()
        return found


def recorded(numbers: Mapping[str, float]) -> dict[str, Quantity]:
    """Say what the numbers of passes are.

    Args:
        numbers: As `Updater.passes` returns them.

    Returns:
        Quantities by name.
    """
    return {name: Quantity.scalar(value, *_NUMBERS[name]) for name, value in numbers.items()}


def check_minibatches(
    minibatches: int, samples: int, agents: int, *, recurrent: bool = False
) -> None:
    """Raise unless every minibatch has samples enough.

    Args:
        minibatches: Parts that a rollout is cut into.
        samples: Its samples of each agent.
        agents: Number of agents.
        recurrent: Whether samples are segments of several steps.

    Raises:
        UsageError: If a minibatch would have no sample, or one in all, over which advantages can't
            be normalised.
    """
    most = max(1, samples if agents > 1 or recurrent else samples // 2)
    how = "a segment of each copy" if recurrent else "copies * steps"
    rule = f"be at most {most}: a rollout has {samples} samples of each agent ({how})"
    check(minibatches <= most, "ppo.minibatches", rule, minibatches)
