"""What a hypernetwork's trained parameters add: g_i of all agents and their Gram matrix.

Against the structured engine in theta-space plus one vector-Jacobian product through the generator
for each agent; in float32, one thread.
"""

import torch
from bench_engine import NETS, case
from measure import peak_extra, ratios, write
from torch.func import functional_call

from gradlab.decomposition import decompose
from gradlab.engine.accumulate import gradient_moments
from trainers.config import SharingConfig
from trainers.envs.vector_env import Discrete
from trainers.generators import METHODS
from trainers.policies import make_policy


def row(net, sizes, agents, samples):
    random = torch.Generator().manual_seed(0)
    policy = make_policy(sizes[0], Discrete(n=sizes[-1]), hidden=sizes[1:-1], activation="tanh")
    generator = METHODS["hypermarl"](policy.network, agents, random, SharingConfig())
    loss, _, batch = case(sizes, agents, samples)
    theta = {name: t.detach() for name, t in generator.all_agents().items()}
    psi = {name: p.detach().requires_grad_() for name, p in generator.named_parameters()}

    def reference():
        moments = gradient_moments(loss, theta, batch)
        z = moments.layout.unflatten(moments.mean.float())
        for agent in range(agents):
            own = functional_call(generator, psi, (torch.tensor([agent]),))
            product = sum((own[name][0] * z[name][agent]).sum() for name in own)
            torch.autograd.grad(product, list(psi.values()))

    def decomposed():
        decompose(generator, loss, batch, check=0).gram_psi()

    found = ratios({"reference": reference, "decompose": decomposed}, 7, "reference")
    memory = {"gradient": peak_extra(reference), "decompose": peak_extra(decomposed)}
    size = sum(p.numel() for p in psi.values())
    print(net, f"N={agents} S={samples}", f"{found['decompose']['ratio']:.2f}x", memory, flush=True)
    return {
        "net": net,
        "agents": agents,
        "samples": samples,
        "psi": size,
        "times": found,
        "MiB": memory,
    }


def main():
    torch.set_num_threads(1)
    write(
        "psi",
        [
            row(net, sizes, agents, samples)
            for net, sizes in NETS.items()
            for agents in (4, 16)
            for samples in (2048, 8192)
        ],
    )


if __name__ == "__main__":
    main()
