"""One update: passes over a rollout in minibatches."""

from collections.abc import Mapping
from functools import partial

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
from trainers.samples import Weights, exist, of_network, of_samples

ROWS = 4096
"""Samples (of recurrent networks segments) of all agents together that go through at once."""

_OF_LAST_PASS = "mean over agents and samples of the last pass, each before its minibatch's step"


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
        networks: tuple[Generator, Generator],
        losses: tuple[PolicyLoss, Surrogate],
        critic_input: CriticInput,
        optimiser: torch.optim.Optimizer,
        aggregations: Mapping[str, Aggregation] | None = None,
    ) -> None:
        """Train nothing yet.

        Args:
            config: Epochs, minibatches and the like.
            networks: Generators of the policies and of the value functions.
            losses: What they minimise.
            critic_input: What the value functions read of the observations, or world states.
            optimiser: Of the parameters of both.
            aggregations: By network what makes one gradient of its agents'; None: their sum.
        """
        self.findings: list[str] = []
        self._config = config
        self._actor, self._critic = networks
        self._policy_loss, self._value_loss = losses
        self._critic_input = critic_input
        self._optimiser = optimiser
        self._aggregations = aggregations or {}

    def __call__(
        self, samples: Mapping[str, Tensor], random: RandomGenerator
    ) -> dict[str, Quantity]:
        """Train.

        Args:
            samples: Tensors [agent, sample, ...] by name: `observation`, `action`, `log_prob`,
                `value`, `advantage`, `target`, and what `trainers.samples` says.
            random: Shuffles the samples, those of all agents alike.

        Returns:
            `policy_loss` and `value_loss`, means over minibatches; what came of an aggregation; and
            of PPO `approximate_kl` from the policy that collected, as Schulman's estimator k3
            ("Approximating KL divergence", 2020), and `clip_fraction`, the share of samples whose
            ratio is out of the clip range, both of the last pass, and `epochs_done`.

        Raises:
            NotFinite: If a loss or a gradient is not finite. No step was made with it.
        """
        config = self._config
        sums = {"policy_loss": 0.0, "value_loss": 0.0}
        kl, clipped, epochs = 0.0, 0.0, 0
        weights = Weights.of(exist(samples))
        while epochs < config.epochs:
            kl, clipped = 0.0, 0.0
            order = torch.randperm(samples["advantage"].shape[1], generator=random)
            for part in order.tensor_split(config.minibatches):
                policy, value, moved, out = self._step(samples, part, weights.part(part), random)
                sums["policy_loss"] += policy
                sums["value_loss"] += value
                kl += moved / config.minibatches
                clipped += out / config.minibatches
            epochs += 1
            if config.target_kl is not None and kl > config.target_kl:
                break
        steps = epochs * config.minibatches
        found = {
            name: Quantity.scalar(total / steps, "loss", "mean over the minibatches of all passes")
            for name, total in sums.items()
        }
        found |= self._accounts()
        if self._policy_loss.clip is None:
            return found
        return found | {
            "approximate_kl": Quantity.scalar(kl, "nats", f"(r - 1) - log r; {_OF_LAST_PASS}"),
            "clip_fraction": Quantity.scalar(clipped, "1", f"|r - 1| > clip; {_OF_LAST_PASS}"),
            "epochs_done": Quantity.scalar(float(epochs), "passes", "exact"),
        }

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
        part: Tensor,
        weigh: Weights,
        random: RandomGenerator,
    ) -> tuple[float, float, float, float]:
        """Make one step on some of the samples, which weigh so much; an aggregator may draw.

        Returns:
            Both losses; and, of the policy before the step, approximate KL divergence and share of
            clipped samples.
        """
        config = self._config
        agents, places = len(samples["advantage"]), len(part)
        active = samples.get("active")
        advantage = samples["advantage"].index_select(1, part)
        if config.normalises_advantages:
            advantage = normalise(
                advantage, None if active is None else active.index_select(1, part)
            )
        self._optimiser.zero_grad(set_to_none=True)
        actor = self._parameters("actor", self._actor, random)
        critic = self._parameters("critic", self._critic, random)
        found = torch.zeros(4, dtype=torch.float64)
        # Rows enough to multiply fast, few enough that what is kept for the backward pass stays in
        # the processor's cache and in memory that the process has already.
        for chunk in torch.arange(places).split(max(1, ROWS // agents)):
            rows = part[chunk]
            batch = {name: tensor.index_select(1, rows) for name, tensor in samples.items()}
            batch["advantage"] = advantage[:, chunk]
            of_chunk = weigh.part(chunk)
            losses, log_ratio = self._policy_loss.with_log_ratio(
                actor.of(batch["observation"]), of_network(batch, "actor")
            )
            read = self._critic_input(batch[critic_source(batch)])
            theta = critic.of(read)
            if "starts" not in batch:  # memories are each agent's own
                read = read_once(read, theta)
            batch["observation"] = read
            errors = self._value_loss(theta, of_network(batch, "critic"))
            share = len(rows) / places
            policy = share * finite_mean("policy_loss", of_chunk(losses))
            value = share * finite_mean("value_loss", of_chunk(errors))
            torch.autograd.backward([policy, value])
            log_ratio = log_ratio.detach()
            change = log_ratio.expm1()  # r - 1
            out = (change.abs() > (self._policy_loss.clip or torch.inf)).double()
            found += torch.stack([
                policy.detach(),
                value.detach(),
                share * of_chunk(of_samples(change - log_ratio, batch)).mean(),
                share * of_chunk(of_samples(out, batch)).mean(),
            ])
        actor.backward()
        critic.backward()
        check_gradient("actor", self._actor.clip_gradients(config.max_gradient_norm))
        check_gradient("critic", self._critic.clip_gradients(config.max_gradient_norm))
        self._optimiser.step()
        policy_loss, value_loss, moved, clipped = found.tolist()
        return policy_loss, value_loss, moved, clipped


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
