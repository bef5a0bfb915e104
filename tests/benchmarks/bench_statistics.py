"""What the statistics cost beside the gradient engine's passes: intervals, verdicts, coupling.

On rollouts of vmas/navigation, 128 copies, actor and critic: decompose with clusters told apart,
interference, variance and coupling, less what decompose takes without them (the engine, whose cost
is measured by itself), relative to the whole time of an update without diagnostics.
"""

import statistics
import time

from measure import write

from gradlab.decomposition import decompose
from gradlab.metrics.coupling import measure_coupling
from gradlab.metrics.interference import measure_interference
from gradlab.metrics.spaces import SideBySide
from gradlab.metrics.variance import measure_variance
from trainers.config import TrainConfig
from trainers.loop import Trainer

METHODS = ("fups", "fups-id", "nops", "hypermarl")
ROUNDS = 9


def seconds(function):
    began = time.perf_counter()
    found = function()
    return time.perf_counter() - began, found


def row(method, agents):
    config = TrainConfig(
        method=method,
        env="vmas/navigation",
        agents=agents,
        copies=128,
        diagnostics="full",
    )
    trainer = Trainer(config)
    networks = trainer.diagnosis.probe.networks
    update, share, cost = [], [], []
    for _ in range(ROUNDS):
        collecting, rollout = seconds(trainer._collect)
        batches, copy, _ = trainer.diagnosis._batches(rollout)
        spent = 0.0
        for name, network in networks.items():
            arguments = (network.generator, network.surrogate, batches[name])
            engine, _ = seconds(lambda a=arguments: decompose(*a, check=0))
            clusters, parts = seconds(lambda a=arguments, c=copy: decompose(*a, check=0, copy=c))
            others, _ = seconds(
                lambda p=parts, n=network: (
                    measure_interference(s := SideBySide({"": p})),
                    measure_variance(s),
                    measure_coupling(n.generator, p.agents),
                )
            )
            spent += clusters - engine + others
        updating, _ = seconds(lambda r=rollout: trainer._update(r.samples))
        update.append(collecting + updating)
        cost.append(spent)
        share.append(spent / update[-1])
    found = {
        "method": method,
        "agents": agents,
        "ms per update": 1e3 * statistics.median(update),
        "ms": 1e3 * statistics.median(cost),
        "share": statistics.median(share),
    }
    print(found, flush=True)
    return found


def main():
    write("statistics", [row(method, agents) for agents in (4, 16) for method in METHODS])


if __name__ == "__main__":
    main()
