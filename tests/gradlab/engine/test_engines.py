import functools

import pytest
import torch
from cases import DECOUPLED, SURROGATES, case
from reference import moments as reference_moments
from reference import theta_gradients
from selection import covering
from torch.nn import functional

from gradlab.engine.accumulate import gradient_moments

MASK = torch.tensor([[True] * 10, [True, False] * 5, [False] * 9 + [True]])
COPY = torch.tensor([3, 0, 0, 3, 1, 1, 1, 0, 3, 1])


def check(found, expected, copy=None):
    torch.testing.assert_close(found.sum, expected["sum"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.squared_norm, expected["squared_norm"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.count, expected["count"])
    assert not found.non_finite.any()
    if found.square is not None:
        torch.testing.assert_close(found.square, expected["square"], rtol=1e-10, atol=1e-12)
    if copy is not None:
        for ours, theirs in zip(found.copy_products(), expected["products"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@functools.cache
def with_loops(method, surrogate):
    """A case, its parameters, and its per-sample gradients by loops."""
    c = case(method, surrogate)
    return c, c.theta, theta_gradients(c.surrogate, c.theta, c.batch, c.context)


@pytest.mark.parametrize(
    ("budget", "mask"),
    [(2**20, None), (1, None), (1, MASK)],
    ids=["whole", "parts", "parts masked"],
)
@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize(("method", "surrogate"), covering(DECOUPLED, SURROGATES))
def test_engine_equals_a_loop_over_samples(method, surrogate, engine, budget, mask):
    c, theta, gradients = with_loops(method, surrogate)
    if mask is not None:
        gradients = {
            name: g * mask.view(*mask.shape, *[1] * (g.dim() - 2)) for name, g in gradients.items()
        }
    found = gradient_moments(
        c.surrogate,
        theta,
        c.batch,
        mask=mask,
        context=c.context,
        coordinates=True,
        copy=COPY,
        engine=engine,
        budget=budget,
    )
    check(found, reference_moments(gradients, found.layout.layer_of, mask, COPY), COPY)
    wanted = {"general"} if engine == "general" else {"structured"}
    assert {e for n, e in found.engines.items() if n != "log_std"} == wanted


@pytest.mark.parametrize("copy", [None, COPY], ids=["no copies", "copies"])
@pytest.mark.parametrize("budget", [1, 5000, 2**20])
@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("surrogate", ["ppo-continuous", "dpg"])
def test_missing_samples_count_for_nothing(surrogate, engine, budget, copy):
    c = case("fups-id", surrogate)
    c.batch["observation"][~MASK] = torch.nan
    gradients = theta_gradients(c.surrogate, c.theta, c.batch, c.context, MASK)
    found = gradient_moments(
        c.surrogate,
        c.theta,
        c.batch,
        context=c.context,
        mask=MASK,
        coordinates=True,
        copy=copy,
        engine=engine,
        budget=budget,
    )
    check(found, reference_moments(gradients, found.layout.layer_of, MASK, copy), copy)


@pytest.mark.parametrize("samples", [1, 2])
def test_one_sample_is_enough(samples):
    c = case("nops", "ppo-discrete", samples=samples)
    gradients = theta_gradients(c.surrogate, c.theta, c.batch)
    found = gradient_moments(c.surrogate, c.theta, c.batch)
    check(found, reference_moments(gradients, found.layout.layer_of))


def test_one_agent_is_enough():
    c = case("fups", "value")
    batch = {name: tensor[:1] for name, tensor in c.batch.items()}
    gradients = theta_gradients(c.surrogate, c.theta, batch)
    found = gradient_moments(c.surrogate, c.theta, batch, copy=COPY)
    check(found, reference_moments(gradients, found.layout.layer_of, copy=COPY), COPY)


@pytest.mark.parametrize(
    ("engine", "copies"),
    [
        ("auto", 0),
        pytest.param("general", 0, marks=pytest.mark.slow),
        ("auto", 3),
        pytest.param("general", 1, marks=pytest.mark.slow),
        pytest.param("auto", 1000, marks=pytest.mark.slow),
    ],
)
def test_float32_sums_of_a_million_samples_stay_exact(engine, copies):
    samples = 10**6
    random = torch.Generator().manual_seed(0)
    theta = {"w": torch.randn(1, 1, 4, generator=random), "b": torch.zeros(1, 1)}
    batch = {
        "x": torch.randn(1, samples, 4, generator=random),
        # a mean far from 0 is what a running float32 sum loses
        "target": torch.randn(1, samples, generator=random) + 3,
    }
    copy = torch.arange(samples) % copies if copies else None

    def loss(theta, sample):
        value = functional.linear(sample["x"], theta["w"], theta["b"]).squeeze(-1)
        return (value - sample["target"]).square()

    def moments(dtype):
        given = [{n: t.to(dtype) for n, t in tensors.items()} for tensors in (theta, batch)]
        return gradient_moments(loss, *given, copy=copy, coordinates=True, engine=engine)

    exact, found = moments(torch.float64), moments(torch.float32)
    scale = exact.square.mul(samples).sqrt()  # of a sum whose terms all have one sign
    assert ((found.sum - exact.sum).abs() / scale).max() < 3e-7  # float32's epsilon is 1.2e-7
    for name in ("squared_norm", "square"):
        ours, theirs = getattr(found, name), getattr(exact, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    if copies:
        for ours, theirs in zip(found.copy_products(), exact.copy_products(), strict=True):
            bound = 3e-6 * theirs.abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
