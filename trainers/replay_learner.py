"""What off-policy algorithms share: a replay, critics of what all agents see and do, targets."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import UsageError, check
from gradlab.probe import Network
from gradlab.quantity import Quantity
from trainers.acting import fixed_parameters
from trainers.checkpoints import Checkpoint
from trainers.config import NONE, MASACConfig, MATD3Config, TrainConfig
from trainers.critic_input import CriticInput, critic_source, make_critic_input, read_once
from trainers.diagnosis import DIAGNOSED_SAMPLES, Diagnosis
from trainers.envs.vector_env import VectorEnv
from trainers.finite import check_gradient, finite_mean
from trainers.generators.generator import LOG_STD, Generator
from trainers.learner import Learner, generator_of
from trainers.networks import Ensemble, Theta, make_network
from trainers.off_policy import action_of, encoded, q_loss
from trainers.parameters import Parameters
from trainers.policies import Policy, Squashed, make_policy
from trainers.ppo import Surrogate
from trainers.replay import FOLLOWING, Replay, columns_of
from trainers.rollout import Rollout, make_collector
from trainers.samples import Weights

CRITICS = ("critic", "twin")
"""Critics, of the lesser of whose values targets are made. An ensemble needs no twin."""

_WARM_UP_NOISE = 1.0  # half the action range: before anything is learned, actions are tried widely


class ReplayLearner(Learner):
    """Policies learned from a replay, judged by critics of what all agents see and do.

    An algorithm says how it explores, what a batch's targets are and what policies minimise.

    Attributes:
        slow: Which networks have slow copies: "all", or "critics" alone.
        replay: What is learned from.
        targets: The networks' slow copies, by name.
        critics: Names of the critics.
        judges: Names of the critics that the policies' loss reads.
        gradient_steps: Number of steps of the critics so far.
        actor_loss: What the policies minimise.
        critic_loss: What each critic minimises.
    """

    slow: ClassVar[str]
    judges: tuple[str, ...]
    _settings: MATD3Config | MASACConfig

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
        spec, settings = env.spec, config.off_policy
        self._config, self._settings = config, settings
        critic_input = make_critic_input(config, spec)
        self.collector = make_collector(config, env)
        seen = critic_input(self.collector.seen[critic_source(self.collector.seen)])
        form: dict[str, Any] = {
            "hidden": config.network.hidden,
            "activation": config.network.activation,
            "memory_size": None,
        }
        policy = make_policy(
            spec.observation_size,
            spec.action_space,
            action_mask=spec.action_mask,
            squashed=True,
            noise=self._exploration(),
            **form,
        )
        if isinstance(policy, Squashed) and config.methods["actor"] == "dico":
            check(
                not config.dico.snd,
                "dico.snd",
                "be 0 or left out with continuous actions and --algorithm "
                f"{config.algorithm}, whose policies squash what DiCo scales",
                config.dico.snd,
            )
        reads = seen.shape[-1] + spec.agents * policy.network.sizes[-1]
        value = make_network(reads, 1, head_gain=1.0, **form)
        self.networks = {"actor": generator_of(config, "actor", policy.network, spec, random)}
        for name in CRITICS:
            self.networks[name] = generator_of(config, "critic", value, spec, random, ensemble=True)
            if isinstance(self.networks[name].mlp, Ensemble):
                break
        self.critics = tuple(name for name in self.networks if name != "actor")
        for name, generator in self.networks.items():
            if generator.reads_observation:
                method = config.methods["actor" if name == "actor" else "critic"]
                raise UsageError(
                    f"`method` must make parameters that hold for all observations, with "
                    f"--algorithm {config.algorithm}. Got method={method!r}."
                )
        self.targets = {
            name: copy.deepcopy(generator).requires_grad_(False)
            for name, generator in self.networks.items()
            if self.slow == "all" or name in self.critics
        }
        self.policy = replace(policy, network=self.networks["actor"].mlp)
        self._warm_up = (
            replace(self.policy, noise=_WARM_UP_NOISE)
            if isinstance(self.policy, Squashed)
            else self.policy
        )
        of_critics = [p for name in self.critics for p in self.networks[name].parameters()]
        self.optimiser = torch.optim.Adam(
            [
                {"params": [*self.networks["actor"].parameters()], "lr": settings.learning_rate},
                {"params": of_critics, "lr": settings.critic_learning_rate},
            ],
            fused=True,
        )
        self.replay = Replay(settings.replay_frames, config.copies)
        self.gradient_steps = 0
        self.prepare()
        self.view = self._make_view(critic_input)
        self.critic_loss = q_loss(self.networks["critic"].mlp)
        self.actor_loss = self._make_actor_loss()
        diagnosed = {
            "actor": Network(generator=self.networks["actor"], surrogate=self.actor_loss),
            "critic": Network(generator=self.networks["critic"], surrogate=self.critic_loss),
        }
        self.diagnosis = ReplayDiagnosis(
            config, diagnosed, self.policy, critic_input, self.optimiser, self.collector.share
        )
        self.diagnosis.learner = self
        self.aggregations, self.findings = {}, []

    def prepare(self) -> None:
        """Make what an algorithm has beside the networks; `judges` are set then."""

    @abstractmethod
    def _exploration(self) -> float | None:
        """Standard deviation of what is added to continuous actions; None: it is learned."""

    @abstractmethod
    def _make_view(self, critic_input: CriticInput) -> "BatchView":
        """What looks up samples and makes their targets."""

    @abstractmethod
    def _make_actor_loss(self) -> Surrogate:
        """What the policies minimise, a loss of samples and of what `held` returns."""

    def held(self) -> dict[str, Tensor]:
        """What the policies' loss reads as constants.

        Returns:
            The judges' parameters [agent, ...], each under its critic's name and a slash.
        """
        with torch.no_grad():
            return {
                f"{judge}/{name}": tensor
                for judge in self.judges
                for name, tensor in self.networks[judge].all_agents().items()
            }

    def _beside_actor(self, theta: Theta, batch: dict[str, Tensor]) -> None:
        """Leave gradients of what else is learned with the policies' step."""

    def begin(self, left: float) -> None:
        """See `Learner.begin`; nothing falls."""

    def collect(self, random: RandomGenerator) -> Rollout:
        """See `Learner.collect`; what was collected is in the replay then."""
        collector = self.collector
        warm = self.replay.added * self.replay.copies >= self._settings.warmup_frames
        played = collector.play(
            self._config.steps,
            self.policy if warm else self._warm_up,
            fixed_parameters(self.networks["actor"]),
            random,
        )
        mask = collector.env.action_mask()
        if mask is not None:
            mask = mask | ~collector.active[..., None]
        self.replay.add(columns_of(played, collector.seen, mask))
        samples = {name: played.columns[name].flatten(1, 2) for name in ("observation", "active")}
        if samples["active"].all():
            del samples["active"]
        return Rollout(played=played, samples=samples)

    def update(
        self,
        samples: Mapping[str, Tensor],  # noqa: ARG002 -- they are in the replay
        random: RandomGenerator,
    ) -> dict[str, Quantity]:
        """See `Learner.update`; before the warm-up is over, nothing is learned."""
        settings = self._settings
        losses: dict[str, list[float]] = {"policy_loss": [], "value_loss": []}
        warm = self.replay.added * self.replay.copies >= settings.warmup_frames
        steps = settings.gradient_steps or self._config.steps
        for _ in range(steps if warm else 0):
            batch = self.view.of(self.replay, self.replay.draw(settings.batch_size, random), random)
            losses["value_loss"].append(self._critic_step(batch))
            self.gradient_steps += 1
            if self.gradient_steps % settings.policy_delay == 0:
                losses["policy_loss"].append(self._actor_step(batch))
                self._follow()
        how = "mean over the update's steps; NaN: none was taken"
        found = {
            name: Quantity.scalar(fmean(each) if each else float("nan"), "loss", how)
            for name, each in losses.items()
        }
        counts = {"replay_frames": self.replay.frames, "gradient_steps": self.gradient_steps}
        units = {"replay_frames": "frames", "gradient_steps": "steps"}
        return found | {n: Quantity.scalar(float(c), units[n], "exact") for n, c in counts.items()}

    def _critic_step(self, batch: dict[str, Tensor]) -> float:
        """Move the critics towards the targets; their mean loss before."""
        self.optimiser.zero_grad(set_to_none=True)
        weigh, total = Weights.of(batch.get("active")), 0.0
        for name in self.critics:
            parameters = Parameters(self.networks[name])
            theta = parameters.of(batch["read"])
            loss = finite_mean(
                "value_loss", weigh(self.critic_loss(theta, critic_batch(batch, theta)))
            )
            loss.backward()
            parameters.backward()
            self.networks[name].regularise(loss.item())
            clipped = self.networks[name].clip_gradients(self._settings.max_gradient_norm)
            check_gradient(name, clipped)
            total += loss.item() / len(self.critics)
        self.optimiser.step()  # leaves alone what has no gradient
        return total

    def _actor_step(self, batch: dict[str, Tensor]) -> float:
        """Move the actors towards what the critic values; their loss before."""
        self.optimiser.zero_grad(set_to_none=True)
        actor = self.networks["actor"]
        parameters = Parameters(actor)
        theta = parameters.of(batch["observation"])
        losses = self.actor_loss(theta, {**actor_batch(batch), **self.held()})
        loss = finite_mean("policy_loss", Weights.of(batch.get("active"))(losses))
        loss.backward()
        parameters.backward()
        actor.regularise(loss.item())
        check_gradient("actor", actor.clip_gradients(self._settings.max_gradient_norm))
        self._beside_actor(theta, batch)
        self.optimiser.step()
        return loss.item()

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the targets follow the networks (Polyak averages of psi)."""
        for name, target in self.targets.items():
            network = self.networks[name]
            for slow, buffer in zip(target.buffers(), network.buffers(), strict=True):
                slow.copy_(buffer)  # what is set rather than trained, see `Generator.adapt`
            torch._foreach_lerp_(
                [*target.parameters()],
                [p.detach() for p in network.parameters()],
                self._settings.polyak,
            )

    def state(self) -> dict[str, Tensor]:
        """See `Learner.state`."""
        tensors = super().state() | {"gradient_steps": torch.tensor(self.gradient_steps)}
        for name, target in self.targets.items():
            tensors |= {f"target.{name}.{n}": t for n, t in target.state_dict().items()}
        return tensors | {f"replay.{n}": t for n, t in self.replay.state().items()}

    def load_state(self, checkpoint: Checkpoint) -> None:
        """See `Learner.load_state`."""
        super().load_state(checkpoint)
        self.gradient_steps = int(checkpoint.tensors["gradient_steps"])
        for name, target in self.targets.items():
            target.load_state_dict(checkpoint.under(f"target.{name}."))
        self.replay.load_state(checkpoint.under("replay."))


class BatchView(ABC):
    """Turns what is remembered into what the losses read."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        actor: Generator,
        critics: Sequence[Generator],
        critic_input: CriticInput,
    ) -> None:
        """Know where to look.

        Args:
            config: Discount and n-step returns.
            policy: The policies' form.
            actor: Makes the policies that targets are made of.
            critics: Make the value functions that they are made of.
            critic_input: What critics read of the observations, or world states.
        """
        self._settings = config.off_policy
        self._policy = policy
        self._actor = actor
        self._critics = critics
        self._critic_input = critic_input

    @abstractmethod
    def _noise(
        self, shape: tuple[int, ...], random: RandomGenerator, *, following: bool
    ) -> Tensor | None:
        """What the actions of the policies are made with, those that follow or a sample's own."""

    def _beside(self, samples: int) -> dict[str, Tensor]:  # noqa: ARG002 -- others have some
        """What else the policies' loss reads [agent, sample, ...], by name."""
        return {}

    def _worth(
        self,
        theta: Theta,  # noqa: ARG002 -- others read it
        made: Tensor,
        mask: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """What policies with such outputs are worth beside their actions' value [agent, sample]."""
        return made.new_zeros(made.shape[:-1])

    @torch.no_grad()
    def of(self, replay: Replay, places: Tensor, random: RandomGenerator) -> dict[str, Tensor]:
        """Look up samples, and make their targets.

        Args:
            replay: What is remembered.
            places: Which samples.
            random: Source of the noise.

        Returns:
            Tensors [agent, sample, ...] by name: `observation`; `read` and `action`, what critics
            read, the latter of all agents; `own`; `target`; `active`, `action_mask` and `noise`,
            where there are such things; and what else the algorithm's actors' loss reads.
        """
        settings, policy = self._settings, self._policy
        held = replay.take(places, steps=settings.n_step, discount=settings.discount)
        seen, following = (
            held,
            {n.removeprefix(FOLLOWING): t for n, t in held.items() if n.startswith(FOLLOWING)},
        )
        agents = len(held["observation"])
        found = {
            "observation": held["observation"],
            "read": self._critic_input(seen[critic_source(seen)]),
            "action": joint(encoded(policy, held["action"])),
            "own": torch.eye(agents)[:, None].expand(-1, len(places), -1),
            "target": held["return"] + held["bootstrap"] * self._following(following, random),
        }
        shape = (agents, len(places), policy.network.sizes[-1])
        noise = self._noise(shape, random, following=False)
        if noise is not None:
            found["noise"] = noise
        if "action_mask" in held:
            found["action_mask"] = held["action_mask"]
        if not held["active"].all():
            found["active"] = held["active"]
        return found | self._beside(len(places))

    def _following(self, seen: dict[str, Tensor], random: RandomGenerator) -> Tensor:
        """The least of the target critics' values of what policies do then, and what that is worth.

        The latter is the algorithm's own.
        """
        settings, policy = self._settings, self._policy
        theta = self._actor.all_agents()
        made = policy.network.forward(theta, seen["observation"])
        noise = self._noise(tuple(made.shape), random, following=True)
        assert noise is not None
        action = action_of(
            policy, made, {**seen, "noise": noise}, settings.temperature, theta.get(LOG_STD)
        )
        batch = {"read": self._critic_input(seen[critic_source(seen)]), "action": joint(action)}
        values = []
        for critic in self._critics:
            of_critic = critic.all_agents()
            once = critic_batch(batch, of_critic)
            both = torch.cat([once["observation"], once["action"]], dim=-1)
            values.append(critic.mlp.forward(of_critic, both))
        least = torch.cat(values, dim=-1).amin(-1)
        return least + self._worth(theta, made, seen.get("action_mask"))


def critic_batch(batch: Mapping[str, Tensor], theta: Theta) -> dict[str, Tensor]:
    """What a critic's loss reads.

    Args:
        batch: Samples, as `BatchView.of` returns them.
        theta: The critics' parameters.

    Returns:
        `observation`, `action` and `target`; once for all agents if they read and have the same.
    """
    found = {"observation": batch["read"], "action": batch["action"]}
    found = {name: read_once(tensor, theta) for name, tensor in found.items()}
    return found | {name: batch[name] for name in ("target",) if name in batch}


def actor_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the policies' loss reads.

    Args:
        batch: Samples, as `BatchView.of` returns them.

    Returns:
        Those by name.
    """
    names = ("observation", "read", "action", "own", "noise", "action_mask", "alpha")
    return {name: batch[name] for name in names if name in batch}


def joint(action: Tensor) -> Tensor:
    """All agents' actions, one after the other: for every agent, in the memory of one.

    Args:
        action: [agent, sample, action].

    Returns:
        [agent, sample, agent * action].
    """
    together = action.movedim(0, -2).flatten(-2)
    return together.expand(len(action), *together.shape)


def gumbel(shape: tuple[int, ...], random: RandomGenerator) -> Tensor:
    """Draw from the standard Gumbel distribution.

    Args:
        shape: How many.
        random: Source of randomness.

    Returns:
        Finite numbers.
    """
    uniform = torch.rand(shape, generator=random)
    smallest = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp(min=smallest).log()).clamp(min=smallest).log()


class ReplayDiagnosis(Diagnosis):
    """Looks at steps spread evenly over the replay, from all copies.

    Attributes:
        learner: Whose networks they are.
    """

    learner: ReplayLearner

    def _batches(
        self,
        rollout: Rollout,  # noqa: ARG002 -- it is in the replay
    ) -> tuple[dict[str, dict[str, Tensor]], Tensor, Tensor | None]:
        learner, config = self.learner, self._config
        most = config.diagnosed_samples or DIAGNOSED_SAMPLES[config.diagnostics] * config.every
        places = learner.replay.spread(max(1, most // config.copies))
        # Not from the training's randomness, and the same again for a resumed training.
        random = torch.Generator().manual_seed((config.seed << 32) + learner.gradient_steps)
        batch = learner.view.of(learner.replay, places, random)
        mask = batch.pop("active", None)
        of_critic = {"observation": batch["read"]} | {n: batch[n] for n in ("action", "target")}
        batches = {"actor": actor_batch(batch), "critic": of_critic}
        return (
            {network: batches[network] for network in self.probe.networks},
            places % config.copies,
            mask,
        )

    def _context(self) -> dict[str, dict[str, Tensor]]:
        agents = self.learner.networks["actor"].agents
        held = {n: t.expand(agents, *t.shape[1:]) for n, t in self.learner.held().items()}
        return {"actor": held, "critic": {}}


def _check(config: TrainConfig) -> None:
    """Raise unless an off-policy algorithm can be trained with such settings."""
    settings, name = config.off_policy, config.algorithm
    on = f"with --algorithm {name}"
    check(config.network.memory == "none", "network.memory", f"be none {on}", config.network.memory)
    grouped = "seps" in config.methods.values()
    check(not grouped, "method", f"not be seps {on}: its groups start afresh on-policy", "seps")
    check(config.aggregate == NONE, "aggregate", f"be none {on}", config.aggregate)
    room = settings.replay_frames // config.copies * config.copies
    check(
        room >= settings.batch_size,
        f"{name}.replay_frames",
        f"have room for a batch: {settings.batch_size} frames ({name}.batch_size) in whole "
        f"steps of {config.copies} copies",
        settings.replay_frames,
    )
    least = max(settings.warmup_frames, 1)
    check(
        config.frames > least,
        "frames",
        f"be above the {least} of {name}.warmup_frames, in which nothing is learned",
        config.frames,
    )
