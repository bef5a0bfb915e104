"""Whole episodes under policies that are held fixed, and what they come to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.estimates import LEVEL
from gradlab.quantity import Quantity
from trainers.acting import act
from trainers.envs.vector_env import VectorEnv
from trainers.finite import check_finite
from trainers.networks import Theta
from trainers.policies import Policy

Watch = Callable[[VectorEnv], None]
"""Shown the environment at the start and after each step while the first copy's episode lasts."""


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What some whole, independent episodes brought.

    Attributes:
        returns: Undiscounted sum of each agent's rewards.
        lengths: Steps of each episode.
        metrics: What the environment measured itself, by name, each summed over the episode's
            steps; NaN for an agent that a measure is not of.
        outcomes: Whether each episode came to what the environment names (`Step.outcomes`).
    """

    returns: Float[Tensor, "agent episode"]
    lengths: Int[Tensor, " episode"]
    metrics: Mapping[str, Float[Tensor, "agent episode"]]
    outcomes: Mapping[str, Bool[Tensor, " episode"]]

    def quantities(self) -> dict[str, Quantity]:
        """Label means over the episodes, as a run records them.

        Returns:
            `evaluation_return`, of the mean over agents, and `evaluation_agent_return` [agent],
            both with the ends `..._low` and `..._high` of their 95 % intervals, which are those
            of Student's t over the episodes (NaN with a single one); `evaluation_length` in steps;
            `evaluation_metric` [metric, agent], if anything was measured; `evaluation_outcome_rate`
            [outcome], if the environment names outcomes, with the ends of its Wilson interval.
        """
        episodes = len(self.lengths)
        of_mean = f"mean over {episodes} whole episodes"
        agents = {"agent": range(len(self.returns))}
        interval = f"95 % interval: Student's t over {episodes} episodes"

        def labelled(
            values: Tensor, coords: Mapping[str, Any], unit: str, estimator: str
        ) -> Quantity:
            return Quantity(
                values=values.numpy(),
                dims=tuple(coords),
                coords={axis: list(labels) for axis, labels in coords.items()},
                unit=unit,
                estimator=estimator,
            )

        found: dict[str, Quantity] = {}
        parts: list[tuple[str, Tensor, dict[str, Any], str]] = [
            ("evaluation_return", self.returns.mean(0), {}, f"{of_mean} and over agents"),
            ("evaluation_agent_return", self.returns, agents, of_mean),
        ]
        for name, values, coords, estimator in parts:
            mean, low, high = mean_interval(values)
            found[name] = labelled(mean, coords, "reward", f"{estimator}; undiscounted")
            found[f"{name}_low"] = labelled(low, coords, "reward", interval)
            found[f"{name}_high"] = labelled(high, coords, "reward", interval)
        found["evaluation_length"] = Quantity.scalar(
            self.lengths.double().mean().item(), "steps", of_mean
        )
        if self.metrics:
            found["evaluation_metric"] = labelled(
                torch.stack(list(self.metrics.values())).mean(-1),
                {"metric": self.metrics, **agents},
                "sum over steps",
                f"{of_mean} of the sum over the episode's steps",
            )
        if self.outcomes:
            rates = [rate_interval(happened) for happened in self.outcomes.values()]
            wilson = f"95 % interval: Wilson's over {episodes} episodes"
            for end, values, estimator in zip(
                ("", "_low", "_high"),
                torch.tensor(rates, dtype=torch.float64).mT,
                (of_mean, wilson, wilson),
                strict=True,
            ):
                found[f"evaluation_outcome_rate{end}"] = labelled(
                    values, {"outcome": self.outcomes}, "1", estimator
                )
        return found


def mean_interval(
    values: Float[Tensor, "*rest episode"],
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """Estimate means and their intervals by Student's t, episodes being independent.

    Args:
        values: A number of each episode.

    Returns:
        Means and the lower and upper ends of their 95 % intervals, NaN with one episode.
    """
    episodes = values.shape[-1]
    mean = values.mean(-1)
    if episodes == 1:
        return mean, mean * torch.nan, mean * torch.nan
    error = values.std(-1) / episodes**0.5
    half = error * float(stats.t.ppf((1 + LEVEL) / 2, episodes - 1))
    return mean, mean - half, mean + half


def rate_interval(happened: Bool[Tensor, " episode"]) -> tuple[float, float, float]:
    """Estimate how often something happens, and the interval of that, episodes being independent.

    Args:
        happened: Whether it did, in each of at least one episode.

    Returns:
        The share, and the lower and upper ends of its 95 % interval by Wilson ("Probable
        inference", 1927), which is not empty where all or none did.
    """
    test = stats.binomtest(int(happened.sum()), len(happened))
    low, high = test.proportion_ci(LEVEL, method="wilson")
    return float(test.statistic), float(low), float(high)


@torch.no_grad()
def play_episodes(
    env: VectorEnv,
    policy: Policy,
    theta: Callable[[Tensor], Theta],
    *,
    scaled: Callable[[Tensor, Tensor], Tensor] = lambda observation, _: observation,
    random: RandomGenerator | None = None,
    watch: Watch = lambda _: None,
) -> Episodes:
    """Play the first episode of every copy to its end.

    A copy that has finished waits until all have: what it does meanwhile counts for nothing, so
    short episodes count no more than long ones. An agent that has left its episode earns nothing.

    Args:
        env: A new environment, whose every episode ends some day. One copy for each episode.
        policy: The policies' form.
        theta: Their parameters, given what they see.
        scaled: What the policies read of an observation, and of which agents act on it.
        random: Draws the actions; None for each policy's mode.
        watch: Shown the first copy's episode; the state in which it ends is gone by then, since
            finished copies reset themselves.

    Returns:
        An episode of each copy, in the copies' order.

    Raises:
        NotFinite: If an observation or a reward is not finite.
    """
    playing = torch.ones(env.copies, dtype=torch.bool)
    returns = torch.zeros(env.spec.agents, env.copies, dtype=torch.float64)
    lengths = torch.zeros(env.copies, dtype=torch.int64)
    metrics: dict[str, Tensor] = {}
    outcomes = {name: torch.zeros_like(playing) for name in env.spec.outcomes}
    observation = env.reset()
    active = torch.ones(env.spec.agents, env.copies, dtype=torch.bool)
    memory = policy.network.begin(env.spec.agents, env.copies)
    while True:
        if playing[0]:
            watch(env)
        check_finite("observation in the evaluation", observation, ("agent", "copy"))
        action, _, memory = act(
            policy, theta, scaled(observation, active), env.action_mask(), random, memory
        )
        step = env.step(policy.to_env(action)).of_active(active)
        check_finite("reward in the evaluation", step.reward, ("agent", "copy"))
        returns += torch.where(playing, step.reward, 0)
        lengths += playing
        for name, value in step.info.items():
            so_far = metrics.setdefault(name, torch.zeros_like(returns))
            so_far += torch.where(playing, value, 0)
        for name, happened in outcomes.items():
            happened |= playing & step.ended & step.outcomes[name]
        playing &= ~step.ended
        if not playing.any():
            return Episodes(returns=returns, lengths=lengths, metrics=metrics, outcomes=outcomes)
        observation, active = step.observation, step.act_next
        # A memory is not emptied where an episode ends: what follows counts for nothing.
