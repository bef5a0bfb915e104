"""How trainings grow with agents and environment copies, and what grouping samples by agent saves."""

import statistics
import time

import torch
from measure import peak_extra, side_by_side, write

from trainers.config import TrainConfig
from trainers.loop import Trainer

STEPS = 32
AGENTS = (2, 4, 8, 16, 30, 64)
COPIES = (32, 128, 512, 2048, 4096)
METHODS = ("fups", "nops", "hypermarl")


def trainer_of(method, agents, copies):
    return Trainer(
        TrainConfig(
            method=method,
            env="vmas/dispersion",
            agents=agents,
            copies=copies,
            steps=STEPS,
            frames=copies * STEPS * 1000,
            diagnostics="off",
        )
    )


def cpu_seconds(trainer):
    """Of one rollout, and of the update on it."""
    began = time.process_time()
    rollout = trainer._collect()
    middle = time.process_time()
    trainer._update(rollout.samples)
    return middle - began, time.process_time() - middle


def growth(agents, copies):
    """All methods in turn at one size."""
    trainers = {method: trainer_of(method, agents, copies) for method in METHODS}
    times = {method: [] for method in METHODS}
    frames = copies * STEPS
    rounds = 2 if agents * frames > 200_000 else 5
    for _ in range(1 + rounds):
        for method, trainer in trainers.items():
            times[method].append(cpu_seconds(trainer))
    rows = []
    for method, found in times.items():
        collection, training = (
            1e6 * statistics.median(parts) / frames for parts in zip(*found[1:], strict=True)
        )
        ratios = [sum(t) / sum(base) for t, base in zip(found[1:], times["fups"][1:], strict=True)]
        of_updates = [t[1] / base[1] for t, base in zip(found[1:], times["fups"][1:], strict=True)]
        row = {
            "method": method,
            "agents": agents,
            "copies": copies,
            "us per frame": {"collection": collection, "training": training},
            "of fups": {
                "total": statistics.median(ratios),
                "training": statistics.median(of_updates),
            },
            "MiB": peak_extra(lambda t=trainers[method]: cpu_seconds(t)),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def all_on_all(network, theta, x):
    """Every agent's network on every sample, then each sample's own: as the official code does."""
    agents, samples, size = x.shape
    everything = x.reshape(1, agents * samples, size).expand(agents, -1, -1)
    outputs = network.forward(theta, everything).unflatten(1, (agents, samples))
    own = torch.arange(agents)
    return outputs[own, own]


def grouping(agents, samples=1024):
    """Forward and backward of the policies of all agents, grouped and all on all."""
    trainer = trainer_of("hypermarl", agents, 2)
    network = trainer.policy.network
    theta = {n: t.detach().requires_grad_() for n, t in trainer.actor.all_agents().items()}
    x = torch.randn(agents, samples, trainer.spec.observation_size)
    read = {n: t for n, t in theta.items() if n != "log_std"}

    def gradient(forward):
        torch.autograd.grad(forward(network, theta, x).square().sum(), list(read.values()))

    with torch.no_grad():
        difference = all_on_all(network, theta, x) - network.forward(theta, x)
    assert difference.abs().max() < 1e-5
    times = side_by_side(
        {
            "grouped": lambda: gradient(lambda n, t, x: n.forward(t, x)),
            "all on all": lambda: gradient(all_on_all),
        },
        rounds=5,
    )
    row = {"agents": agents, "samples": samples, "seconds": times}
    print(row, flush=True)
    return row


def compiled(rows=4096):
    """Both losses of a chunk, forward and backward, as they are and through torch.compile."""
    trainer = trainer_of("fups", 4, 64)
    samples = trainer._collect().samples
    samples = {name: tensor[:, : rows // 4] for name, tensor in samples.items()}
    actor, critic = (
        {n: t.detach().requires_grad_() for n, t in g.all_agents().items()}
        for g in (trainer.actor, trainer.critic)
    )

    def losses(actor, critic, samples):
        return (
            trainer.learner.policy_loss(actor, samples).mean()
            + trainer.learner.value_loss(critic, samples).mean()
        )

    def step(function):
        leaves = [*actor.values(), *critic.values()]
        torch.autograd.grad(function(actor, critic, samples), leaves)

    faster = torch.compile(losses)
    began = time.perf_counter()
    step(faster)
    took = time.perf_counter() - began
    times = side_by_side({"eager": lambda: step(losses), "compiled": lambda: step(faster)}, 30)
    row = {"rows": rows, "seconds": times, "seconds to compile": took}
    print(row, flush=True)
    return row


KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "activations": ("sigmoid", "sigmoid_", "tanh_backward", "mul_", "sub_"),
    "choosing samples": ("index_select", "randperm", "index"),
    "Adam and clipping": ("_fused_adam_", "linalg_vector_norm", "_foreach_mul_", "_foreach_norm"),
}


def profiled():
    """Where an update's time goes, and how long its matrix products take by themselves."""
    trainer = trainer_of("fups", 4, 400)
    samples = trainer._collect().samples
    trainer._update(samples)
    began = time.process_time()
    trainer._update(samples)
    took = time.process_time() - began
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer._update(samples)
    spent = {e.key.removeprefix("aten::"): e.self_cpu_time_total for e in profile.key_averages()}
    whole = sum(spent.values())
    shares = {
        kind: sum(spent.get(name, 0.0) for name in names) / whole for kind, names in KINDS.items()
    }
    chunk = 4096
    rows = 4 * 400 * STEPS * trainer.config.ppo.epochs
    shapes = [
        shape
        for generator in (trainer.actor, trainer.critic)
        for shape in generator.mlp.layers.values()
    ]
    products = []
    for number, (outputs, inputs) in enumerate(shapes):
        x, w = torch.randn(chunk, inputs), torch.randn(outputs, inputs)
        d, y = torch.randn(chunk, outputs), torch.empty(chunk, outputs)
        products.append((x, w, d, y, torch.empty_like(w), torch.empty_like(x), number % 3 > 0))

    def bare():
        for x, w, d, y, of_weight, of_input, not_first in products:
            torch.mm(x, w.T, out=y)
            torch.mm(d.T, x, out=of_weight)
            if not_first:
                torch.mm(d, w, out=of_input)

    bare()
    began = time.process_time()
    for _ in range(100):
        bare()
    floor = (time.process_time() - began) / 100 * rows / chunk
    row = {"seconds": took, "shares": shares, "matrix products alone": floor, "rows": rows}
    print(row, flush=True)
    return row


def main():
    torch.set_num_threads(1)
    rows = {"agents": [], "copies": []}
    for agents in AGENTS:
        rows["agents"] += growth(agents, 64)
    for copies in COPIES:
        rows["copies"] += growth(4, copies)
    rows["grouping"] = [grouping(agents) for agents in (2, 4, 8, 16, 20, 30)]
    rows["compile"] = [compiled()]
    rows["profile"] = [profiled()]
    write("growth", rows)


if __name__ == "__main__":
    main()
