"""One agent's policy out of a run, as an ordinary module."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradlab.checks import UsageError, check
from gradlab.run import Run, open_run
from trainers.evaluation import saved_trainer
from trainers.loop import Trainer
from trainers.normalisers import ObservationNormaliser
from trainers.policies import Gaussian

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class AgentPolicy(nn.Module):
    """One agent's feed-forward policy with its own weights, made of torch's layers alone.

    Attributes:
        layers: Linear layers and activations.
        continuous: Whether actions are continuous.
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
        with torch.no_grad():
            every = trainer.actor.all_agents()
        theta = {name: t[agent if len(t) > 1 else 0].clone() for name, t in every.items()}
        parts: list[nn.Module] = []
        for name, (outputs, inputs) in mlp.layers.items():
            layer = nn.utils.skip_init(nn.Linear, inputs, outputs)  # draws no random numbers
            layer.load_state_dict({kind: theta[f"{name}.{kind}"] for kind in ("weight", "bias")})
            parts += [layer, _ACTIVATIONS[mlp.activation]()]
        self.layers = nn.Sequential(*parts[:-1])
        self.continuous = isinstance(policy, Gaussian)
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
            self.log_std = nn.Parameter(theta["log_std"])
            self.register_buffer("action_middle", (high + low) / 2)
            self.register_buffer("action_half_range", (high - low) / 2)

    def forward(
        self, observation: Float[Tensor, "*batch obs"]
    ) -> Float[Tensor, "*batch action"] | tuple[Tensor, Tensor]:
        """Say how the agent acts.

        Args:
            observation: What it sees, as the environment gives it.

        Returns:
            Logits of numbered actions, minus infinity for those that the agent does not have; or
            mean and standard deviation of continuous ones, in the environment's units, before they
            are clipped to their range; 0 for components that it does not have.
        """
        if self._clip is not None:
            scaled = (observation - self.observation_mean) / self.observation_deviation
            observation = scaled.clamp(-self._clip, self._clip).to(observation.dtype)
        made: Tensor = self.layers(observation)
        if not self.continuous:
            return made.masked_fill(~self.allowed, -torch.inf)
        mean = self.action_middle + self.action_half_range * made
        std = (self.action_half_range * self.log_std.exp()).expand_as(mean)
        return mean.masked_fill(~self.allowed, 0.0), std.masked_fill(~self.allowed, 0.0)


def load_policy(run: Run | Path | str, *, agent: int, update: int | None = None) -> AgentPolicy:
    """Load one agent's policy from a run's checkpoint.

    Args:
        run: A run that gradlab trained, or its folder.
        agent: Which agent.
        update: The update whose checkpoint to take; by default the newest that is whole.

    Returns:
        The policy, with its scale of observations if the training had one.

    Raises:
        UsageError: If there is no such run, checkpoint or agent; or its policy is recurrent, or
            made anew for each observation.
    """
    run = run if isinstance(run, Run) else open_run(run)
    trainer = saved_trainer(run, update, [])
    check(0 <= agent < trainer.spec.agents, "agent", f"be below {trainer.spec.agents}", agent)
    if trainer.actor.reads_observation or trainer.actor.mlp.memory is not None:
        kind = "recurrent" if trainer.actor.mlp.memory is not None else "made for each observation"
        raise UsageError(
            f"{run.path}: the policies must be feed-forward networks with fixed weights to be "
            f"loaded alone. Got {run.method}, {kind}; `trainers.evaluation.evaluate` plays them."
        )
    return AgentPolicy(trainer, agent)
