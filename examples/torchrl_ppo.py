"""TorchRL's multi-agent PPO on VMAS with gradlab watching, a policy for all or each agent its own.

Run it, then `gradlab conflict runs/torchrl`.
"""

import argparse
from pathlib import Path

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs import RewardSum, TransformedEnv
from torchrl.envs.libs.vmas import VmasEnv
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from gradlab.integrations.torchrl import LossProbe

OBSERVATION = ("agents", "observation")


def networks(env, shared):
    agents, observed = env.observation_spec[OBSERVATION].shape[-2:]
    actions = env.action_spec[env.action_key]
    form = {"n_agents": agents, "centralised": False, "share_params": shared}
    form |= {"depth": 2, "num_cells": 64, "activation_class": nn.Tanh}
    outputs = 2 * actions.shape[-1]
    policy = ProbabilisticActor(
        module=TensorDictModule(
            nn.Sequential(MultiAgentMLP(observed, outputs, **form), NormalParamExtractor()),
            in_keys=[OBSERVATION],
            out_keys=[("agents", "loc"), ("agents", "scale")],
        ),
        spec=actions,
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[env.action_key],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": actions.space.low[0], "high": actions.space.high[0]},
        return_log_prob=True,
        log_prob_key=("agents", "log_prob"),
    )
    critic = TensorDictModule(
        MultiAgentMLP(observed, 1, **form),
        in_keys=[OBSERVATION],
        out_keys=[("agents", "state_value")],
    )
    return policy, critic


def loss_of(policy, critic, env):
    loss = ClipPPOLoss(
        policy,
        critic,
        entropy_coeff=0.0,
        normalize_advantage=True,
        normalize_advantage_exclude_dims=(-2,),
    )
    names = ("advantage", "value_target", "done", "terminated")
    keys = {name: ("agents", name) for name in names}
    loss.set_keys(
        reward=env.reward_key,
        action=env.action_key,
        value=("agents", "state_value"),
        sample_log_prob=("agents", "log_prob"),
        **keys,
    )
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.99, lmbda=0.9)
    return loss


def main(out, updates=20, copies=64, steps=100, epochs=4, shared=True, every=5):
    torch.manual_seed(0)
    env = VmasEnv(scenario="navigation", num_envs=copies, max_steps=steps, n_agents=4, seed=0)
    env = TransformedEnv(env, RewardSum(in_keys=[env.reward_key]))
    policy, critic = networks(env, shared)
    loss = loss_of(policy, critic, env)
    optimiser = torch.optim.Adam(loss.parameters(), 5e-4)
    with LossProbe(loss, every=every, out=out, environment="vmas/navigation") as probe:
        for _ in range(updates):
            with torch.no_grad():
                batch = env.rollout(steps, policy)  # [copy, time]
                for name in ("done", "terminated"):
                    ends = batch["next", name][..., None].expand(
                        batch["next", env.reward_key].shape
                    )
                    batch["next", "agents", name] = ends
                loss.value_estimator(batch, params=loss.critic_network_params.detach())
            returns = batch["next", "agents", "episode_reward"][:, -1].mean().item()
            probe(batch, scalars={"episode_return": returns})
            samples = batch.reshape(-1)
            for _ in range(epochs):
                for part in torch.randperm(len(samples)).chunk(4):
                    of = loss(samples[part])
                    optimiser.zero_grad()
                    (of["loss_objective"] + of["loss_critic"]).backward()
                    nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
                    optimiser.step()
    return probe.path


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/torchrl"))
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--own", action="store_true", help="a policy for each agent")
    options = parser.parse_args()
    print(f"Run: {main(options.out, options.updates, shared=not options.own)}")
