import numpy as np
import pytest
import torch
import xarray as xr
from cases import AGENTS, DECOUPLED, case
from test_jacobian import dense

from gradlab.checks import UsageError
from gradlab.metrics.coupling import coupling
from trainers.config import HypernetworkConfig
from trainers.generators import METHODS
from trainers.networks import MLP

PARTS = [(method, surrogate) for method in DECOUPLED for surrogate in ("q", "ppo-continuous")]


def traces(generator, by="layer", parameters=None):
    """Traces by part of theta from the dense Jacobian, of some psi parameters or all."""
    matrix = dense(generator)
    columns = torch.cat([
        torch.full((p.numel(),), parameters is None or n in parameters)
        for n, p in generator.named_parameters()
        if p.requires_grad
    ])
    matrix = matrix * columns
    theta = generator(torch.arange(AGENTS))
    names = [n for n, t in theta.items() for _ in range(t[0].numel())]
    if by == "layer":
        names = [name.partition(".")[0] for name in names]
    found = {}
    for part in ["all", *dict.fromkeys(names)]:
        rows = torch.tensor([part in ("all", own) for own in names])
        found[part] = torch.einsum("irp,krp->ik", matrix[:, rows], matrix[:, rows])
    return found


def normalised(products):
    own = products.diagonal().sqrt()
    return (products / own[:, None] / own[None]).numpy()


def assert_within_error(found, expected, by="layer"):
    assert list(found[by].values) == list(expected)
    for part, products in expected.items():
        here = found.sel({by: part})
        difference = np.abs(here.coupling - normalised(products))
        assert (difference <= 4 * here.coupling_error + 1e-10).all(), part


class Without(torch.nn.Module):
    """A generator that knows no closed form."""

    def __init__(self, generator):
        super().__init__()
        self.inner = generator

    def forward(self, agents):
        return self.inner(agents)


@pytest.mark.parametrize("by", ["layer", "parameter"])
@pytest.mark.parametrize(("method", "surrogate"), PARTS)
def test_coupling_equals_the_dense_jacobian_within_its_error(method, surrogate, by):
    generator = case(method, surrogate).generator
    found = coupling(generator, AGENTS, by=by, probes=20)
    assert_within_error(found, traces(generator, by), by)


@pytest.mark.parametrize("method", DECOUPLED)
def test_what_is_exact_has_no_error(method):
    found = coupling(case(method, "ppo-continuous").generator, AGENTS)
    # of a deep hypernetwork only the log standard deviations have no trunk
    expected = found.layer == "log_std" if method == "hypermarl" else found.layer != ""
    np.testing.assert_array_equal(found.coupling_exact, expected)
    np.testing.assert_array_equal(
        (found.coupling_error == 0).all(["agent", "agent_other"]), expected
    )


@pytest.mark.parametrize("method", DECOUPLED)
def test_closed_form_of_the_heads_equals_the_dense_jacobian(method):
    generator = case(method, "ppo-continuous").generator
    closed, heads = generator.coupling_traces(), generator.head_parameters()
    by_parameter = traces(generator, "parameter", heads)
    assert list(closed) == list(by_parameter)[1:]
    for name, products in closed.items():
        torch.testing.assert_close(products, by_parameter[name], rtol=1e-10, atol=1e-10)
    found = coupling(generator, AGENTS, probes=2).coupling_head
    for layer, products in traces(generator, "layer", heads).items():
        np.testing.assert_allclose(found.sel(layer=layer), normalised(products), rtol=1e-10)


@pytest.mark.parametrize("method", DECOUPLED)
def test_closed_form_of_the_heads_agrees_with_probes(method):
    generator = case(method, "ppo-continuous").generator
    heads = generator.head_parameters()
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name in heads)
    known, probed = (coupling(g, AGENTS) for g in (generator, Without(generator)))
    assert known.coupling_exact.all()
    assert not probed.coupling_exact.any()
    assert np.isnan(probed.coupling_head).all()
    np.testing.assert_allclose(known.coupling, known.coupling_head)
    difference = np.abs(known.coupling - probed.coupling)
    assert (difference <= 4 * probed.coupling_error + 1e-10).all()


@pytest.mark.parametrize("method", DECOUPLED)
@pytest.mark.parametrize("budget", [0, 2000])
def test_the_budget_changes_nothing(method, budget):
    for generator in (case(method, "q").generator, Without(case(method, "q").generator)):
        wide, narrow = (coupling(generator, AGENTS, probes=3, budget=b) for b in (2**30, budget))
        xr.testing.assert_allclose(wide, narrow, rtol=1e-10)


def test_error_is_that_of_the_estimate():
    generator = Without(case("hypermarl", "q").generator)
    expected = normalised(traces(generator)["all"])
    runs = [
        coupling(generator, AGENTS, random=torch.Generator().manual_seed(seed)).sel(layer="all")
        for seed in range(30)
    ]
    pair = {"agent": 0, "agent_other": 1}
    values = np.array([run.coupling.sel(pair) for run in runs])
    stated = np.mean([run.coupling_error.sel(pair) for run in runs])
    assert 0.7 < values.std(ddof=1) / stated < 1.4
    assert abs(values.mean() - expected[0, 1]) < 4 * stated / np.sqrt(len(runs))


def test_a_frozen_head_is_not_counted():
    generator = case("fups-id", "q").generator
    generator.id_columns.requires_grad_(False)
    found = coupling(generator, AGENTS)
    np.testing.assert_allclose(found.coupling, 1)
    np.testing.assert_array_equal(found.coupling_exact, [False, False, True, True])
    assert np.isnan(found.coupling_head.sel(layer=["all", "layer0"])).all()

    generator = case("hypermarl", "q").generator
    generator.parts["layer1/weight"]["head"].requires_grad_(False)
    assert_within_error(coupling(generator, AGENTS, probes=20), traces(generator))


def test_some_of_the_agents():
    generator = case("hypermarl-linear", "q").generator
    every, two = coupling(generator, AGENTS), coupling(generator, 2)
    xr.testing.assert_allclose(two, every.isel(agent=slice(2), agent_other=slice(2)))


def test_coupling_leaves_no_trace():
    generator = case("hypermarl", "q").generator
    before = {n: t.clone() for n, t in generator.state_dict().items()}
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first = coupling(generator, AGENTS, random=torch.Generator().manual_seed(3))
    xr.testing.assert_identical(
        first, coupling(generator, AGENTS, random=torch.Generator().manual_seed(3))
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in generator.parameters())
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_coupling_in_float32():
    generator = case("hypermarl", "q").generator
    double, single = coupling(generator, AGENTS), coupling(generator.float(), AGENTS)
    np.testing.assert_allclose(single.coupling, double.coupling, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("fups", {}, 1),
        ("nops", {}, 0),
        ("hypermarl-linear", {"embedding": "one-hot"}, 0.5),
        ("hypermarl-linear", {"embedding": "one-hot", "bias": False}, 0),
    ],
)
def test_golden_values(method, settings, expected):
    mlp = MLP(sizes=(3, 4, 2), activation="tanh", head_gain=1.0)
    config = HypernetworkConfig.model_validate(settings)
    generator = METHODS[method](mlp, 4, torch.Generator().manual_seed(0), config)
    kappa = coupling(generator, 4).coupling.to_numpy()
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(kappa[:, off], expected, atol=1e-12)
    np.testing.assert_allclose(kappa[:, ~off], 1)


def test_bad_input_is_named():
    generator = case("fups", "q").generator
    with pytest.raises(UsageError, match=r"`probes` must be at least 2\. Got probes=1"):
        coupling(generator, AGENTS, probes=1)
    with pytest.raises(UsageError, match=r"`agents` must be at least 1\. Got agents=0"):
        coupling(generator, 0)
    with pytest.raises(UsageError, match=r"`agents` must be at most 3, .*\. Got agents=4"):
        coupling(generator, 4)
    with pytest.raises(UsageError, match="`generator` must not read the observation"):
        coupling(case("hypermarl-coupled", "q").generator, AGENTS)
    generator.coupling_traces = lambda: {"other": torch.eye(AGENTS)}
    with pytest.raises(UsageError, match=r"`coupling_traces` must name policy parameters .*other"):
        coupling(generator, AGENTS)
