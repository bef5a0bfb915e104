import numpy as np
import pytest
import torch
from cases import AGENTS, DECOUPLED, case
from test_jacobian import dense

from gradlab.checks import UsageError
from gradlab.metrics.coupling import coupling
from trainers.config import HypernetworkConfig
from trainers.generators import METHODS
from trainers.networks import MLP


def traces(generator, parameters=None):
    """Normalised traces by theta layer from the dense Jacobian, of some psi parameters or all."""
    matrix = dense(generator)
    columns = torch.cat([
        torch.full((p.numel(),), parameters is None or n in parameters)
        for n, p in generator.named_parameters()
    ])
    matrix = matrix * columns
    theta = generator(torch.arange(AGENTS))
    layers = [n.partition(".")[0] for n, t in theta.items() for _ in range(t[0].numel())]
    found = {}
    for layer in ["all", *dict.fromkeys(layers)]:
        rows = torch.tensor([layer in ("all", own) for own in layers])
        products = torch.einsum("irp,krp->ik", matrix[:, rows], matrix[:, rows])
        own = products.diagonal().sqrt()
        found[layer] = products / own[:, None] / own[None]
    return found


@pytest.mark.parametrize("surrogate", ["q", "ppo-continuous"])
@pytest.mark.parametrize("method", DECOUPLED)
def test_coupling_equals_the_dense_jacobian_within_its_error(method, surrogate):
    generator = case(method, surrogate).generator
    found = coupling(generator, AGENTS, probes=20)
    for layer, expected in traces(generator).items():
        value, error = found.coupling.sel(layer=layer), found.coupling_error.sel(layer=layer)
        assert (np.abs(value - expected.numpy()) <= 4 * error + 1e-10).all()
        if method != "hypermarl":
            assert (error == 0).all()


@pytest.mark.parametrize("method", DECOUPLED)
def test_closed_form_of_the_heads_equals_the_dense_jacobian(method):
    generator = case(method, "ppo-continuous").generator
    found = coupling(generator, AGENTS, probes=2).coupling_head
    for layer, expected in traces(generator, generator.head_parameters()).items():
        np.testing.assert_allclose(found.sel(layer=layer), expected, rtol=1e-10)


@pytest.mark.parametrize("method", DECOUPLED)
def test_closed_form_and_probes_agree(method):
    generator = case(method, "ppo-continuous").generator
    known = coupling(generator, AGENTS, probes=20)
    probed = coupling(_Without(generator), AGENTS, probes=20)
    error = np.hypot(known.coupling_error, probed.coupling_error)
    assert (np.abs(known.coupling - probed.coupling) <= 4 * error + 1e-10).all()
    assert np.isnan(probed.coupling_head).all()


class _Without(torch.nn.Module):
    """A generator that knows no closed form."""

    def __init__(self, generator):
        super().__init__()
        self.inner = generator

    def forward(self, agents):
        return self.inner(agents)


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
    with pytest.raises(UsageError, match=r"`probes` must be at least 2\. Got probes=1"):
        coupling(case("fups", "q").generator, AGENTS, probes=1)
