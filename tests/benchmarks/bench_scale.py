"""How the engine's time grows: with samples (streamed, up to 10^6 an agent) and with agents."""

import torch
from bench_engine import NETS, case
from measure import peak_extra, side_by_side, write

from gradlab.engine.accumulate import gradient_moments


def row(agents, samples, rounds):
    loss, theta, batch = case(NETS["18-64-64-5"], agents, samples)

    def moments():
        gradient_moments(loss, theta, batch)

    seconds = side_by_side({"moments": moments}, rounds)["moments"]
    found = {
        "agents": agents,
        "samples": samples,
        "ms": 1e3 * seconds,
        "ns per sample": 1e9 * seconds / (agents * samples),
        "MiB": peak_extra(moments),
    }
    print(found, flush=True)
    return found


def main():
    torch.set_num_threads(1)
    rows = [row(4, samples, 3) for samples in (4_096, 16_384, 65_536, 262_144, 1_000_000)]
    rows += [row(agents, 8192, 3) for agents in (2, 4, 8, 16, 32, 64)]
    write("scale", rows)


if __name__ == "__main__":
    main()
