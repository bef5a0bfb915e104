from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from cases import AGENTS, CONFIG, DECOUPLED, case
from selection import slow_but
from test_jacobian import dense

from gradlab.checks import UsageError
from gradlab.metrics.coupling import coupling
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.config import HypernetworkConfig, SharingConfig
from trainers.generators import METHODS
from trainers.generators.dico import DiCo
from trainers.generators.hypernetwork import HyperNetwork
from trainers.generators.seps import SePS
from trainers.networks import MLP, make_network

FORMS = {
    **{method: (method, {}) for method in DECOUPLED},
    "two hidden layers": ("hypermarl", {"hidden": (6, 5)}),
    "deep, one-hot": ("hypermarl", {"embedding": "one-hot", "hidden": (6, 5)}),
    "deep, without bias": ("hypermarl", {"bias": False, "hidden": (6,)}),
    "linear, learned": ("hypermarl-linear", {"embedding": "learned", "embedding_size": 2}),
    "linear, without bias": ("hypermarl-linear", {"embedding": "learned", "bias": False}),
    "shared trunk": ("hypermarl", {"shared_trunk": True, "hidden": (6,)}),
    "deep shared trunk": ("hypermarl", {"shared_trunk": True, "hidden": (6, 5, 4)}),
    "shared trunk, one-hot": (
        "hypermarl",
        {"shared_trunk": True, "embedding": "one-hot", "hidden": (6, 5), "bias": False},
    ),
    "linear, shared trunk": (
        "hypermarl-linear",
        {"shared_trunk": True, "embedding": "learned", "embedding_size": 2},
    ),
    "linear, orthogonal": ("hypermarl-linear", {"embedding": "orthogonal", "embedding_size": 4}),
    "linear, equiangular": ("hypermarl-linear", {"embedding": "equiangular", "cosine": 0.3}),
    "random": ("hypermarl", {"embedding": "random", "embedding_size": 2, "hidden": (6,)}),
    "fups, own log_std": ("fups", {}),
    "fups-id, own log_std": ("fups-id", {}),
    "nops, shared log_std": ("nops", {}),
    "adapters, own log_std": ("adapters", {}),
    "dico, own log_std": ("dico", {}),
    "ensemble": ("kaleidoscope", {}),
    "seps, own log_std": ("seps", {}),
    "hypermarl, own log_std": ("hypermarl", {"hidden": (6,)}),
    **{f"{method}, recurrent": (method, {"hidden": (6,)}) for method in DECOUPLED},
    "shared trunk, recurrent": ("hypermarl", {"shared_trunk": True, "hidden": (6,)}),
}
OWN_LOG_STD = {form: "own" in form for form in FORMS if "log_std" in form}
MEASURES = ("coupling", "coupling_frobenius")


def make(form, log_std=2, dtype=torch.float64):
    """A small generator away from its initial point, where biases are 0."""
    method, settings = FORMS[form]
    random = torch.Generator().manual_seed(2)
    recurrent = form.endswith("recurrent")
    mlp = make_network(
        3,
        2,
        hidden=(4,),
        activation="tanh",
        memory_size=2 if recurrent else None,
        head_gain=1.0,
        log_std_size=log_std,
    )
    config = CONFIG.model_copy(update={"hypernetwork": HypernetworkConfig(**settings)})
    scheme = METHODS[method]
    if form == "ensemble":
        scheme, mlp = scheme.ensemble, replace(mlp, log_std_size=0)
    generator = scheme(mlp, AGENTS, random, config, OWN_LOG_STD.get(form))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)
        if isinstance(generator, DiCo):
            generator.ratio.fill_(0.7)
        if isinstance(generator, SePS):
            generator.group.copy_(torch.tensor([0, 1, 0]))
    return generator.to(dtype)


class Without(torch.nn.Module):
    """A generator that knows no closed form."""

    def __init__(self, generator):
        super().__init__()
        self.inner = generator

    def forward(self, agents):
        return self.inner(agents)


class Linear(torch.nn.Module):
    """theta_i = A_i psi, so that K_ik = A_i A_k^T."""

    def __init__(self, matrices):
        super().__init__()
        self.register_buffer("matrices", matrices)
        self.psi = torch.nn.Parameter(torch.zeros(matrices.shape[2]).to(matrices))

    def forward(self, agents):
        return {"w": self.matrices[agents] @ self.psi}


def columns(generator, parameters=None):
    """Which of psi's coordinates belong to some parameters, by default all."""
    return torch.cat([
        torch.full((p.numel(),), parameters is None or n in parameters)
        for n, p in generator.named_parameters()
        if p.requires_grad
    ])


def rows(generator, by):
    """Which part of the policy each of theta's coordinates belongs to."""
    theta = generator(torch.arange(AGENTS))
    names = [n for n, t in theta.items() for _ in range(t[0].numel())]
    return [n.partition(".")[0] for n in names] if by == "layer" else names


def matrices(generator, parameters=None):
    """K_ik for all pairs of agents, formed."""
    matrix = dense(generator) * columns(generator, parameters)
    return torch.einsum("irp,ksp->ikrs", matrix, matrix)


def expected_coupling(generator, by="layer", parameters=None):
    """Normalised traces and Frobenius norms of every part, from K itself."""
    whole, names = matrices(generator, parameters), rows(generator, by)
    found = {}
    for part in ["all", *dict.fromkeys(names)]:
        own = [part in ("all", name) for name in names]
        block = whole[:, :, own][:, :, :, own]
        found[part] = [np.empty((AGENTS, AGENTS)) for _ in MEASURES]
        for i in range(AGENTS):
            for k in range(AGENTS):
                for values, size in zip(found[part], (torch.trace, torch.norm), strict=True):
                    scale = (size(block[i, i]) * size(block[k, k])).sqrt()
                    values[i, k] = size(block[i, k]) / scale
    return found


def assert_exact(found, expected, by="layer"):
    assert list(found[by].values) == list(expected)
    assert found.coupling_exact.all()
    for part, both in expected.items():
        here = found.sel({by: part})
        for measure, values in zip(MEASURES, both, strict=True):
            np.testing.assert_allclose(here[measure], values, rtol=1e-10, atol=1e-12)
            np.testing.assert_array_equal(here[f"{measure}_error"], 0 * values)


def assert_within_error(found, expected, by="layer"):
    assert list(found[by].values) == list(expected)
    assert not found.coupling_exact.any()
    for part, both in expected.items():
        here = found.sel({by: part})
        for measure, values in zip(MEASURES, both, strict=True):
            difference = np.abs(here[measure].to_numpy() - values)
            far = difference > 4 * here[f"{measure}_error"].to_numpy() + 1e-10
            assert not far.any(), (part, measure)
            np.testing.assert_array_equal(np.isnan(difference), np.isnan(values))


@pytest.mark.parametrize("by", ["layer", "parameter"])
@pytest.mark.parametrize("form", FORMS)
def test_closed_form_equals_the_dense_coupling(form, by):
    generator = make(form)
    assert_exact(coupling(generator, AGENTS, by=by), expected_coupling(generator, by), by)


@pytest.mark.parametrize("surrogate", ["q", "ppo-continuous"])
@pytest.mark.parametrize("method", DECOUPLED)
def test_closed_form_equals_the_dense_coupling_for_trained_networks(method, surrogate):
    generator = case(method, surrogate).generator
    assert_exact(coupling(generator, AGENTS), expected_coupling(generator))


@pytest.mark.parametrize("form", FORMS)
def test_forms_equal_the_dense_blocks(form):
    generator = make(form)
    forms, whole, names = generator.coupling_forms(), matrices(generator), rows(generator, "name")
    assert forms.names == tuple(dict.fromkeys(names))
    for p, one in enumerate(forms.names):
        for q, other in enumerate(forms.names):
            block = whole[:, :, [n == one for n in names]][:, :, :, [n == other for n in names]]
            squared = block.square().sum((2, 3))
            torch.testing.assert_close(forms.squared[p, q], squared, rtol=1e-10, atol=1e-10)
            if p == q:
                trace = block.diagonal(dim1=2, dim2=3).sum(2)
                torch.testing.assert_close(forms.trace[p], trace, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_coupling_head_is_that_of_the_heads_alone(form):
    generator = make(form)
    heads = {
        n
        for n, _ in generator.named_parameters()
        if not isinstance(generator, HyperNetwork)
        or ".head." in n
        or n == "log_std"
        or n.startswith("memory.")
    }
    found = coupling(generator, AGENTS).coupling_head
    for layer, (trace, _) in expected_coupling(generator, parameters=heads).items():
        np.testing.assert_allclose(found.sel(layer=layer), trace, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_what_is_frozen_is_not_counted(form, seed):
    generator = make(form)
    random = torch.Generator().manual_seed(seed)
    trained = {n for n, _ in generator.named_parameters() if torch.rand((), generator=random) < 0.6}
    expected = expected_coupling(generator, parameters=trained)
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name in trained)
    assert_exact(coupling(generator, AGENTS), expected)


def test_a_part_that_nothing_trained_makes_has_no_coupling():
    generator = make("fups")
    generator.theta["log_std"].requires_grad_(False)
    for some in (generator, Without(generator)):
        found = coupling(some, AGENTS)
        for measure in MEASURES:
            assert np.isnan(found[measure].sel(layer="log_std")).all()
            np.testing.assert_allclose(found[measure].sel(layer=["all", "head"]), 1)


@pytest.mark.parametrize("by", ["layer", pytest.param("parameter", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", slow_but(FORMS, *(f for f in FORMS if "seps" not in f)))
def test_probes_agree_with_the_dense_coupling_within_their_error(form, by):
    generator = Without(make(form))
    found = coupling(generator, AGENTS, by=by, probes=24)
    assert_within_error(found, expected_coupling(generator, by), by)
    assert np.isnan(found.coupling_head).all()
    norm = found.coupling_frobenius.to_numpy()  # K_ki is the transpose of K_ik
    np.testing.assert_allclose(norm, norm.swapaxes(1, 2), rtol=1e-12)


@pytest.mark.parametrize("form", ["hypermarl", "linear, learned"])
def test_probes_converge_to_the_closed_form(form):
    generator = make(form)
    known = coupling(generator, AGENTS).sel(layer="all")
    off = ~np.eye(AGENTS, dtype=bool)
    for measure in MEASURES:
        error = []
        for probes in (8, 512):
            runs = [
                coupling(
                    Without(generator),
                    AGENTS,
                    probes=probes,
                    random=torch.Generator().manual_seed(seed),
                ).sel(layer="all")
                for seed in range(4)
            ]
            differences = [(run[measure] - known[measure]).to_numpy()[off] for run in runs]
            error.append(np.sqrt(np.mean(np.square(differences))))
        # 64 times the probes, an eighth of the error
        assert error[1] < error[0] / 3
        assert error[1] < 0.01


@pytest.mark.parametrize("measure", MEASURES)
def test_error_is_that_of_the_estimate(measure):
    generator = make("linear, learned")
    pair = {"layer": "all", "agent": 0, "agent_other": 1}
    expected = float(coupling(generator, AGENTS)[measure].sel(pair))
    runs = [
        coupling(
            Without(generator), AGENTS, probes=40, random=torch.Generator().manual_seed(seed)
        ).sel(pair)
        for seed in range(30)
    ]
    values = np.array([run[measure] for run in runs])
    stated = np.mean([run[f"{measure}_error"] for run in runs])
    assert 0.7 < values.std(ddof=1) / stated < 1.4
    assert abs(values.mean() - expected) < 4 * stated / np.sqrt(len(runs))


def test_coupling_of_known_matrices():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 6, generator=random, dtype=torch.float64)
    left, right = (torch.eye(6, dtype=torch.float64)[rows] for rows in ([0, 1, 2, 3], [4, 5, 4, 5]))
    agents = torch.stack([a, 3 * a, -a, b, left, right])
    found = coupling(Linear(agents), len(agents), probes=2000).sel(layer="all")
    trace, norm = found.coupling.to_numpy(), found.coupling_frobenius.to_numpy()
    for i, k, sign in ((0, 0, 1), (0, 1, 1), (0, 2, -1), (1, 2, -1)):  # identical, opposite
        np.testing.assert_allclose((trace[i, k], norm[i, k]), (sign, 1), rtol=1e-12)
    assert trace[4, 5] == norm[4, 5] == 0  # orthogonal
    products = [[one @ other.mT for other in agents] for one in agents]
    for i, k in ((0, 3), (3, 4), (3, 5)):
        own = [products[j][j] for j in (i, k)]
        expected = (
            products[i][k].trace() / (own[0].trace() * own[1].trace()).sqrt(),
            products[i][k].norm() / (own[0].norm() * own[1].norm()).sqrt(),
        )
        np.testing.assert_allclose((trace[i, k], norm[i, k]), expected, atol=0.03)


@pytest.mark.parametrize("form", DECOUPLED)
@pytest.mark.parametrize("budget", [0, 4000])
def test_the_budget_changes_nothing(form, budget):
    generator = Without(make(form))
    wide, narrow = (coupling(generator, AGENTS, probes=5, budget=b) for b in (2**30, budget))
    # what is known without doubt has an error of rounding alone
    xr.testing.assert_allclose(wide, narrow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_some_of_the_agents(form):
    generator = make(form)
    every, two = coupling(generator, AGENTS), coupling(generator, 2)
    xr.testing.assert_allclose(two, every.isel(agent=slice(2), agent_other=slice(2)))
    alone = coupling(generator, 1)
    for measure in MEASURES:
        np.testing.assert_allclose(alone[measure], 1)


@pytest.mark.parametrize("of", [make, lambda form: Without(make(form))], ids=["closed", "probes"])
def test_coupling_leaves_no_trace(of):
    generator = of("hypermarl")
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


def test_closed_form_of_float32_is_taken_in_float64():
    generator = make("hypermarl", dtype=torch.float32)
    single = coupling(generator, AGENTS)
    assert_exact(single, expected_coupling(generator.double()))


def test_probes_in_float32():
    generator = Without(make("hypermarl"))
    double, single = coupling(generator, AGENTS), coupling(generator.float(), AGENTS)
    for measure in MEASURES:
        np.testing.assert_allclose(single[measure], double[measure], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("fups", {}, 1),
        ("nops", {}, 0),
        ("hypermarl-linear", {"embedding": "one-hot"}, 0.5),
        ("hypermarl-linear", {"embedding": "one-hot", "bias": False}, 0),
        ("hypermarl-linear", {"embedding": "orthogonal"}, 0.5),
        ("hypermarl-linear", {"embedding": "orthogonal", "bias": False}, 0),
        ("hypermarl-linear", {"embedding": "equiangular", "cosine": 0.25}, 0.625),
    ],
)
def test_golden_values(method, settings, expected):
    mlp = MLP(sizes=(3, 4, 2), activation="tanh", head_gain=1.0)
    config = SharingConfig(hypernetwork=settings)
    generator = METHODS[method](mlp, 4, torch.Generator().manual_seed(0), config)
    off = ~np.eye(4, dtype=bool)
    for some in (generator, Without(generator)):  # probes know a multiple of the identity exactly
        found = coupling(some, 4)
        for measure in MEASURES:
            kappa = found[measure].to_numpy()
            np.testing.assert_allclose(kappa[:, off], expected, atol=1e-6)
            np.testing.assert_allclose(kappa[:, ~off], 1)


def test_golden_values_of_ids():
    mlp = MLP(sizes=(3, 4, 2), activation="tanh", head_gain=1.0, log_std_size=2)
    for method in ("fups-id", "fups-id-nostate"):
        generator = METHODS[method](mlp, 4, torch.Generator(), SharingConfig(), True)
        found = coupling(generator, 4, by="parameter").coupling.sel(agent=0, agent_other=1)
        values = dict(zip(found["parameter"].values.tolist(), found.values, strict=True))
        withheld = values.pop("layer0.weight")
        assert np.isnan(withheld) if "nostate" in method else withheld == 1
        assert values.pop("layer0.bias") == pytest.approx(0.5)
        assert values.pop("log_std") == 0
        values.pop("all")
        assert set(values.values()) == {1}


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
    ones = {"other": torch.ones(AGENTS, AGENTS, dtype=torch.float64)}
    generator.coupling_forms = lambda: CouplingForms.multiples_of_identity({"other": 2}, ones)
    with pytest.raises(UsageError, match=r"`coupling_forms` must name the policy .*'other'"):
        coupling(generator, AGENTS)
