"""Learners from a replay as oracles look at them: in float64, with networks that differ."""

import torch

from trainers.loop import Trainer

AGENTS, COPIES, STEPS, BATCH = 3, 4, 6, 10
CASES = {
    "continuous": {"env": "vmas/navigation", "env_args": {"max_steps": 5}},
    "numbered": {"env": "specialisation-temporal", "env_args": {"horizon": 5}},
}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SMALL = {
    "method": "fups-id",
    "agents": AGENTS,
    "copies": COPIES,
    "steps": STEPS,
    "network": {"hidden": [6, 5]},
    "hypernetwork": {"hidden": [4], "embedding_size": 3},
    "diagnostics": "off",
    "every": 2,
}


def precise_learner(config, spread=0.3):
    """A learner with two rollouts in its replay; targets are apart from their networks."""
    trainer = Trainer(config)
    for _ in range(2):
        trainer._collect()
    learner, random = trainer.learner, torch.Generator().manual_seed(1)
    for generator in (*learner.networks.values(), *learner.targets.values()):
        generator.double()
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter += spread * torch.randn(parameter.shape, generator=random)
    held = learner.replay._held
    for name, tensor in held.items():
        if tensor.is_floating_point():
            held[name] = tensor.double()
    return learner


def own(tensor, agent):
    """An agent's part of what each has of its own, or all share."""
    return tensor[agent if len(tensor) > 1 else 0]


def output(generator, agent, x):
    """What one agent's network makes of a vector, matrix by matrix."""
    theta, layers = generator.all_agents(), [*generator.mlp.layers]
    for layer in layers:
        x = own(theta[f"{layer}.weight"], agent) @ x + own(theta[f"{layer}.bias"], agent)
        x = torch.tanh(x) if layer != layers[-1] else x
    return x
