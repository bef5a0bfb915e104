"""Off-policy actor-critic losses, per sample."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from trainers.envs.vector_env import Box
from trainers.networks import MLP, Theta
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
    names = [f"{layer}.{kind}" for layer in critic.layers for kind in ("weight", "bias")]

    def loss(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        made = policy.network.forward(theta, sample["observation"])
        action = action_of(policy, made, sample, temperature)
        own = sample["own"][..., None]
        others = sample["action"].unflatten(-1, (own.shape[-2], -1))
        joint = torch.where(own > 0, action[..., None, :], others).flatten(-2)
        fixed = {n: sample[CRITIC + n] for n in names}
        found = -_values(critic, fixed, sample["read"], joint).mean(-1)
        if isinstance(policy, Categorical):
            found = found + logit_penalty * made.square().mean(-1)
        return found

    return loss


def action_of(
    policy: Policy, made: Tensor, sample: Mapping[str, Tensor], temperature: float
) -> Tensor:
    """What a critic reads of the actions that a policy makes, with a gradient.

    Args:
        policy: The policy.
        made: Its network's outputs [*batch, output].
        sample: `noise` of the same shape: added to continuous actions, if there is one; of numbered
            actions the Gumbel noise that draws them. `action_mask`, if not everything can be done.
        temperature: Of the Gumbel-softmax.

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
        action = (action + sample["noise"]).clamp(-1, 1)
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
