"""Off-policy actor-critic losses, per sample."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainers.envs.vector_env import Box
from trainers.generators.generator import LOG_STD
from trainers.networks import MLP, Theta, per_agent
from trainers.policies import Categorical, Policy
from trainers.ppo import Surrogate

CRITIC = "critic/"
"""Prefix of a critic's fixed parameters among what a sample holds."""


def q_loss(network: MLP) -> Surrogate:
    """Squared temporal-difference error of an action-value network.

    Args:
        network: Reads the observation followed by the action.

    Returns:
        A function of the network's parameters and samples (`observation`, `action`, `target`, the
        fixed bootstrapped return) that returns each sample's loss (Fujimoto et al., "TD3", 2018,
        algorithm 1); of an ensemble the mean over its members.
    """

    def loss(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        values = _values(network, theta, sample["observation"], sample["action"])
        return (values - sample["target"][..., None]).square().mean(-1)

    return loss


def deterministic_actor_loss(actor: MLP, critic: MLP, box: Box) -> Surrogate:
    """Minus the critic's value of the actor's action (Silver et al., "DPG", 2014, eq. 9).

    Args:
        actor: Its outputs go through tanh to the action range.
        critic: Reads the observation followed by the action.
        box: The action range.

    Returns:
        A function of the actor's parameters and samples that returns each sample's loss. Samples
        hold `observation` and, by name under the prefix `CRITIC`, the critic's parameters.
    """
    parameters = [f"{layer}.{kind}" for layer in critic.layers for kind in ("weight", "bias")]

    def loss(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        fixed = {name: sample[CRITIC + name] for name in parameters}
        middle, half = (box.high + box.low) / 2, (box.high - box.low) / 2
        action = middle + half * torch.tanh(actor.forward(theta, sample["observation"]))
        return -_values(critic, fixed, sample["observation"], action).mean(-1)

    return loss


def joint_actor_loss(
    policy: Policy, critic: MLP, *, temperature: float, logit_penalty: float
) -> Surrogate:
    """Minus the critic's value of what all agents did, with the agent's own action made anew.

    The other agents' actions are those of the sample (Lowe et al., "MADDPG", 2017, eq. 6), so that
    each agent's loss is a function of its own parameters.

    Args:
        policy: Numbered actions are made by a straight-through Gumbel-softmax.
        critic: Reads what it reads of the observations, then all agents' actions; of an ensemble
            the mean over its members counts.
        temperature: Of the Gumbel-softmax.
        logit_penalty: Weight of the mean squared logit, which keeps numbered actions from becoming
            certain.

    Returns:
        A function of the policy's parameters and samples that returns each sample's loss. Samples
        hold the agent's `observation` and, of numbered actions, standard Gumbel `noise` [action];
        what the critic reads, `read` and all agents' actions, `action` [agent * action]; `own`
        [agent], 1 for the agent itself and else 0; and the critic's parameters under `CRITIC`.
    """

    def loss(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        made = policy.network.forward(theta, sample["observation"])
        joint = _with_own(action_of(policy, made, sample, temperature), sample)
        found = -_values(critic, _held(critic, CRITIC, sample), sample["read"], joint).mean(-1)
        if isinstance(policy, Categorical):
            found = found + logit_penalty * made.square().mean(-1)
        return found

    return loss


def soft_actor_loss(
    policy: Policy, critic: MLP, judges: Sequence[str], *, temperature: float
) -> Surrogate:
    r"""Minus the least of the critics' values of the agent's action, and alpha times its entropy.

    The loss of soft actor-critic (Haarnoja et al., "Soft actor-critic algorithms and applications",
    2018, eq. 9), with :math:`-\log \pi` replaced by its mean, the entropy; the other agents'
    actions are those of the sample.

    Args:
        policy: As for `joint_actor_loss`, with a `log_std` for continuous actions.
        critic: The critics' form, as for `joint_actor_loss`; members of an ensemble are critics.
        judges: Names of the critics.
        temperature: Of the Gumbel-softmax.

    Returns:
        As `joint_actor_loss`. Samples hold standard normal `noise` for continuous actions as well,
        `alpha`, and each critic's parameters under its name and a slash.
    """

    def loss(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        made = policy.network.forward(theta, sample["observation"])
        action = action_of(policy, made, sample, temperature, theta.get(LOG_STD))
        joint = _with_own(action, sample)
        values = [
            _values(critic, _held(critic, f"{judge}/", sample), sample["read"], joint)
            for judge in judges
        ]
        entropy = policy.entropy(theta, made, sample.get("action_mask"))
        return -torch.cat(values, dim=-1).amin(-1) - sample["alpha"] * entropy

    return loss


def entropy_target(
    policy: Policy, made: Tensor, mask: Tensor | None, *, per_component: float, share: float
) -> Tensor:
    """The entropy that alpha is moved to bring about.

    Args:
        policy: The policy.
        made: Its network's outputs [*batch, output].
        mask: What may be done [*batch, action]; None: everything.
        per_component: Of continuous actions, for each component that has an effect (nats).
        share: Of numbered actions, as share of the logarithm of the number of those that may be
            done.

    Returns:
        [*batch], in nats.
    """
    allowed = (torch.ones_like(made) if mask is None else mask.to(made.dtype)).sum(-1)
    return share * allowed.log() if isinstance(policy, Categorical) else per_component * allowed


def _with_own(action: Tensor, sample: Mapping[str, Tensor]) -> Tensor:
    """All agents' actions [*batch, agent * action], with this one in place of the agent's own."""
    own = sample["own"][..., None]
    others = sample["action"].unflatten(-1, (own.shape[-2], -1))
    return torch.where(own > 0, action[..., None, :], others).flatten(-2)


def _held(critic: MLP, prefix: str, sample: Mapping[str, Tensor]) -> Theta:
    """A critic's fixed parameters."""
    names = [f"{layer}.{kind}" for layer in critic.layers for kind in ("weight", "bias")]
    return {name: sample[prefix + name] for name in names}


def action_of(
    policy: Policy,
    made: Tensor,
    sample: Mapping[str, Tensor],
    temperature: float,
    log_std: Tensor | None = None,
) -> Tensor:
    """What a critic reads of the actions that a policy makes, with a gradient.

    Args:
        policy: The policy.
        made: Its network's outputs [*batch, output].
        sample: `noise` of the same shape: added to continuous actions, if there is one; of numbered
            actions the Gumbel noise that draws them. `action_mask`, if not everything can be done.
        temperature: Of the Gumbel-softmax.
        log_std: Logarithm of what the noise of continuous actions is multiplied by, as the policy's
            parameters hold it; None: noise is added as it is.

    Returns:
        Continuous actions from -1 to 1; or one-hot numbered ones, with the gradient of the softmax
        (Jang et al., "Categorical reparameterization with Gumbel-softmax", 2017, section 2.2).
    """
    mask = sample.get("action_mask")
    if isinstance(policy, Categorical):
        if mask is not None:
            made = made.masked_fill(~mask, torch.finfo(made.dtype).min / 2)
        drawn = (made + sample["noise"]) / temperature
        soft = drawn.softmax(-1)
        hard = (drawn == drawn.amax(-1, keepdim=True)).to(soft.dtype)
        return soft + (hard - soft).detach()
    action = made.tanh()
    if "noise" in sample:
        noise = sample["noise"]
        noise = noise if log_std is None else noise * per_agent(log_std, made).exp()
        action = (action + noise).clamp(-1, 1)
    return action if mask is None else torch.where(mask, action, torch.zeros_like(action))


def encoded(policy: Policy, action: Tensor) -> Tensor:
    """What critics read of actions that were taken.

    Args:
        policy: Drew them.
        action: As `Policy.sample` returned them.

    Returns:
        The actions [*batch, action], numbered ones one-hot.
    """
    if isinstance(policy, Categorical):
        return functional.one_hot(action, policy.network.sizes[-1]).float()
    return action


def _values(network: MLP, theta: Theta, observation: Tensor, action: Tensor) -> Tensor:
    """[*batch, member]: of an ensemble several."""
    return network.forward(theta, torch.cat([observation, action], dim=-1))
