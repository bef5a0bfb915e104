"""What several processes decompose together is what each would alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradlab.engine.processes import Group, Shared

WORKER = """
import sys
sys.path[:0] = sys.argv[1].split(":")
import torch
from cases import AGENTS, SAMPLES, case
from test_moments import COPY, MASK, SUMS

import gradlab.engine.accumulate as accumulate
from gradlab.decomposition import decompose
from trainers.processes import joined

torch.set_num_threads(1)
APART = torch.arange(SAMPLES) // 3  # neighbouring samples are of one copy
CASES = [
    ("fups", "value", {}),
    ("fups", "ppo-continuous", {"copy": COPY, "coordinates": True}),
    ("fups-id", "ppo-discrete", {"copy": COPY, "mask": MASK, "coordinates": True}),
    ("nops", "dpg", {"copy": APART}),
    ("nops", "q", {"mask": MASK}),
    ("hypermarl", "ppo-continuous", {"copy": COPY, "mask": MASK}),
    ("hypermarl", "ppo-continuous", {"copy": APART, "budget": 1}),
    ("hypermarl", "ppo-discrete", {"copy": APART, "engine": "general"}),
    ("hypermarl-linear", "ppo-recurrent", {"copy": torch.arange(SAMPLES)}),
    ("adapters", "ppo-continuous", {"copy": APART}),
    ("kaleidoscope", "value-clipped", {"copy": COPY}),
    ("hypermarl-coupled", "ppo-continuous", {"copy": COPY, "mask": MASK}),
    ("hypermarl", "ppo-continuous", {"copy": torch.arange(SAMPLES) // 5}),  # two, of which no share
]


def close(found, expected, what):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-10, atol=1e-11, equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


with joined() as group:
    assert group.size == 3
    taken = []
    count, gradients = 0, accumulate.gradients

    def counted(surrogate, theta, part, *rest, **settings):
        taken.append(part.sizes[1])
        return gradients(surrogate, theta, part, *rest, **settings)

    accumulate.gradients = counted
    for formed in (accumulate._FORMED, 0):  # 0: sums by cluster are kept as factors
        accumulate._FORMED = formed
        for method, surrogate, settings in CASES:
            c = case(method, surrogate)
            settings = {"context": c.context, **settings}
            what = f"{method}, {surrogate}, {settings.keys()}"
            taken.clear()
            alone = decompose(c.generator, c.surrogate, c.batch, **settings)
            of_one = sum(taken)
            taken.clear()
            together = decompose(c.generator, c.surrogate, c.batch, group=group, **settings)
            labels = settings.get("copy")
            split = method != "hypermarl-coupled" and (labels is None or len(labels.unique()) > 2)
            # also when the first samples are taken as well, for the residual
            assert (sum(taken) < of_one) == split, (what, taken, of_one)
            for name in SUMS:
                ours, theirs = getattr(together.moments, name), getattr(alone.moments, name)
                if theirs is not None:
                    close(ours, theirs, f"{what}, {name}")
            assert together.moments.engines == alone.moments.engines
            close(together.g, alone.g, f"{what}, g")
            close(together.total, alone.total, f"{what}, total")
            assert together.residual < 1e-10, together.residual
            close(together.factorisation_gap, alone.factorisation_gap, f"{what}, gap")
            assert together.products.keys() == alone.products.keys()
            assert together.copies == alone.copies
            for space, expected in alone.products.items():
                found = together.products[space]
                assert found.layers == expected.layers
                for name in ("count", "within", "across", "following"):
                    close(getattr(found, name), getattr(expected, name), f"{what}, {name}")
            if labels is not None:
                assert torch.equal(together.moments.copies, alone.moments.copies)
                assert torch.equal(together.moments.copy_count, alone.moments.copy_count)

    # Of the processes the first that has a sample with NaN is not the one that has the first.
    c = case("nops", "value")
    c.batch["target"][1, 4] = c.batch["target"][1, 9] = torch.nan
    for copy in (None, 2 - torch.arange(SAMPLES) % 3):
        together = decompose(c.generator, c.surrogate, c.batch, copy=copy, check=0, group=group)
        assert (together.moments.non_finite[1] == 2).all(), together.moments.non_finite
        assert (together.moments.first_non_finite[1] == 4).all()
        assert (together.moments.first_non_finite[[0, 2]] == -1).all()
    print("same")
"""


@pytest.mark.slow
def test_processes_decompose_together_what_each_would_alone(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "3", str(script), f"{here}:{here.parents[1]}"]
    settings = {"capture_output": True, "text": True, "timeout": 170, "cwd": here.parents[2]}
    done = subprocess.run(command, check=False, **settings)
    assert done.stdout.count("same") == 3, done.stdout + done.stderr


class One(Group):
    """One of several processes, which are not there."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("cluster", [None, torch.arange(24) % 7])
def test_every_sample_is_of_one_process_and_no_cluster_of_two(size, cluster):
    shares = [Shared.of(One(rank, size), 24, cluster).samples for rank in range(size)]
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(24))
    assert all(len(share) for share in shares)
    if cluster is not None:
        of_each = [set(cluster[share].tolist()) for share in shares]
        assert [number for own in of_each for number in sorted(own)] == list(range(7))


def test_nothing_is_shared_out_where_there_is_not_something_for_each():
    assert Shared.of(None, 24, None) is None
    assert Shared.of(One(0, 1), 24, None) is None
    assert Shared.of(One(0, 3), 24, torch.arange(24) // 12) is None
    assert isinstance(Shared.of(One(0, 2), 24, torch.arange(24) // 12).samples, Tensor)
