"""What a training measures about its networks, and when."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gradlab.effects import Behaviour, measure_effects
from gradlab.metrics.diversity import shared_observations
from gradlab.probe import Level, Network, Probe
from gradlab.quantity import Quantity
from trainers.config import TrainConfig
from trainers.critic_input import CRITIC_INPUTS
from trainers.generators.generator import Generator
from trainers.policies import Policy
from trainers.ppo import normalise
from trainers.rollout import Rollout

DIAGNOSED_SAMPLES: dict[Level, int] = {"off": 1, "light": 128, "full": 512}
"""Samples of each agent that a diagnosis looks at by default, for each update since the last.

So the share of the training's time does not depend on how often there is one, and seldom ones see
more.
"""

SHARED_OBSERVATIONS = 512
"""Observations on which the agents' behaviour is compared, at most."""

_READ = {
    "actor": ("observation", "action", "action_mask", "log_prob", "advantage"),
    "critic": ("observation", "value", "target"),
}


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
        optimiser: torch.optim.Adam,
    ) -> None:
        """Measure nothing yet.

        Args:
            config: How much to measure, and how often.
            networks: "actor" and "critic"; at level "light" the actor alone is diagnosed.
            policy: Turns the actor's outputs into action distributions.
            optimiser: Trains the networks.
        """
        level = config.diagnostics
        self.probe = Probe(
            {n: network for n, network in networks.items() if level == "full" or n == "actor"},
            level,
        )
        self.findings: list[str] = []
        self._config = config
        self._policy = policy
        self._optimiser = optimiser

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
        batches, copy = self._batches(rollout)
        found = self.probe.diagnose(batches, copy)
        self.findings += self.probe.findings
        if of_effects:
            effects, findings = measure_effects(
                self.probe,
                batches,
                copy,
                behaviour=self._behaviour(update, rollout),
                diagnosed=found,
                optimiser=self._optimiser if config.effects_preconditioned else None,
            )
            found |= effects
            self.findings += findings
        return found

    def _batches(self, rollout: Rollout) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        """What each network is diagnosed on, and the environment copy of each sample."""
        config = self._config
        most = config.diagnosed_samples or DIAGNOSED_SAMPLES[config.diagnostics] * config.every
        steps = spread(config.steps, max(1, most // config.copies))
        samples = rollout.samples | {"advantage": normalise(rollout.samples["advantage"])}
        batches = {
            network: {
                name: samples[name].unflatten(1, (config.steps, -1))[:, steps].flatten(1, 2)
                for name in _READ[network]
                if name in samples
            }
            for network in self.probe.networks
        }
        if "critic" in batches:
            critic_observation = CRITIC_INPUTS[config.algorithm](batches["critic"]["observation"])
            batches["critic"]["observation"] = critic_observation
        return batches, torch.arange(config.copies).repeat(len(steps))

    @torch.no_grad()
    def _behaviour(self, update: int, rollout: Rollout) -> Behaviour:
        """What all agents would do on observations drawn from those of all agents."""
        config = self._config
        # From seed and update alone, so that a resumed training draws the same.
        random = torch.Generator().manual_seed((config.seed << 32) + update)
        observation, copy = shared_observations(
            rollout.samples["observation"],
            SHARED_OBSERVATIONS,
            random,
            copy=torch.arange(config.copies).repeat(config.steps),
        )
        actor = self.probe.precise("actor")
        assert isinstance(actor, Generator)
        shared = observation.double().expand(actor.agents, *observation.shape)
        return Behaviour(
            policies=self._policy.distribution(actor.policy_for(shared), shared), copy=copy
        )


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
