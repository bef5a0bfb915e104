"""PPO in one file for a PettingZoo game with a policy that all agents share, watched by gradlab.

The three lines that gradlab needs end in "gradlab"; `loss` says what is differentiated.
"""

import argparse
from pathlib import Path

import torch
from mpe2 import simple_spread_v3
from torch import nn
from torch.distributions import Categorical

import gradlab  # 1: gradlab

AGENTS, COPIES, STEPS, CLIP, GAMMA, LAMBDA = 3, 8, 25, 0.2, 0.99, 0.95


class Agent(nn.Module):
    """Actor and critic; both read the observation and the agent's ID."""

    def __init__(self, inputs, actions):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, actions))
        self.critic = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 1))


def loss(actor, sample):
    """The clipped policy loss of one agent's single sample."""
    log_probability = actor(sample["obs"]).log_softmax(-1)[sample["action"]]
    ratio = (log_probability - sample["log_probability"]).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * sample["advantage"], clipped * sample["advantage"])


def collect(agent, envs, seed):
    """Play an episode in every copy; tensors [step, copy * agent, ...]."""
    ids = torch.eye(AGENTS)
    names = envs[0].possible_agents
    seen = [env.reset(seed=seed * COPIES + i)[0] for i, env in enumerate(envs)]
    kept = {name: [] for name in ("obs", "action", "log_probability", "reward", "value")}
    for _ in range(STEPS):
        rows = [torch.as_tensor(obs[name]) for obs in seen for name in names]
        obs = torch.cat([torch.stack(rows).float(), ids.repeat(COPIES, 1)], dim=1)
        with torch.no_grad():
            policy, value = Categorical(logits=agent.actor(obs)), agent.critic(obs)[:, 0]
            action = policy.sample()
        chosen = action.view(COPIES, AGENTS).tolist()
        stepped = [
            env.step(dict(zip(names, of_copy, strict=True)))
            for env, of_copy in zip(envs, chosen, strict=True)
        ]
        seen = [step[0] for step in stepped]
        reward = torch.tensor([step[1][name] for step in stepped for name in names])
        found = (obs, action, policy.log_prob(action), reward.float(), value)
        for name, tensor in zip(kept, found, strict=True):
            kept[name].append(tensor)
    return {name: torch.stack(tensors) for name, tensors in kept.items()}


def advantages(reward, value):
    """Generalised advantage estimates; the episode ends with the last step."""
    found, last = torch.zeros_like(reward), torch.zeros_like(reward[0])
    following = torch.cat([value[1:], torch.zeros_like(value[:1])])
    for step in reversed(range(STEPS)):
        delta = reward[step] + GAMMA * following[step] - value[step]
        found[step] = last = delta + GAMMA * LAMBDA * last
    return found


def main(out, updates, every):
    torch.manual_seed(1)
    envs = [simple_spread_v3.parallel_env(N=AGENTS, max_cycles=STEPS + 1) for _ in range(COPIES)]
    inputs = envs[0].observation_space("agent_0").shape[0] + AGENTS
    agent = Agent(inputs, int(envs[0].action_space("agent_0").n))
    optimiser = torch.optim.Adam(agent.parameters(), 3e-3, eps=1e-5)
    row = torch.arange(COPIES * AGENTS).repeat(STEPS)
    probe = gradlab.Probe(agent.actor, loss, agents=AGENTS, every=every, out=out)  # 2: gradlab
    for update in range(updates):
        rollout = collect(agent, envs, update)
        advantage = advantages(rollout["reward"], rollout["value"])
        target = (advantage + rollout["value"]).flatten()
        batch = {name: rollout[name].flatten(0, 1) for name in ("obs", "action", "log_probability")}
        batch["advantage"] = ((advantage - advantage.mean()) / advantage.std()).flatten()
        probe(batch, agent=row % AGENTS, copy=row // AGENTS)  # 3: gradlab
        for _ in range(4):
            for part in torch.randperm(len(target)).chunk(4):
                sample = {name: tensor[part] for name, tensor in batch.items()}
                policy = Categorical(logits=agent.actor(sample["obs"]))
                ratio = (policy.log_prob(sample["action"]) - sample["log_probability"]).exp()
                gain = torch.minimum(
                    ratio * sample["advantage"],
                    ratio.clamp(1 - CLIP, 1 + CLIP) * sample["advantage"],
                )
                error = (agent.critic(sample["obs"])[:, 0] - target[part]).square()
                optimiser.zero_grad()
                (-gain + 0.5 * error - 0.01 * policy.entropy()).mean().backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimiser.step()
    return agent


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/cleanrl"))
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--every", type=int, default=5)
    options = parser.parse_args()
    main(options.out, options.updates, options.every)
    print(f"Run: {options.out}")
