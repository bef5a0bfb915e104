import numpy as np
import pytest
import torch
import xarray as xr
from cases import AGENTS, DECOUPLED, case
from torch import nn

from gradlab.decomposition import decompose
from gradlab.probe import Network, NetworkProbe
from gradlab.quantity import dataset


def probe_of(method, level, *, dtype=torch.float32):
    c = case(method, "ppo-continuous", dtype=dtype)
    return NetworkProbe({"actor": Network(generator=c.generator, surrogate=c.surrogate)}, level), c


@pytest.mark.parametrize("level", ["light", "full"])
@pytest.mark.parametrize("method", [*DECOUPLED, "hypermarl-coupled"])
def test_probe_records_what_decompose_says(method, level):
    probe, c = probe_of(method, level)
    found = probe.diagnose({"actor": c.batch})
    d = decompose(c.generator, c.surrogate, c.batch)
    gram = sum(d.gram_psi().values())
    norms = gram.diagonal().sqrt()
    np.testing.assert_allclose(found["norm"].values[0, 0, 0], norms, rtol=1e-4)
    assert found["residual"].values[0] < 1e-12
    assert (found["factorisation_gap"].values[0] > 1e-3) == (method == "hypermarl-coupled")
    assert found["samples"].values.tolist() == [[c.batch["advantage"].shape[1]] * AGENTS]
    assert ("variance_within" in found) == (level == "full")
    assert set(probe.engines["actor"]) == set(d.theta_layout.shapes)
    assert probe.findings == []


def labelled(found):
    return dataset({n: q for n, q in found.items() if not n.startswith("embedding")})


@pytest.mark.parametrize(
    ("level", "methods"),
    [
        ("light", ("hypermarl", "fups-id")),
        ("full", ("hypermarl", "fups-id")),
        ("full", ("nops", "hypermarl-coupled")),
    ],
)
def test_networks_side_by_side_are_as_each_alone(level, methods):
    cases = {
        "actor": case(methods[0], "ppo-continuous"),
        "critic": case(methods[1], "value"),
    }
    networks = {
        name: Network(generator=c.generator, surrogate=c.surrogate) for name, c in cases.items()
    }
    batches = {name: c.batch for name, c in cases.items()}
    copy = torch.arange(10)
    together = labelled(NetworkProbe(networks, level).diagnose(batches, copy))
    assert together.network.values.tolist() == ["actor", "critic"]
    for name, network in networks.items():
        alone = labelled(NetworkProbe({name: network}, level).diagnose({name: batches[name]}, copy))
        lacking = [layer for layer in together.layer.values if layer not in alone.layer.values]
        for quantity, expected in alone.items():
            found = together[quantity].sel(network=name)
            if "layer" in found.dims:
                assert np.isnan(found.sel(layer=lacking)).all()
                found = found.sel(layer=alone.layer)
            xr.testing.assert_allclose(found, expected.sel(network=name), rtol=1e-10, atol=1e-12)


def test_probe_leaves_no_trace():
    probe, c = probe_of("hypermarl", "full")
    before = {name: p.detach().clone() for name, p in c.generator.named_parameters()}
    state = torch.random.get_rng_state()
    probe.diagnose({"actor": c.batch})
    assert torch.equal(state, torch.random.get_rng_state())
    for name, parameter in c.generator.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_probe_sees_the_present_parameters():
    probe, c = probe_of("nops", "light")
    first = probe.diagnose({"actor": c.batch})["norm"].values
    with torch.no_grad():
        for parameter in c.generator.parameters():
            parameter.mul_(2)
    assert not np.allclose(first, probe.diagnose({"actor": c.batch})["norm"].values)


@pytest.mark.parametrize("level", ["light", "full"])
def test_probe_names_what_is_not_finite(level):
    probe, c = probe_of("fups-id", level)
    c.batch["advantage"][1, 4:6] = torch.nan
    found = probe.diagnose({"actor": c.batch})
    assert np.nanmax(found["non_finite"].values) == 2
    assert (
        "actor, agent 1, layer head: the gradient is not finite in 2 of 10 samples, first in "
        "sample 4, whose advantage is not finite."
    ) in probe.findings
    assert all("agent 1" in sentence for sentence in probe.findings)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, agents):  # noqa: ARG002
        return {"w": self.w[None]}


@pytest.mark.parametrize("check", [0, 1, 3, None])
def test_residual_is_of_as_many_samples_as_asked(check):
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    d = decompose(Shared(), lambda theta, s: (theta["w"] * s["x"]).sum(), {"x": x}, check=check)
    torch.testing.assert_close(d.total, x[0].mean(0))
    assert np.isnan(d.residual) if check == 0 else d.residual < 1e-6
