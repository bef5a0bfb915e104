import copy

import numpy as np
import pytest
import torch
from cases import AGENTS, DECOUPLED, case
from scipy.spatial.distance import pdist
from selection import covering
from torch.func import functional_call

from gradlab.effects import Behaviour, measure_effects
from gradlab.metrics.diversity import diversity
from gradlab.metrics.geometry import geometry
from gradlab.preconditioner import adam_preconditioner
from gradlab.probe import Network, NetworkProbe
from gradlab.quantity import Quantity

SAMPLES, COPIES = 36, 9
COPY = torch.arange(SAMPLES) % COPIES
TRANSFERENCE = ("transference", "transference_predicted", "transference_agreement")
FIRST, SECOND = np.triu_indices(AGENTS, k=1)


class Setting:
    """Two networks of one scheme, what their agents do, and what a diagnosis would have found."""

    def __init__(self, method="hypermarl", *, dtype=torch.float32):
        self.cases = {
            name: case(method, surrogate, dtype=dtype, samples=SAMPLES, seed=seed)
            for name, surrogate, seed in (("actor", "ppo-discrete", 1), ("critic", "value", 2))
        }
        self.generators = {name: c.generator for name, c in self.cases.items()}
        networks = {
            n: Network(generator=c.generator, surrogate=c.surrogate) for n, c in self.cases.items()
        }
        self.probe = NetworkProbe(networks, "full")
        self.batches = {name: c.batch for name, c in self.cases.items()}
        random = torch.Generator().manual_seed(3)
        self.logits = torch.randn(AGENTS, 40, 4, generator=random, dtype=torch.float64)
        self.behaviour = Behaviour(policies={"logits": self.logits}, copy=torch.arange(40) % 10)
        self.diagnosed = {"cosine": self.cosines(0)}

    def cosines(self, seed):
        values = np.random.default_rng(seed).uniform(-1, 1, size=(2, 2, 2, AGENTS, AGENTS))
        labels = {"network": ["actor", "critic"], "space": ["theta", "psi"], "layer": ["x", "all"]}
        agents = {"agent": range(AGENTS), "agent_other": range(AGENTS)}
        coords = labels | agents
        return Quantity(values=values + values.mT, dims=tuple(coords), coords=coords)

    def optimiser(self, steps=1):
        parameters = [p for g in self.generators.values() for p in g.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=1e-3)
        for number in range(steps):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, number + 1.0).cumsum(0)
            optimiser.step()
            optimiser.zero_grad()
        return optimiser

    def measure(self, copies=COPY, optimiser=None):
        return measure_effects(
            self.probe,
            self.batches,
            copies,
            behaviour=self.behaviour,
            diagnosed=self.diagnosed,
            optimiser=optimiser,
        )


def losses(c, generator, psi, samples):
    """Each agent's mean loss on some samples, by a loop."""
    found = []
    for agent in range(AGENTS):
        theta = functional_call(generator, psi, (torch.tensor([agent]),))
        theta = {name: tensor[0] for name, tensor in theta.items()}
        values = []
        for s in samples:
            sample = {name: t[agent, s] for name, t in c.batch.items()}
            sample = {n: t.double() if t.is_floating_point() else t for n, t in sample.items()}
            values.append(c.surrogate(theta, sample))
        found.append(torch.stack(values).mean())
    return torch.stack(found)


def transference_by_hand(c, generator, weights):
    """Steps from every other copy, losses of the rest."""
    psi = {n: p.detach().clone().requires_grad_() for n, p in generator.named_parameters()}
    norm = torch.cat([p.detach().flatten() for p in psi.values()]).norm()
    ours, held_out = ([s for s in range(SAMPLES) if s % COPIES % 2 == half] for half in (0, 1))
    before = losses(c, generator, psi, held_out).detach()
    changes = []
    for loss in losses(c, generator, psi, ours):
        g = torch.autograd.grad(loss, list(psi.values()), materialize_grads=True, retain_graph=True)
        steps = [weights[n] * part for n, part in zip(psi, g, strict=True)]
        scale = 1e-3 * norm / torch.cat([step.flatten() for step in steps]).norm()
        moved = {n: psi[n] - scale * step for n, step in zip(psi, steps, strict=True)}
        changes.append((losses(c, generator, moved, held_out) - before).detach())
    return torch.stack(changes)


@pytest.mark.parametrize(("method", "preconditioned"), covering(DECOUPLED, [False, True]))
def test_transference_is_of_halves_by_copy_in_float64(method, preconditioned):
    setting = Setting(method)
    optimiser = setting.optimiser(3)
    found, findings = setting.measure(optimiser=optimiser if preconditioned else None)
    assert findings == []
    assert found["transference"].dims == ("network", "agent", "agent_other")
    assert ("preconditioned" in found["transference"].estimator) == preconditioned
    for number, (name, c) in enumerate(setting.cases.items()):
        generator = setting.probe.precise(name)
        weights = dict.fromkeys(dict(generator.named_parameters()), torch.tensor(1.0))
        if preconditioned:
            weights = adam_preconditioner(optimiser, c.generator)
        expected = transference_by_hand(c, generator, weights)
        np.testing.assert_allclose(
            found["transference"].values[number], expected, rtol=1e-10, atol=1e-13
        )
    off = ~np.eye(AGENTS, dtype=bool)
    alone = [not matrix[off].any() for matrix in found["transference"].values]
    assert alone == [method == "nops"] * 2


def test_there_is_no_transference_before_the_optimiser_has_taken_a_step():
    setting = Setting()
    found, findings = setting.measure(optimiser=setting.optimiser(0))
    assert not set(TRANSFERENCE) & set(found)
    assert "embedding_distance" in found
    assert findings == []


def test_behaviour_is_that_of_the_given_policies():
    setting = Setting()
    found, _ = setting.measure()
    expected = diversity(logits=setting.logits, copy=setting.behaviour.copy)
    for name in expected.data_vars:
        np.testing.assert_array_equal(found[name].values, expected[name])
    assert found["snd_low"].values < found["snd"].values < found["snd_high"].values


@pytest.mark.parametrize("debiased", [False, True])
def test_embeddings_are_compared_with_behaviour_and_with_cosines_of_g(debiased):
    setting = Setting()
    if debiased:
        setting.diagnosed["cosine_debiased"] = setting.cosines(1)
    found, _ = setting.measure()
    behaviour = found["behavioural_distance"].values[FIRST, SECOND]
    cosines = setting.diagnosed["cosine_debiased" if debiased else "cosine"].values[:, 1, 1]
    for number, generator in enumerate(setting.generators.values()):
        distance = pdist(generator.representation()[0])
        mantel = found["mantel"].values[number]
        for kind, pairs in enumerate((behaviour, cosines[number][FIRST, SECOND])):
            assert mantel[kind, 0] == pytest.approx(np.corrcoef(distance, pairs)[0, 1], rel=1e-6)


@pytest.mark.parametrize("method", [*DECOUPLED, "hypermarl-coupled"])
def test_geometry_is_that_of_the_recorded_embeddings(method):
    setting = Setting(method)
    recorded = setting.probe.diagnose(setting.batches, COPY)
    setting.diagnosed = recorded
    found, findings = setting.measure()
    assert findings == []
    assert "within_distance" not in found
    for number, name in enumerate(setting.generators):
        expected = geometry(recorded[f"embedding_{name}"].values)
        for quantity in ("embedding_cosine", "embedding_distance", "effective_rank"):
            values = found[quantity].values[number]
            np.testing.assert_array_equal(values, expected[quantity])
    assert ("coupling" in found) == (method != "hypermarl-coupled")
    if method in {"fups", "nops"}:
        whole = found["coupling"].coords["layer"].index("all")
        expected = np.ones((AGENTS, AGENTS)) if method == "fups" else np.eye(AGENTS)
        for quantity in ("coupling", "coupling_frobenius"):
            np.testing.assert_allclose(found[quantity].values[0, whole], expected, atol=1e-12)


def test_what_can_not_be_measured_is_said_and_the_rest_is_there():
    setting = Setting()
    with torch.no_grad():
        setting.generators["critic"].embedding[1] = torch.nan
    found, findings = setting.measure()
    places = [finding.partition(":")[0] for finding in findings]
    assert places == ["critic, transference", "critic, geometry"]
    assert "agent 1" in findings[1]
    for name in ("transference", "embedding_distance"):
        actor, critic = found[name].values
        assert np.isfinite(actor).all()
        assert np.isnan(critic).all()


def test_policies_that_are_not_finite_leave_the_rest():
    setting = Setting()
    setting.logits[1, 7] = torch.nan
    found, findings = setting.measure()
    assert [finding.partition(":")[0] for finding in findings] == ["behaviour"]
    assert "agent 1, observation 7" in findings[0]
    assert "snd" not in found
    assert np.isnan(found["mantel"].values[:, 0]).all()
    assert np.isfinite(found["mantel"].values[:, 1]).all()


def test_a_single_copy_has_no_held_out_half():
    found, findings = Setting().measure(copies=torch.zeros(SAMPLES, dtype=torch.int64))
    assert not set(TRANSFERENCE) & set(found)
    assert "embedding_distance" in found
    assert len(findings) == 2
    assert "at least 2 copies" in findings[0]


def test_effects_leave_no_trace():
    setting = Setting()
    optimiser = setting.optimiser(1)
    parameters = [p for g in setting.generators.values() for p in g.parameters()]
    before = [p.detach().clone() for p in parameters]
    moments = copy.deepcopy(optimiser.state_dict()["state"])
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    setting.measure(optimiser=optimiser)
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    for number, now in optimiser.state_dict()["state"].items():
        assert all(torch.equal(tensor, moments[number][name]) for name, tensor in now.items())
    for parameter, value in zip(parameters, before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, value)
