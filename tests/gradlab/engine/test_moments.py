import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import AGENTS, SAMPLES, SURROGATES, case
from hypothesis import given
from hypothesis import strategies as st
from reference import theta_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from gradlab.checks import UsageError
from gradlab.engine.accumulate import gradient_moments
from gradlab.engine.gram import sample_gram
from gradlab.engine.part import Part
from gradlab.engine.plan import gradients, plan_for
from trainers.envs.vector_env import Box
from trainers.off_policy import deterministic_actor_loss

COPY = torch.arange(SAMPLES) % 4
MASK = torch.tensor([[True] * 10, [True, False] * 5, [False] * 9 + [True]])
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


@given(
    cuts=st.sets(st.integers(1, SAMPLES - 1), max_size=4),
    shuffle=st.randoms(),
    mask=st.sampled_from([None, MASK]),
)
@pytest.mark.parametrize(
    ("surrogate", "copy"),
    [("ppo-continuous", None), ("dpg", COPY), ("q", torch.arange(SAMPLES) // 3)],
    ids=["no copies", "copies", "copies apart"],
)
def test_merged_in_any_order_equals_computed_at_once(surrogate, copy, cuts, shuffle, mask):
    c = case("fups-id", surrogate)
    edges = [0, *sorted(cuts), SAMPLES]
    parts = [moments_of(c, slice(a, b), copy=copy, mask=mask) for a, b in pairwise(edges)]
    shuffle.shuffle(parts)
    while len(parts) > 1:  # in pairs, as a tree of processes would
        parts.append(parts.pop(0).merge(parts.pop(0)))
    assert_same(parts[0], moments_of(c, copy=copy, mask=mask))


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("surrogate", ["ppo-continuous", "ppo-recurrent", "dpg"])
def test_plain_sums_equal_a_loop_even_in_parts(surrogate, mask, engine):
    c = case("fups-id", surrogate)
    z = theta_gradients(c.surrogate, c.theta, c.batch, c.context, mask)
    expected = torch.cat([rows.sum(1).flatten(1) for rows in z.values()], dim=1)
    for budget in (1, 2**20):
        found = gradient_moments(
            c.surrogate,
            c.theta,
            c.batch,
            context=c.context,
            mask=mask,
            plain=True,
            engine=engine,
            budget=budget,
        )
        torch.testing.assert_close(found.plain, expected, rtol=1e-10, atol=1e-12)


def test_what_one_part_does_not_read_is_known_from_another():
    def loss(theta, sample):
        return sum((weight * sample["x"]).square().sum() for weight in theta.values())

    def partly(theta, sample):
        return loss({"a": theta["a"]}, sample)

    theta = {"a": torch.ones(2, 3), "b": torch.ones(1, 3)}
    batch = {"x": torch.ones(2, 4, 3)}
    less, more = (gradient_moments(f, theta, batch) for f in (partly, loss))
    assert less.engines == {"a": "general", "b": "unused"}
    assert less.merge(more).engines == more.merge(less).engines == more.engines


@given(order=st.permutations(range(AGENTS)))
def test_permuting_agents_permutes_moments(order):
    c = case("nops", "ppo-discrete")
    permuted, plain = moments_of(c, agents=list(order), copy=COPY), moments_of(c, copy=COPY)
    torch.testing.assert_close(permuted.sum, plain.sum[list(order)], rtol=1e-12, atol=1e-13)
    pick = torch.tensor(order)
    for ours, theirs in zip(permuted.copy_products(), plain.copy_products(), strict=True):
        torch.testing.assert_close(ours, theirs[..., pick, :][..., pick], rtol=1e-12, atol=1e-13)


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
    assert found.first_non_finite.tolist() == [[-1] * 3, [3] * 3, [-1] * 3]
    assert found.sum[0].isfinite().all()


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("copy", [None, COPY], ids=["no copies", "copies"])
def test_the_first_sample_that_is_not_finite_is_found_layer_by_layer(copy, engine):
    def loss(theta, sample):
        first, last = (theta[n] * sample[n] for n in ("first.weight", "last.weight"))
        return first.sum() + last.sum()

    theta = {"first.weight": torch.ones(2, 3), "last.weight": torch.ones(1, 3)}
    batch = {name: torch.ones(2, SAMPLES, 3) for name in theta}
    batch["first.weight"][0, [2, 7], 1] = torch.nan
    batch["last.weight"][1, [9, 4]] = torch.inf
    for budget in (1, 100, 2**20):  # any number of parts
        found = gradient_moments(loss, theta, batch, copy=copy, engine=engine, budget=budget)
        assert found.layout.layers == ("first", "last")
        assert found.non_finite.tolist() == [[2, 0], [0, 2]]
        assert found.first_non_finite.tolist() == [[2, -1], [-1, 4]]
    fine = gradient_moments(
        loss, theta, {n: torch.ones_like(t) for n, t in batch.items()}, copy=copy, engine=engine
    )
    later = gradient_moments(
        loss, theta, {n: t.flip(1) for n, t in batch.items()}, copy=copy, engine=engine
    )
    assert later.first_non_finite.tolist() == [[2, -1], [-1, 0]]
    for first, second, expected in (
        (found, later, [[2, -1], [-1, 4]]),
        (later, found, [[2, -1], [-1, 0]]),
        (fine, found, [[2, -1], [-1, 4]]),
    ):
        assert first.merge(second).first_non_finite.tolist() == expected
    exists = torch.ones(2, SAMPLES, dtype=torch.bool)
    exists[0, [2, 7]] = False
    found = gradient_moments(loss, theta, batch, copy=copy, engine=engine, mask=exists)
    assert found.non_finite.tolist() == [[0, 0], [0, 2]]


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("surrogate", ["ppo-continuous", "q", "dpg"])
def test_sample_gram_equals_a_loop(surrogate, mask, engine):
    c = case("nops", surrogate)
    chosen = torch.tensor([7, 0, 3])
    gram = sample_gram(
        c.surrogate, c.theta, c.batch, chosen, mask=mask, context=c.context, engine=engine
    )
    by_name = theta_gradients(c.surrogate, c.theta, c.batch, c.context, mask)
    layers = {name: name.rpartition(".")[0] or name for name in by_name}
    assert set(gram.products) == {"all", *layers.values()}
    for layer, found in gram.products.items():
        members = [g for name, g in by_name.items() if layer in ("all", layers[name])]
        flat = torch.cat([g[:, chosen].flatten(0, 1).flatten(1) for g in members], 1)
        torch.testing.assert_close(found, flat @ flat.mT, rtol=1e-10, atol=1e-12)
    assert gram.agent.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert gram.sample.tolist() == [7, 0, 3] * 3


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


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_pass_waits_for_no_value(surrogate, engine, mask):
    c = case("hypermarl", surrogate)
    part = Part(batch=c.batch, context=c.context, mask=mask)
    theta = c.theta
    plan = plan_for(c.surrogate, theta, part, engine)
    with Transfers() as transfers:
        gradients(c.surrogate, theta, part, plan)
    assert transfers.seen == []


@pytest.mark.parametrize("copy", [None, COPY], ids=["no copies", "copies"])
def test_more_parts_wait_for_no_more_values(copy):
    c = case("nops", "q")
    moments_of(c)
    waits = []
    for budget in (2**20, 1):
        with Transfers() as transfers:
            gradient_moments(c.surrogate, c.theta, c.batch, copy=copy, budget=budget)
        waits.append(transfers.seen)
    assert waits[0] == waits[1]


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_pass_stays_on_the_device_of_what_it_is_given(surrogate, engine):
    # A device whose tensors hold no values: to read one, or to mix in one of another device, fails.
    c = case("nops", surrogate)
    if surrogate == "dpg":
        box = Box(low=-torch.ones(2).to("meta"), high=torch.ones(2).to("meta"))
        c.surrogate = deterministic_actor_loss(c.networks[0], c.networks[1], box)
    theta, batch, context = (
        {name: t.to("meta") for name, t in tensors.items()}
        for tensors in (c.theta, c.batch, c.context)
    )
    part = Part(batch=batch, context=context, mask=MASK.to("meta"))
    plan = plan_for(c.surrogate, theta, part, engine)
    found = gradients(c.surrogate, theta, part, plan).per_sample
    for name, gradient in found.items():
        total = gradient.sum()
        assert total.device.type == "meta"
        assert total.shape == (AGENTS, *theta[name].shape[1:])
        assert gradient.squared_norms().shape == (AGENTS, SAMPLES)


WORKER = """
import sys
from itertools import pairwise
sys.path[:0] = sys.argv[1].split(":")
import torch
from torch import distributed
from cases import SAMPLES, case
from test_moments import COPY, MASK, assert_same, moments_of

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
own = slice(0, 6) if rank == 0 else slice(6, SAMPLES)
apart = torch.arange(SAMPLES) // 3  # copies that only one process has
for method, surrogate, copy, mask in (
    ("fups", "value", None, None),
    ("hypermarl", "ppo-continuous", COPY, MASK),
    ("nops", "dpg", apart, None),
):
    c = case(method, surrogate)
    ours = moments_of(c, own, copy=copy, mask=mask).all_reduce()
    assert_same(ours, moments_of(c, copy=copy, mask=mask))

# so many samples in one process that it keeps sums of copies in float64, and few in the other
c = case("fups", "value", dtype=torch.float32, samples=5010)
c.batch["target"][0, 5007] = torch.nan
own = slice(0, 5000) if rank == 0 else slice(5000, 5010)
copy = torch.arange(5010) * 0
ours = moments_of(c, own, copy=copy).all_reduce()
assert ours.non_finite[0].tolist() == [1] * 3, ours.non_finite
assert ours.first_non_finite[0].tolist() == [7] * 3, ours.first_non_finite
whole = moments_of(c, copy=copy)
assert torch.equal(ours.count, whole.count)
torch.testing.assert_close(ours.sum[1:], whole.sum[1:], rtol=1e-5, atol=1e-2)
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
