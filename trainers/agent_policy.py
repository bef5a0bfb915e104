"""One agent's policy out of a run, as an ordinary module."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from gradlab.checks import UsageError, check
from gradlab.run import Run, open_run
from trainers.evaluation import saved_trainer
from trainers.loop import Trainer
from trainers.memory import ENCODER, GRU, Memory
from trainers.normalisers import ObservationNormaliser
from trainers.policies import Gaussian, Squashed

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class AgentPolicy(nn.Module):
    """One agent's feed-forward policy with its own weights, made of torch's layers alone.

    Attributes:
        layers: Linear layers and activations, or a sum of such.
        continuous: Whether actions are continuous.
        observation_size: Length of an observation.
    """

    allowed: Tensor
    observation_mean: Tensor
    observation_deviation: Tensor
    action_middle: Tensor
    action_half_range: Tensor

    def __init__(self, trainer: Trainer, agent: int) -> None:
        """Copy an agent's weights.

        Args:
            trainer: Holds the networks.
            agent: Which agent.
        """
        super().__init__()
        mlp, policy = trainer.actor.mlp, trainer.policy
        theta = _theta(trainer, agent)
        paths: list[nn.Sequential] = []
        for path in mlp.paths:
            parts: list[nn.Module] = []
            for name in path:
                outputs, inputs = mlp.layers[name]
                parts += [_linear(theta, name, inputs, outputs), _ACTIVATIONS[mlp.activation]()]
            paths.append(nn.Sequential(*parts[:-1]))
        self.layers = paths[0] if len(paths) == 1 else _Sum(paths)
        self.continuous = isinstance(policy, Gaussian)
        self._squashed = isinstance(policy, Squashed)
        self.observation_size = trainer.spec.observation_size
        outputs = mlp.sizes[-1]
        allowed = torch.ones(outputs, dtype=torch.bool)
        self.register_buffer(
            "allowed", allowed if policy.action_mask is None else policy.action_mask[agent].clone()
        )
        scale = trainer.collector.normalisers.get("observation")
        self._clip: float | None = None
        if isinstance(scale, ObservationNormaliser):
            self.register_buffer("observation_mean", scale.moments.mean.clone())
            self.register_buffer("observation_deviation", scale.moments.deviation().clone())
            self._clip = scale.clip
        if isinstance(policy, Gaussian):
            low, high = (
                bound if bound.dim() == 1 else bound[agent]
                for bound in (policy.box.low, policy.box.high)
            )
            self.log_std = nn.Parameter(
                torch.full((outputs,), math.log(policy.noise))
                if isinstance(policy, Squashed) and policy.noise is not None
                else theta["log_std"]
            )
            self.register_buffer("action_middle", (high + low) / 2)
            self.register_buffer("action_half_range", (high - low) / 2)

    # Annotations with shapes would look at sizes while an exporter follows them as symbols.
    def forward(self, observation: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Say how the agent acts.

        Args:
            observation: What it sees, as the environment gives it [*batch, obs].

        Returns:
            [*batch, action]: logits of numbered actions, minus infinity for those that the agent
            does not have; or mean and standard deviation of continuous ones, in the environment's
            units, before they are clipped to their range; 0 for components that it does not have.
        """
        return self._acts(self.layers(self._scaled(observation)))

    def _scaled(self, observation: Tensor) -> Tensor:
        if self._clip is None:
            return observation
        scaled = (observation - self.observation_mean) / self.observation_deviation
        return scaled.clamp(-self._clip, self._clip).to(observation.dtype)

    def _acts(self, made: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.continuous:
            return made.masked_fill(~self.allowed, -torch.inf)
        made = made.tanh() if self._squashed else made
        mean = self.action_middle + self.action_half_range * made
        std = (self.action_half_range * self.log_std.exp()).expand_as(mean)
        return mean.masked_fill(~self.allowed, 0.0), std.masked_fill(~self.allowed, 0.0)

    def example(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Make inputs of the right form, to trace or export with.

        Args:
            batch: How many observations.

        Returns:
            What `forward` takes, all zeros.
        """
        return (torch.zeros(batch, self.observation_size),)


class RecurrentAgentPolicy(AgentPolicy):
    """One agent's recurrent policy, step by step: what it remembers goes in and comes out.

    Attributes:
        encoder: What comes before the memory.
        memory: The gated recurrent unit.
    """

    def __init__(self, trainer: Trainer, agent: int, memory: Memory) -> None:
        """Copy an agent's weights.

        Args:
            trainer: Holds the networks.
            agent: Which agent.
            memory: The networks' memory.
        """
        super().__init__(trainer, agent)
        theta = _theta(trainer, agent)
        self.encoder = _linear(theta, ENCODER, memory.inputs, memory.size)
        self.memory = nn.utils.skip_init(nn.GRUCell, memory.size, memory.size)
        self.memory.load_state_dict({
            name: theta[f"{GRU}.{name}"] for name in self.memory.state_dict()
        })

    def forward(  # type: ignore[override]
        self, observation: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        """Say how the agent acts, one step on.

        Args:
            observation: What it sees, as the environment gives it [batch, obs].
            state: What it remembers [batch, size]: zeros when an episode begins, then what the step
                before returned.

        Returns:
            As of a feed-forward policy, and at the end what it remembers then [batch, size].
        """
        state = self.memory(self.encoder(self._scaled(observation)).relu(), state)
        acts = self._acts(self.layers(state))
        return (*acts, state) if isinstance(acts, tuple) else (acts, state)

    def example(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Make inputs of the right form; see `AgentPolicy.example`."""
        return (*super().example(batch), torch.zeros(batch, self.memory.hidden_size))


class _Sum(nn.Module):
    """Adds what several modules make of the same."""

    def __init__(self, terms: list[nn.Sequential]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([term(x) for term in self.terms]).sum(0)


def _theta(trainer: Trainer, agent: int) -> dict[str, Tensor]:
    """One agent's parameters by name."""
    with torch.no_grad():
        every = trainer.actor.all_agents()
    return {name: t[agent if len(t) > 1 else 0].clone() for name, t in every.items()}


def _linear(theta: dict[str, Tensor], name: str, inputs: int, outputs: int) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # draws no random numbers
    layer.load_state_dict({kind: theta[f"{name}.{kind}"] for kind in ("weight", "bias")})
    return layer


def load_policy(run: Run | Path | str, *, agent: int, update: int | None = None) -> AgentPolicy:
    """Load one agent's policy from a run's checkpoint.

    Args:
        run: A run that gradlab trained, or its folder.
        agent: Which agent.
        update: The update whose checkpoint to take; by default the newest that is whole.

    Returns:
        The policy, with its scale of observations if the training had one; a
        `RecurrentAgentPolicy` if it has a memory.

    Raises:
        UsageError: If there is no such run, checkpoint or agent; or its policy is made anew for
            each observation.
    """
    run = run if isinstance(run, Run) else open_run(run)
    trainer = saved_trainer(run, update, [])
    agents = trainer.spec.agents
    check(0 <= agent < agents, "agent", f"be from 0 to {agents - 1}", agent)
    if trainer.actor.reads_observation:
        raise UsageError(
            f"{run.path}: a policy must have fixed weights to be loaded alone. Got {run.method}, "
            "which makes them for each observation; `trainers.evaluation.evaluate` plays it."
        )
    memory = trainer.actor.mlp.memory
    if memory is not None:
        return RecurrentAgentPolicy(trainer, agent, memory)
    return AgentPolicy(trainer, agent)
