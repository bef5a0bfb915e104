"""What a training measures about its networks, and when."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gradlab.effects import Behaviour, measure_effects
from gradlab.estimates import FEWEST
from gradlab.metrics.diversity import shared_observations
from gradlab.probe import Level, Network, NetworkProbe
from gradlab.quantity import Quantity
from trainers.config import TrainConfig
from trainers.critic_input import CriticInput, critic_source
from trainers.generators.generator import Generator
from trainers.policies import Policy
from trainers.ppo import normalised
from trainers.processes import Share
from trainers.rollout import Rollout
from trainers.samples import READ, exist, of_network

DIAGNOSED_SAMPLES: dict[Level, int] = {"off": 1, "light": 128, "full": 512}
"""Samples of each agent that a diagnosis looks at by default, for each update since the last.

So the share of the training's time does not depend on how often there is one, and seldom ones see
more.
"""

SHARED_OBSERVATIONS = 512
"""Observations on which the agents' behaviour is compared, at most."""


class Diagnosis:
    """Measures what is due at an update; the training's randomness stays as it is.

    Attributes:
        probe: Diagnoses the networks.
        findings: What is wrong with what the last update measured, a sentence each.
    """

    def __init__(
        self,
        config: TrainConfig,
        networks: Mapping[str, Network],
        policy: Policy,
        critic_input: CriticInput,
        optimiser: torch.optim.Adam,
        share: Share,
    ) -> None:
        """Measure nothing yet.

        Args:
            config: How much to measure, and how often.
            networks: "actor" and "critic"; at level "light" the actor alone is diagnosed.
            policy: Turns the actor's outputs into action distributions.
            critic_input: What the value functions read of the observations, or world states.
            optimiser: Trains the networks.
            share: Of which copies this process has rollouts. All processes measure together, on the
                samples of all copies.
        """
        level = config.diagnostics
        self.probe = NetworkProbe(
            {n: network for n, network in networks.items() if level == "full" or n == "actor"},
            level,
            share.group,
        )
        self.findings: list[str] = []
        self._config = config
        self._policy = policy
        self._critic_input = critic_input
        self._optimiser = optimiser
        self._share = share

    def of(self, update: int, rollout: Rollout) -> dict[str, Quantity]:
        """Measure what is due at an update.

        Args:
            update: The update's number, from 0.
            rollout: What it is about to train on.

        Returns:
            Quantities by name; none if nothing is due.
        """
        config, self.findings = self._config, []
        of_effects = (
            config.diagnostics == "full" and update > 0 and update % config.effects_period == 0
        )
        if config.diagnostics == "off" or not (of_effects or update % config.every == 0):
            return {}
        batches, copy, mask = self._batches(rollout)
        context = self._context()
        found = self.probe.diagnose(batches, copy, mask, context)
        self.findings += self.probe.findings
        if of_effects:
            effects, findings = measure_effects(
                self.probe,
                batches,
                copy,
                mask=mask,
                context=context,
                behaviour=self._behaviour(update, rollout),
                diagnosed=found,
                optimiser=self._optimiser if config.effects_preconditioned else None,
            )
            found |= effects
            self.findings += findings
        return found

    def _batches(
        self, rollout: Rollout
    ) -> tuple[dict[str, dict[str, Tensor]], Tensor, Tensor | None]:
        """What each network is diagnosed on, each sample's copy, and which samples there are."""
        config = self._config
        most = config.diagnosed_samples or DIAGNOSED_SAMPLES[config.diagnostics] * config.every
        samples, share = dict(rollout.samples), self._share
        if config.on_policy.normalises_advantages:
            samples["advantage"] = normalised(samples["advantage"], samples.get("active"), share)
        if config.recurrent_size is not None:
            copies = spread(config.copies, max(FEWEST, most // config.steps))
            samples = {name: share.whole(tensor)[:, copies] for name, tensor in samples.items()}
            copy, mask = copies, exist(samples)
        else:
            steps = spread(config.steps, max(1, most // config.copies))
            samples = {
                name: share.whole(tensor.unflatten(1, (config.steps, -1))[:, steps].flatten(1, 2))
                for name, tensor in samples.items()
            }
            copy, mask = torch.arange(config.copies).repeat(len(steps)), samples.pop("active", None)
        batches = {
            network: {
                name: tensor
                for name, tensor in of_network(samples, network).items()
                if name in (*READ[network], "memory", "starts", "active")
            }
            for network in self.probe.networks
        }
        if "critic" in batches:
            of_critic = batches["critic"]
            read = self._critic_input(of_critic[critic_source(of_critic)])
            of_critic.pop("world_state", None)
            of_critic["observation"] = read
        return batches, copy, mask

    def _context(self) -> dict[str, dict[str, Tensor]] | None:
        """What all of an agent's samples hold as well, of each network."""
        return None

    @torch.no_grad()
    def _behaviour(self, update: int, rollout: Rollout) -> Behaviour:
        """What all agents would do on observations drawn from those of all agents."""
        config = self._config
        # From seed and update alone, so that a resumed training draws the same.
        random = torch.Generator().manual_seed((config.seed << 32) + update)
        draw = self._observations if config.recurrent_size is None else self._segments
        read = ("observation", "starts", "active")
        samples = {n: self._share.whole(t) for n, t in rollout.samples.items() if n in read}
        shared, copy, acted = draw(samples, random)
        actor = self.probe.precise("actor")
        assert isinstance(actor, Generator)
        shared = {name: t.expand(actor.agents, *t.shape) for name, t in shared.items()}
        theta = actor.policy_for(shared["observation"])
        policies = self._policy.distribution(theta, self._policy.network.read(theta, shared))
        if acted is not None:
            policies = {name: t.flatten(1, 2)[:, acted] for name, t in policies.items()}
        return Behaviour(policies=policies, copy=copy)

    def _observations(
        self, samples: Mapping[str, Tensor], random: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor, None]:
        """Draw observations, and their copies."""
        observation, copy = shared_observations(
            samples["observation"],
            SHARED_OBSERVATIONS,
            random,
            copy=torch.arange(self._config.copies).repeat(self._config.steps),
            mask=samples.get("active"),
        )
        return {"observation": observation.double()}, copy, None

    def _segments(
        self, samples: Mapping[str, Tensor], random: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Draw segments, followed from an empty memory; the copies of the steps acted in; which.

        What one agent's memory holds before a segment means nothing to another's.
        """
        config = self._config
        observation = samples["observation"]
        active = samples.get("active", torch.ones_like(samples["starts"]))
        whole = torch.cat([observation, active[..., None].to(observation.dtype)], dim=-1)
        drawn, copy = shared_observations(
            whole.flatten(2),
            max(1, SHARED_OBSERVATIONS // config.steps),
            random,
            copy=torch.arange(config.copies),
            mask=exist(samples),
        )
        drawn = drawn.unflatten(1, (config.steps, -1)).double()
        acted = (drawn[..., -1] > 0).flatten()
        size = config.recurrent_size
        assert size is not None
        shared = {
            "observation": drawn[..., :-1],
            "starts": samples["starts"][0, copy],
            "memory": drawn.new_zeros(len(drawn), size),
        }
        return shared, copy.repeat_interleave(config.steps)[acted], acted


def spread(total: int, most: int) -> Tensor:
    """Choose time steps as evenly as can be.

    Args:
        total: Number of steps.
        most: How many to choose at most.

    Returns:
        Numbers of the chosen steps, ascending.
    """
    chosen = min(total, most)
    return torch.arange(chosen) * total // chosen
