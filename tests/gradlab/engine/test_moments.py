import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import AGENTS, SAMPLES, case
from hypothesis import given
from hypothesis import strategies as st
from reference import theta_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from gradlab.checks import UsageError
from gradlab.engine.accumulate import gradient_moments
from gradlab.engine.gram import sample_gram
from gradlab.engine.part import Part
from gradlab.engine.plan import gradients, plan_for

COPY = torch.arange(SAMPLES) % 4
SUMS = ("count", "sum", "squared_norm", "non_finite", "square")


def moments_of(c, samples=slice(None), *, copy=None, mask=None, agents=slice(None)):
    return gradient_moments(
        c.surrogate,
        {name: t if len(t) == 1 else t[agents] for name, t in c.theta.items()},
        {name: t[agents, samples] for name, t in c.batch.items()},
        context={name: t[agents] for name, t in c.context.items()},
        mask=None if mask is None else mask[agents, samples],
        copy=None if copy is None else copy[samples],
        coordinates=True,
    )


def assert_same(found, expected, rtol=1e-12):
    for name in SUMS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    assert (found.copies is None) == (expected.copies is None)
    if found.copies is not None:
        assert torch.equal(found.copies, expected.copies)
        assert torch.equal(found.copy_count, expected.copy_count)
        for ours, theirs in zip(found.copy_products(), expected.copy_products(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-11)


@given(cuts=st.sets(st.integers(1, SAMPLES - 1)), shuffle=st.randoms())
@pytest.mark.parametrize("surrogate", ["ppo-continuous", "dpg"])
@pytest.mark.parametrize("copies", [False, True])
def test_merged_in_any_order_equals_computed_at_once(surrogate, copies, cuts, shuffle):
    c = case("hypermarl", surrogate)
    copy = COPY if copies else None
    edges = [0, *sorted(cuts), SAMPLES]
    parts = [moments_of(c, slice(a, b), copy=copy) for a, b in pairwise(edges)]
    shuffle.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert_same(merged, moments_of(c, copy=copy))


@given(order=st.permutations(range(AGENTS)))
def test_permuting_agents_permutes_moments(order):
    c = case("nops", "ppo-discrete")
    permuted, plain = moments_of(c, agents=list(order), copy=COPY), moments_of(c, copy=COPY)
    torch.testing.assert_close(permuted.sum, plain.sum[list(order)], rtol=1e-12, atol=1e-13)
    within, across = plain.copy_products()
    ours = permuted.copy_products()
    pick = torch.tensor(order)
    torch.testing.assert_close(ours[0], within[..., pick, :][..., pick], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours[1], across[..., pick, :][..., pick], rtol=1e-12, atol=1e-13)


@given(scale=st.floats(-1e3, 1e3, allow_subnormal=False))
def test_scaling_the_loss_scales_the_moments(scale):
    c = case("fups", "value")
    plain, original = moments_of(c), c.surrogate
    c.surrogate = lambda theta, sample: scale * original(theta, sample)
    scaled = moments_of(c)
    torch.testing.assert_close(scaled.sum, scale * plain.sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        scaled.squared_norm, scale**2 * plain.squared_norm, rtol=1e-12, atol=1e-12
    )


@given(absent=st.sets(st.integers(0, AGENTS - 1), min_size=1))
def test_an_agent_without_samples_has_moments_zero(absent):
    c = case("fups-id", "ppo-discrete")
    mask = torch.ones(AGENTS, SAMPLES, dtype=torch.bool)
    mask[list(absent)] = False
    found = moments_of(c, mask=mask, copy=COPY)
    plain = moments_of(c, copy=COPY)
    for agent in range(AGENTS):
        expected = 0 * plain.sum[agent] if agent in absent else plain.sum[agent]
        torch.testing.assert_close(found.sum[agent], expected, rtol=1e-12, atol=1e-13)
    assert found.count.tolist() == [0 if a in absent else SAMPLES for a in range(AGENTS)]
    assert found.mean.isfinite().all()


def test_zero_gradients_are_zero():
    c = case("hypermarl-linear", "pg-discrete")
    c.batch["advantage"] *= 0
    c.surrogate = case("fups", "pg-discrete").surrogate
    original = c.surrogate
    c.surrogate = lambda theta, sample: 0 * original(theta, sample)
    found = moments_of(c, copy=COPY)
    assert not found.sum.any()
    assert not found.squared_norm.any()
    assert not found.copy_products()[0].any()


def test_non_finite_gradients_are_counted_where_they_are():
    c = case("nops", "ppo-discrete")
    c.batch["advantage"][1, 3] = torch.inf
    found = moments_of(c)
    assert found.non_finite.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert found.sum[0].isfinite().all()


@pytest.mark.parametrize("surrogate", ["ppo-continuous", "q"])
def test_sample_gram_equals_a_loop(surrogate):
    c = case("nops", surrogate)
    chosen = torch.tensor([7, 0, 3])
    gram = sample_gram(c.surrogate, c.theta, c.batch, chosen)
    gradients_ = theta_gradients(c.surrogate, c.theta, c.batch)
    flat = torch.cat([g[:, chosen].flatten(0, 1).flatten(1) for g in gradients_.values()], 1)
    torch.testing.assert_close(gram.products["all"], flat @ flat.mT, rtol=1e-10, atol=1e-12)
    head = torch.cat(
        [g[:, chosen].flatten(0, 1).flatten(1) for n, g in gradients_.items() if "head" in n], 1
    )
    torch.testing.assert_close(gram.products["head"], head @ head.mT, rtol=1e-10, atol=1e-12)
    assert gram.agent.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert gram.sample.tolist() == [7, 0, 3] * 3


def test_sample_gram_refuses_numbers_out_of_range():
    c = case("nops", "q")
    with pytest.raises(UsageError, match=r"`samples` must be numbers from 0 to 9.*Got .*\[10\]"):
        sample_gram(c.surrogate, c.theta, c.batch, torch.tensor([10]))


def test_moments_of_other_parameters_do_not_merge():
    ours, theirs = moments_of(case("nops", "q")), moments_of(case("nops", "value"))
    with pytest.raises(UsageError, match="`other` must hold moments of the same parameters"):
        ours.merge(theirs)
    with pytest.raises(UsageError, match="`other` must have `copies` if and only if"):
        ours.merge(moments_of(case("nops", "q"), copy=COPY))
    with pytest.raises(UsageError, match="Give gradient_moments the argument `copy`"):
        ours.copy_products()


class Transfers(TorchDispatchMode):
    """Records what would make a processor wait for a value, or move one between devices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero"}:
            self.seen.append(name)
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_the_pass_waits_for_no_value(engine):
    c = case("hypermarl", "ppo-continuous")
    part = Part(batch=c.batch)
    plan = plan_for(c.surrogate, c.theta, part, engine)
    theta = c.theta
    with Transfers() as transfers:
        gradients(c.surrogate, theta, part, plan)
    assert transfers.seen == []


WORKER = """
import sys
from itertools import pairwise
sys.path[:0] = sys.argv[1].split(":")
import torch
from torch import distributed
from cases import SAMPLES, case
from test_moments import COPY, assert_same, moments_of

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
for method, surrogate, copy in (("fups", "value", None), ("hypermarl", "ppo-continuous", COPY)):
    c = case(method, surrogate)
    own = slice(0, 6) if rank == 0 else slice(6, SAMPLES)
    assert_same(moments_of(c, own, copy=copy).all_reduce(), moments_of(c, copy=copy))
distributed.destroy_process_group()
print("same")
"""


def test_all_reduce_over_processes_gives_the_single_process_numbers(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    here = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            f"{here}:{here.parents[1]}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=here.parents[2],
        check=False,
    )
    assert done.stdout.count("same") == 2, done.stdout + done.stderr
