"""Off-policy actor-critic losses, per sample, for continuous actions."""

import torch
from torch import Tensor

from trainers.envs.vector_env import Box
from trainers.networks import MLP, Theta
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
        algorithm 1).
    """

    def loss(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        value = _value(network, theta, sample["observation"], sample["action"])
        return (value - sample["target"]).square()

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
        return -_value(critic, fixed, sample["observation"], action)

    return loss


def _value(network: MLP, theta: Theta, observation: Tensor, action: Tensor) -> Tensor:
    return network.forward(theta, torch.cat([observation, action], dim=-1)).squeeze(-1)
