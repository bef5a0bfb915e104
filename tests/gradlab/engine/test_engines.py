import pytest
import torch
from cases import DECOUPLED, SURROGATES, case
from reference import moments as reference_moments
from reference import theta_gradients

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
        within, across = found.copy_products()
        torch.testing.assert_close(within, expected["within"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(across, expected["across"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 2**20], ids=["parts", "whole"])
@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("method", DECOUPLED)
def test_engine_equals_a_loop_over_samples(method, surrogate, engine, budget):
    c = case(method, surrogate)
    gradients = theta_gradients(c.surrogate, c.theta, c.batch, c.context)
    found = gradient_moments(
        c.surrogate,
        c.theta,
        c.batch,
        context=c.context,
        coordinates=True,
        copy=COPY,
        engine=engine,
        budget=budget,
    )
    check(found, reference_moments(gradients, found.layout.layer_of, copy=COPY), COPY)
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


def test_float32_sums_of_many_samples_stay_exact():
    samples = 10**6 // 4
    c = case("fups", "value", dtype=torch.float32, samples=samples)
    c.batch["target"] += 3  # a mean far from 0 is what a running float32 sum loses
    exact = gradient_moments(
        c.surrogate,
        {name: t.double() for name, t in c.theta.items()},
        {name: t.double() for name, t in c.batch.items()},
    )
    found = gradient_moments(c.surrogate, c.theta, c.batch)
    scale = exact.squared_norm.sum(1).div(samples).sqrt().mul(samples)[:, None]
    assert ((found.sum - exact.sum).abs() / scale).max() < 3e-7  # float32's epsilon is 1.2e-7
    torch.testing.assert_close(found.squared_norm, exact.squared_norm, rtol=1e-6, atol=0)
