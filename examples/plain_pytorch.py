"""A shared policy trained by plain PyTorch, with gradlab watching: two agents that want opposites.

Every agent reads the same observation. Agent 0 and 1 are paid for the action that its sign says,
agent 2 for the other one. Run it, then `gradlab conflict runs/plain-pytorch`.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import gradlab

AGENTS, COPIES, STEPS = 3, 32, 8
WANTS = torch.tensor([1.0, 1.0, -1.0])  # of each agent


def loss(policy, sample):
    """The loss of one agent's single sample: no agent axis, no sample axis."""
    log_probability = policy(sample["obs"]).log_softmax(-1)[sample["action"]]
    return -sample["advantage"] * log_probability


def collect(policy):
    """Play: tensors [agent, sample, ...]."""
    obs = torch.randn(COPIES * STEPS, 4).expand(AGENTS, -1, -1)
    with torch.no_grad():
        action = torch.distributions.Categorical(logits=policy(obs)).sample()
    reward = WANTS[:, None] * obs[..., 0].sign() * (2 * action - 1)
    return {"obs": obs, "action": action, "advantage": reward - reward.mean()}


def main(out, updates):
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    optimiser = torch.optim.Adam(policy.parameters(), 1e-2)
    copy = torch.arange(COPIES).repeat(STEPS)  # the environment copy of each sample
    with gradlab.Probe(policy, loss, agents=AGENTS, every=5, out=out) as probe:
        for _ in range(updates):
            batch = collect(policy)
            probe(batch, copy=copy)
            log_probability = policy(batch["obs"]).log_softmax(-1)
            chosen = log_probability.gather(-1, batch["action"][..., None])[..., 0]
            optimiser.zero_grad()
            (-batch["advantage"] * chosen).mean().backward()
            optimiser.step()
    return probe.path


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/plain-pytorch"))
    parser.add_argument("--updates", type=int, default=50)
    options = parser.parse_args()
    print(f"Run: {main(options.out, options.updates)}")
