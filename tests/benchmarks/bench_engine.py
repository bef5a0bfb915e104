"""The gradient engine against one ordinary gradient evaluation of the same batch, and peers.

Everything of one row runs in turn in one process, in float32: the discrete PPO loss with its
entropy bonus, agents that share one network (FuPS).
"""

import sys
import warnings
from itertools import pairwise

import torch
from measure import peak_extra, ratios, write
from torch import nn
from torch.func import grad, vmap

from gradlab.cluster_products import pooled
from gradlab.engine.accumulate import gradient_moments
from trainers.config import PPOConfig
from trainers.envs.vector_env import Discrete
from trainers.policies import make_policy
from trainers.ppo import policy_loss

NETS = {"18-64-64-5": (18, 64, 64, 5), "60-256-256-10": (60, 256, 256, 10)}
STEPS = 32  # of every copy; a batch of S samples an agent is from S / 32 copies
MATERIALISED = 3 * 2**30  # bytes of per-sample gradients that vmap(grad) may form


def case(sizes, agents, samples):
    random = torch.Generator().manual_seed(0)
    policy = make_policy(sizes[0], Discrete(n=sizes[-1]), hidden=sizes[1:-1], activation="tanh")
    theta = {
        f"{layer}.{kind}": torch.randn(1, *shape, generator=random) / shape[-1] ** 0.5
        for layer, (out, into) in policy.network.layers.items()
        for kind, shape in (("weight", (out, into)), ("bias", (out,)))
    }
    observation = torch.randn(agents, samples, sizes[0], generator=random)
    with torch.no_grad():
        action, log_prob = policy.sample(theta, observation, random)
    batch = {
        "observation": observation,
        "action": action,
        "log_prob": log_prob,
        "advantage": torch.randn(agents, samples, generator=random),
    }
    return policy_loss(policy, PPOConfig()), theta, batch


def functions(sizes, agents, samples):
    loss, theta, batch = case(sizes, agents, samples)
    leaves = {name: t.clone().requires_grad_() for name, t in theta.items()}
    cluster = pooled(torch.arange(samples) // STEPS)

    def gradient():
        torch.autograd.grad(loss(leaves, batch).sum(), list(leaves.values()))

    def moments():
        gradient_moments(loss, theta, batch)

    def by_cluster():
        gradient_moments(loss, theta, batch, copy=cluster).copy_products()

    def materialised():
        own = {name: t[0] for name, t in theta.items()}
        rows = vmap(vmap(grad(loss), in_dims=(None, 0)), in_dims=(None, 0))(own, batch)
        for gradient in rows.values():
            gradient.mean(1)
            gradient.flatten(2).square().sum(2)

    size = 4 * agents * samples * sum(t.numel() for t in theta.values())
    return {
        "gradient": gradient,
        "moments": moments,
        "by cluster": by_cluster,
        "opacus ghost norms": opacus(theta, batch),
        "backpack BatchL2": backpack_norms(theta, batch),
    } | ({"vmap(grad)": materialised} if size <= MATERIALISED else {})


def module(theta):
    layers = []
    names = list(dict.fromkeys(name.partition(".")[0] for name in theta))
    for position, name in enumerate(names):
        weight = theta[f"{name}.weight"][0]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(theta[f"{name}.bias"][0])
        layers += [linear] if position == len(names) - 1 else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def opacus(theta, batch):
    """Ghost norms: every sample's gradient norm, nothing more, one pass for all agents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        net = GradSampleModuleFastGradientClipping(
            module(theta), loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
        )
    x = batch["observation"].flatten(0, 1)
    y = batch["action"].flatten()

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.functional.cross_entropy(net(x), y, reduction="sum").backward()
            net.get_norm_sample()
            net.zero_grad()

    return run


def backpack_norms(theta, batch):
    """BatchL2: every sample's squared gradient norm by parameter, one pass for all agents."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    net, criterion = extend(module(theta)), extend(nn.CrossEntropyLoss(reduction="sum"))
    x = batch["observation"].flatten(0, 1)
    y = batch["action"].flatten()

    def run():
        with warnings.catch_warnings(), backpack(BatchL2Grad()):
            warnings.simplefilter("ignore")
            criterion(net(x), y).backward()
        net.zero_grad()

    return run


def main():
    quick = "--quick" in sys.argv
    rows = []
    for threads in (1,) if quick else (1, 2):
        torch.set_num_threads(threads)
        for net, sizes in NETS.items():
            for samples in (2048,) if quick else (2048, 8192, 65536):
                for agents in (4, 16):
                    work = agents * samples * sum(a * b for a, b in pairwise(sizes))
                    rounds = 3 if quick else max(2, min(25, int(4e10 / work)))
                    measured = functions(sizes, agents, samples)
                    general = measured.pop("vmap(grad)", None)
                    found = ratios(measured, rounds, "gradient")
                    if general:
                        pair = {"gradient": measured["gradient"], "vmap(grad)": general}
                        found |= {"vmap(grad)": ratios(pair, 1, "gradient")["vmap(grad)"]}
                    memory = {
                        name: peak_extra(measured[name])
                        for name in ("gradient", "moments", "by cluster")
                    }
                    row = {
                        "threads": threads,
                        "net": net,
                        "agents": agents,
                        "samples": samples,
                        "times": found,
                        "MiB": memory,
                    }
                    rows.append(row)
                    print(
                        threads,
                        net,
                        f"N={agents} S={samples}",
                        f"{found['gradient']['ms']:.0f} ms",
                        *(f"{n} {v['ratio']:.2f}x" for n, v in found.items() if n != "gradient"),
                        *(f"{n} {v:.0f} MiB" for n, v in memory.items()),
                        flush=True,
                    )
    if not quick:
        write("engine", rows)


if __name__ == "__main__":
    main()
