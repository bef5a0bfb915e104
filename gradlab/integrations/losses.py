"""TorchRL's loss modules as losses of one agent's single sample."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.nn import functional
from torchrl.modules import TanhDelta
from torchrl.objectives import ClipPPOLoss, DDPGLoss, LossModule

from gradlab.attach.network import Loss
from gradlab.checks import UsageError, check
from gradlab.integrations.agent_network import Key, Networks, name_of, networks
from gradlab.integrations.comparison import compare
from gradlab.integrations.distributions import Range, actions_of
from gradlab.integrations.group_batch import GroupBatch

_DISTANCES: dict[str, Callable[..., Tensor]] = {
    "l2": functional.mse_loss,
    "l1": functional.l1_loss,
    "smooth_l1": functional.smooth_l1_loss,
}

_ADVANTAGE = "loss: advantage"
_OLD = "loss: log-probability"
_TARGET = "loss: target"
_VALUE = "loss: value"
_MIDDLE = "loss: middle of the range"
_HALF = "loss: half the range"


class AgentLoss(ABC):
    """What a loss module trains, agent by agent.

    A loss is that of one agent's single sample; where a sample is a stretch of time, its mean.

    Attributes:
        networks: The trained networks, "actor" and "critic".
        losses: The loss of each.
    """

    networks: dict[str, Networks]
    losses: dict[str, Loss]

    @abstractmethod
    def batches(self, batch: GroupBatch) -> dict[str, dict[str, Tensor]]:
        """Make what the losses read.

        Args:
            batch: What the loss module would be called with.

        Returns:
            For each network tensors [agent, sample, ...] by name.

        Raises:
            UsageError: If something is missing in it.
        """

    @abstractmethod
    def compare(self, batch: GroupBatch) -> None:
        """Insist that agents' networks do what they do in the loss module; see `comparison`.

        Args:
            batch: What the loss module would be called with.

        Raises:
            UsageError: If they do not.
        """

    def look(self) -> None:
        """Look at where the framework's parameters are now, should they have been moved."""
        for of in self.networks.values():
            of.views.look()


class ClippedPPO(AgentLoss):
    """`ClipPPOLoss`: the clipped surrogate with its entropy bonus, and the critic's loss."""

    def __init__(self, module: ClipPPOLoss, agents: int) -> None:
        """Read off how it trains.

        Args:
            module: The loss module.
            agents: Number of agents.

        Raises:
            UsageError: If it can't be taken apart.
        """
        keys = module.tensor_keys
        for name in ("action", "sample_log_prob"):
            key = getattr(keys, name)
            if isinstance(key, list) or (isinstance(key, tuple) and isinstance(key[0], tuple)):
                check(False, "loss", "have actions of one kind, not composite ones", key)
        check(module.reduction == "mean", "loss", 'have reduction "mean"', module.reduction)
        self._module = module
        last = distribution_of(module.actor_network)
        self._actions = actions_of(last)
        masks = [k for a, k in zip(last.dist_keys, last.in_keys, strict=True) if a == "mask"]
        self._mask: Key | None = masks[0] if masks else None
        self._parameters = [key for key in last.in_keys if key != self._mask]
        self.networks = {"actor": networks(module.actor_network, agents)}
        self.losses = {"actor": self._actor}
        if module.critic_network is not None and module.critic_coeff is not None:
            self.networks["critic"] = networks(module.critic_network, agents)
            self.losses["critic"] = self._critic
        of_heads = module.entropy_bonus and module._entropy_coeff_map is not None
        check(not of_heads, "loss", "have one entropy_coeff", module._entropy_coeff_map)

    def batches(self, batch: GroupBatch) -> dict[str, dict[str, Tensor]]:
        """See `AgentLoss.batches`."""
        keys = self._module.tensor_keys
        mend = "call loss.value_estimator(batch) before the probe"
        advantage = batch.found(keys.advantage, mend)
        if self._module.normalize_advantage and advantage.numel() > 1:
            advantage = _standardised(advantage, self._module.normalize_advantage_exclude_dims)
        of_actor = batch.read(self.networks["actor"].reads) | {
            _ADVANTAGE: batch.numbers(keys.advantage, advantage),
            _OLD: batch.one_each(keys.sample_log_prob),
        }
        if self._mask is not None:
            of_actor[name_of(self._mask)] = batch.of_agents(self._mask)
        draws = int(self._module.samples_mc_entropy) if self._entropy_weight else 0
        of_actor |= self._actions.constants(batch.of_agents(keys.action), draws)
        found = {"actor": of_actor}
        if "critic" in self.networks:
            of_critic = batch.read(self.networks["critic"].reads)
            of_critic[_TARGET] = batch.numbers(
                keys.value_target, batch.found(keys.value_target, mend)
            )
            if self._module.clip_value:
                of_critic[_VALUE] = batch.numbers(keys.value)
            found["critic"] = of_critic
        return found

    def compare(self, batch: GroupBatch) -> None:
        """See `AgentLoss.compare`."""
        compare(self._module.actor_network, self.networks["actor"], self._parameters, batch)
        if "critic" in self.networks:
            value = self._module.tensor_keys.value
            compare(self._module.critic_network, self.networks["critic"], [value], batch)

    @property
    def _entropy_weight(self) -> float:
        """Weight of the entropy bonus as it is now."""
        return float(self._module.entropy_coeff) if self._module.entropy_bonus else 0.0

    def _actor(self, network: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
        values = network(sample)
        log_ratio = self._actions.log_prob(values) - sample[_OLD]
        epsilon = float(self._module.clip_epsilon)
        low, high = math.log1p(-epsilon), math.log1p(epsilon)
        advantage = sample[_ADVANTAGE]
        gains = (log_ratio.exp() * advantage, log_ratio.clamp(low, high).exp() * advantage)
        loss = -torch.minimum(*gains)
        if self._entropy_weight:
            loss = loss - self._entropy_weight * self._actions.entropy(values)
        return loss.mean()

    def _critic(self, network: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
        module, target = self._module, sample[_TARGET]
        distance = _DISTANCES[module.loss_critic_type]
        value = network(sample)[name_of(module.tensor_keys.value)].squeeze(-1)
        loss = distance(value, target, reduction="none")
        if module.clip_value:
            width = float(module.clip_value)
            clipped = sample[_VALUE] + (value - sample[_VALUE]).clamp(-width, width)
            loss = torch.maximum(loss, distance(clipped, target, reduction="none"))
        return float(module.critic_coeff) * loss.mean()


class DeterministicPolicyGradient(AgentLoss):
    """`DDPGLoss` with a critic for each agent that reads that agent alone, as in IDDPG."""

    def __init__(self, module: DDPGLoss, agents: int) -> None:
        """Read off how it trains.

        Args:
            module: The loss module.
            agents: Number of agents.

        Raises:
            UsageError: If it can't be taken apart.
        """
        check(module.reduction == "mean", "loss", 'have reduction "mean"', module.reduction)
        self._module = module
        last = distribution_of(module.actor_network)
        if last.distribution_class is not TanhDelta:
            got = getattr(last.distribution_class, "__name__", last.distribution_class)
            check(False, "loss", "have an actor with a TanhDelta at its end", got)
        (self._param_key,) = last.in_keys
        self._action = name_of(last.out_keys[0])
        arguments = dict(last.distribution_kwargs)
        self._range = Range(arguments.get("low", -1.0), arguments.get("high", 1.0))
        actor = networks(module.actor_network, agents)
        critic = networks(module.value_network, agents)
        others = [r for r in critic.reads if r.axis != "own" and r.name != "is_init"]
        if others:
            raise UsageError(
                "`loss` must have critics that read one agent alone, or each agent's loss is of "
                f"all agents' actions. Got critics that read {others[0].name}."
            )
        both = {"actor": actor, "critic": critic}
        generated = [name for name, of in both.items() if of.target is not None]
        rule = "have networks that are not generated by a hypernetwork"
        check(not generated, "loss", rule, generated)
        self._actors = actor
        pairs = zip(actor.policy.children(), critic.policy.children(), strict=True)
        self._judged = [_Judged(own, judge) for own, judge in pairs]
        policy = nn.ModuleList(self._judged)
        self.networks = both | {"actor": replace(actor, policy=policy)}
        self.losses = {"actor": self._actor, "critic": self._critic}

    def batches(self, batch: GroupBatch) -> dict[str, dict[str, Tensor]]:
        """See `AgentLoss.batches`."""
        with torch.no_grad():
            # It writes errors into what it is given.
            _, said = self._module.loss_value(batch.tensors.clone(False))
        target = said["target_value"].unsqueeze(-1)
        of_critic = batch.read(self.networks["critic"].reads)
        action = of_critic[self._action]
        middle, half = (bound.expand_as(action) for bound in self._range.of(action))
        of_actor = {name: tensor for name, tensor in of_critic.items() if name != self._action}
        of_actor |= batch.read(self.networks["actor"].reads) | {_MIDDLE: middle, _HALF: half}
        of_critic[_TARGET] = batch.numbers("the target", target)
        return {"actor": of_actor, "critic": of_critic}

    def compare(self, batch: GroupBatch) -> None:
        """See `AgentLoss.compare`."""
        compare(self._module.actor_network, self._actors, [self._param_key], batch)
        value = self._module.tensor_keys.state_action_value
        compare(self._module.value_network, self.networks["critic"], [value], batch)

    def look(self) -> None:
        """See `AgentLoss.look`."""
        super().look()
        for judged in self._judged:
            judged.look()

    def _actor(self, network: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
        values = network.get_submodule("actor")(sample)
        middle, half = sample[_MIDDLE], sample[_HALF]
        # The framework shifts by the middle of the range before it squashes, and after.
        action = (values[name_of(self._param_key)] + middle).tanh() * half + middle
        values = network.get_submodule("judge")(values | {self._action: action})
        value: Tensor = values[self._value]
        return -value.mean()

    def _critic(self, network: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
        value = network(sample)[self._value].squeeze(-1)
        distance = _DISTANCES[self._module.loss_function]
        return distance(value, sample[_TARGET], reduction="none").mean()

    @property
    def _value(self) -> str:
        return name_of(self._module.tensor_keys.state_action_value)


class _Judged(nn.Module):
    """An agent's actor, and its critic as something that is not trained with it."""

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor = actor
        self.judge = copy.deepcopy(critic)
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name, parameter in critic.named_parameters():
            path, _, leaf = name.rpartition(".")
            owner = self.judge.get_submodule(path)
            del owner._parameters[leaf]
            owner.register_buffer(leaf, parameter.detach())
            self._places.append((owner, leaf, parameter))

    def look(self) -> None:
        """Look at where the critic's parameters are now."""
        for owner, leaf, parameter in self._places:
            owner._buffers[leaf] = parameter.detach()


LOSSES: dict[type[LossModule], Callable[..., AgentLoss]] = {
    ClipPPOLoss: ClippedPPO,
    DDPGLoss: DeterministicPolicyGradient,
}


def agent_loss(module: object, agents: int) -> AgentLoss:
    """Take a loss module apart.

    Args:
        module: The loss module.
        agents: Number of agents.

    Returns:
        What it trains, agent by agent.

    Raises:
        UsageError: If it is of another kind, or has networks that can't be taken for one agent.
    """
    make = LOSSES.get(type(module))
    if make is None:
        known = ", ".join(kind.__name__ for kind in LOSSES)
        raise UsageError(
            f"`loss` must be a loss module of {known}, whose losses are known sample by sample. "
            f"Got {type(module).__name__}."
        )
    return make(module, agents)


def distribution_of(actor: TensorDictModuleBase) -> ProbabilisticTensorDictModule:
    """Find what makes the actions of an actor.

    Args:
        actor: The actor.

    Returns:
        The module at its end.

    Raises:
        UsageError: If there is none.
    """
    last = actor.module[-1] if isinstance(actor, TensorDictSequential) else actor
    if not isinstance(last, ProbabilisticTensorDictModule):
        got = type(last).__name__
        check(False, "loss", "have a ProbabilisticActor, with a distribution at its end", got)
    assert isinstance(last, ProbabilisticTensorDictModule)
    return last


def _standardised(tensor: Tensor, exclude: Sequence[int]) -> Tensor:
    """Advantages as a loss module normalises them: over all axes but those excluded."""
    kept = {axis % tensor.dim() for axis in exclude}
    axes = [axis for axis in range(tensor.dim()) if axis not in kept]
    mean, std = tensor.mean(axes, keepdim=True), tensor.std(axes, keepdim=True)
    return (tensor - mean) / std.clamp_min(torch.finfo(torch.float).resolution)
