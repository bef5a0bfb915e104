"""HAPPO: PPO's updates one agent after the other, each weighed by what the others have changed."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from gradlab.quantity import Quantity
from trainers.config import NONE, TrainConfig
from trainers.envs.vector_env import VectorEnv
from trainers.generators.independent import AgentSlice, NoPS
from trainers.on_policy import OnPolicy, adam
from trainers.ppo import normalised
from trainers.samples import of_network
from trainers.update import ROWS, Updater, recorded


class HAPPO(OnPolicy):
    r"""HAPPO (Kuba et al., "Trust region policy optimisation in multi-agent RL", 2022).

    Every agent has a policy of its own, and all learn from the advantages :math:`A` of the team. In
    each update agents :math:`i_1, i_2, \dots` take their passes in random order, on

    .. math:: M_{i_m} A, \qquad
              M_{i_m} = \prod_{l < m} \frac{\pi^{new}_{i_l}(a_{i_l} | o_{i_l})}
                                         {\pi^{old}_{i_l}(a_{i_l} | o_{i_l})}

    of each step and copy, the compounding ratio; then the critics take theirs (algorithm 4).
    """

    def __init__(self, config: TrainConfig, env: VectorEnv, random: RandomGenerator) -> None:
        """Draw networks, and start every copy of the environment.

        Args:
            config: All settings.
            env: The environment.
            random: Source of the networks' first parameters.

        Raises:
            UsageError: If settings don't go together, or not with the environment.
        """
        _check(config)
        super().__init__(config, env, random)

    def prepare(self) -> None:
        """See `OnPolicy.prepare`: a step moves one agent's policy, or the critics."""
        settings, policies = self._config.on_policy, self.actor.generator
        assert isinstance(policies, NoPS)
        own = [AgentSlice(policies, agent) for agent in range(policies.agents)]
        self.optimiser = adam(
            [p for part in (*own, self.critic.generator) for p in part.parameters()], settings
        )
        # Parameters without a gradient, of the other agents, are left as they are by the optimiser.
        self._of_agent = [
            Updater(
                settings,
                [replace(self.actor, generator=of, first=agent)],
                self.optimiser,
                self.collector.share,
            )
            for agent, of in enumerate(own)
        ]
        self.updater = Updater(settings, [self.critic], self.optimiser, self.collector.share)

    def update(self, samples: Mapping[str, Tensor], random: RandomGenerator) -> dict[str, Quantity]:
        """See `Learner.update`; the order of the agents is drawn anew."""
        self.findings = []
        active = samples.get("active")
        share = self.collector.share
        advantage = normalised(samples["advantage"], active, share)
        agents = len(advantage)
        compounded = torch.ones_like(advantage[0])
        found: list[dict[str, float]] = []
        strayed = torch.zeros(agents, dtype=torch.float64)
        for agent in torch.randperm(agents, generator=random).tolist():
            own = {name: tensor[agent : agent + 1] for name, tensor in samples.items()}
            own["advantage"] = compounded * advantage[agent : agent + 1]
            found.append(self._of_agent[agent].passes(own, random))
            off = (compounded - 1).abs().double()
            off = off if active is None else off[active[agent]]
            apart = torch.stack([off.sum(), torch.tensor(float(off.numel()), dtype=off.dtype)])
            share.group.sum_([apart])
            strayed[agent] = apart[0] / apart[1]
            compounded = compounded * self.moved(agent, own)
        numbers = {name: fmean(of[name] for of in found) for name in found[0]}
        return recorded(numbers | self.updater.passes(samples, random)) | {
            "compounding": Quantity(
                values=strayed.numpy(),
                dims=("agent",),
                coords={"agent": range(agents)},
                unit="1",
                estimator="mean of |M - 1| over the agent's steps, M the compounding ratio that "
                "weighed its advantages",
            )
        }

    @torch.no_grad()
    def moved(self, agent: int, own: Mapping[str, Tensor]) -> Tensor:
        """How much likelier each action is now than when it was drawn.

        Args:
            agent: Whose actions.
            own: Its samples [1, sample, ...] by name.

        Returns:
            The ratios [sample], of a recurrent network [segment, time]; 1 where it did not act.
        """
        policy = self.actor.generator(torch.tensor([agent]))
        own = {name: own[name] for name in self.actor.reads if name in own}
        log_ratios = [
            self.policy_loss.with_log_ratio(
                policy, of_network(dict(zip(own, part, strict=True)), "actor")
            )[1]
            for part in zip(*(tensor.split(ROWS, 1) for tensor in own.values()), strict=True)
        ]
        ratio = torch.cat(log_ratios, 1)[0].exp()
        return torch.where(own["active"][0], ratio, 1.0) if "active" in own else ratio


def _check(config: TrainConfig) -> None:
    """Raise unless HAPPO can be trained with such settings."""
    on = "with --algorithm happo"
    method = config.methods["actor"]
    name = "method" if config.actor_method is None else "actor_method"
    check(method == "nops", name, f"be nops {on}: agents are updated one by one", method)
    check(
        config.network.log_std != "shared",
        "network.log_std",
        f"be default or agent {on}: agents are updated one by one",
        config.network.log_std,
    )
    check(
        config.reward == "team",
        "reward",
        f"be team {on}: agents weigh the advantages of all",
        config.reward,
    )
    check(config.aggregate == NONE, "aggregate", f"be none {on}", config.aggregate)
    check(
        not config.effects_preconditioned,
        "effects_preconditioned",
        f"be false {on}, whose agents step apart",
        config.effects_preconditioned,
    )
