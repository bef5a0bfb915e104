import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import DECOUPLED
from reference import per_sample_gradients
from torch.func import functional_call

from gradlab.checks import UsageError
from gradlab.decomposition import decompose
from gradlab.engine.per_sample import Outer
from gradlab.metrics.interference import interference
from gradlab.metrics.variance import variance
from trainers.config import PPOConfig, SharingConfig
from trainers.envs.vector_env import Box, Discrete
from trainers.generators import METHODS
from trainers.policies import make_policy
from trainers.ppo import policy_loss

AGENTS, SAMPLES = 3, 7
SPACES = {"discrete": Discrete(n=4), "continuous": Box(low=-torch.ones(2), high=torch.ones(2))}


def case(method, space, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    policy = make_policy(5, SPACES[space], hidden=(6, 6), activation="tanh")
    generator = METHODS[method](policy.network, AGENTS, random, SharingConfig()).to(dtype)
    with torch.no_grad():
        for parameter in generator.parameters():
            noise = torch.randn(parameter.shape, generator=random).to(dtype)
            parameter.add_(0.1 * noise)
    observation = torch.randn(AGENTS, SAMPLES, 5, generator=random).to(dtype)
    with torch.no_grad():
        action, log_prob = policy.sample(
            {k: v.float() for k, v in generator.all_agents().items()}, observation.float(), random
        )
    batch = {
        "observation": observation,
        "action": action.to(dtype) if space == "continuous" else action,
        "log_prob": log_prob.to(dtype),
        "advantage": torch.randn(AGENTS, SAMPLES, generator=random).to(dtype),
    }
    policy = replace(policy, network=generator.mlp)
    return generator, policy_loss(policy, PPOConfig()), batch


def oracle(generator, surrogate, batch):
    psi = {name: p.detach() for name, p in generator.named_parameters()}

    def forward(psi, agent):
        theta = functional_call(generator, psi, (torch.tensor([agent]),))
        return {name: tensor[0] for name, tensor in theta.items()}

    return per_sample_gradients(forward, surrogate, psi, batch, AGENTS, SAMPLES)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", DECOUPLED)
def test_decompose_equals_loop_over_samples(method, space):
    generator, surrogate, batch = case(method, space)
    d = decompose(generator, surrogate, batch)
    expected = oracle(generator, surrogate, batch).mean(1)
    torch.testing.assert_close(d.g, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(d.total, expected.sum(0), rtol=1e-10, atol=1e-12)
    assert d.residual < 1e-10


@pytest.mark.parametrize("method", DECOUPLED)
def test_residual_in_float32_is_small(method):
    assert decompose(*case(method, "discrete", torch.float32)).residual < 1e-5


@pytest.mark.parametrize("fault", ["sum of factors", "pulling back"])
def test_residual_shows_a_fault(fault, monkeypatch):
    generator, surrogate, batch = case("hypermarl", "continuous")
    if fault == "sum of factors":
        monkeypatch.setattr(Outer, "sum", lambda self: 1.001 * self.rows().sum(1))
    else:
        right = generator.pull_back
        monkeypatch.setattr(generator, "pull_back", lambda z, agents: right(z, agents.flip(0)))
    assert decompose(generator, surrogate, batch).residual > 1e-4


def test_decompose_leaves_no_trace():
    generator, surrogate, batch = case("hypermarl", "discrete")
    before = {name: p.detach().clone() for name, p in generator.named_parameters()}
    state = torch.random.get_rng_state()
    decompose(generator, surrogate, batch)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, parameter in generator.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_decompose_refuses_a_loss_that_is_not_per_sample():
    generator, _, batch = case("fups", "discrete")
    with pytest.raises(UsageError, match=r"one scalar for one sample. Got shape \(5,\)"):
        decompose(generator, lambda _, sample: sample["observation"], batch)


def test_nops_gradients_do_not_interfere_in_psi():
    generator, surrogate, batch = case("nops", "discrete")
    cosine = interference(decompose(generator, surrogate, batch)).cosine.sel(layer="all")
    np.testing.assert_array_equal(cosine.sel(space="psi"), np.eye(AGENTS) * np.diag(cosine[0]))
    assert (np.abs(cosine.sel(space="theta").values[np.triu_indices(AGENTS, 1)]) > 0).all()


def test_fups_spaces_agree():
    generator, surrogate, batch = case("fups", "discrete")
    gram = interference(decompose(generator, surrogate, batch)).inner_product
    np.testing.assert_allclose(gram.sel(space="psi"), gram.sel(space="theta"), rtol=1e-10)


def test_equal_and_opposite_agents_have_cosine_one_and_minus_one():
    generator, surrogate, batch = case("fups", "discrete")
    batch = {name: tensor[:1].expand_as(tensor).clone() for name, tensor in batch.items()}
    surrogate = policy_loss(
        make_policy(5, SPACES["discrete"], hidden=(6, 6), activation="tanh"),
        PPOConfig(entropy_coefficient=0),
    )
    batch["advantage"][2] *= -1
    # at ratio 1 nothing is clipped, so the sign of the advantage is the sign of the gradient
    with torch.no_grad():
        policy = make_policy(5, SPACES["discrete"], hidden=(6, 6), activation="tanh")
        theta = generator.all_agents()
        batch["log_prob"] = policy.evaluate(theta, batch["observation"], batch["action"])[0]
    data = interference(decompose(generator, surrogate, batch))
    cosine = data.cosine.sel(space="psi", layer="all")
    assert cosine[0, 1] == pytest.approx(1)
    assert cosine[0, 2] == pytest.approx(-1)
    assert data.negative_rate.sel(space="psi", layer="all") == pytest.approx(2 / 3)


def test_variance_split_sums_to_the_total():
    generator, surrogate, batch = case("fups", "discrete")
    d = decompose(generator, surrogate, batch)
    split = variance(d)
    rows = oracle(generator, surrogate, batch).flatten(0, 1)  # FuPS: psi is theta
    total = (rows - rows.mean(0)).square().sum(-1).mean()
    whole = split.sel(layer="all")
    assert whole.variance_within + whole.variance_between == pytest.approx(total.item(), rel=1e-9)


def test_a_generator_that_comes_to_use_its_parameters_otherwise_is_still_exact():
    class Changing(torch.nn.Module):
        tied = False

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(AGENTS, 4)
            self.head = torch.nn.Linear(4, 10)

        def forward(self, agents):
            features = self.table(agents)
            weight = self.head(features)
            if self.tied:
                weight = weight + torch.tanh(features @ self.head.weight.T)
            return {"w": weight.view(-1, 2, 5)}

    torch.manual_seed(0)
    generator, batch = Changing().double(), case("fups", "discrete")[2]

    def surrogate(theta, sample):
        return torch.tanh(theta["w"] @ sample["observation"]).square().sum()

    for generator.tied in (False, True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the weight read by @ is formed
            assert decompose(generator, surrogate, batch).residual < 1e-10


class Recurrent(torch.nn.Module):
    """Full parameter sharing of a GRU's parameters, one of which no policy reads."""

    def __init__(self):
        super().__init__()
        self.cell = torch.nn.GRU(2, 3, batch_first=True)
        self.idle = torch.nn.Parameter(torch.ones(4))

    def forward(self, agents):  # noqa: ARG002
        return {name: p[None] for name, p in self.cell.named_parameters()}


def test_recurrent_surrogate_has_a_residual_and_idle_parameters_no_gradient():
    torch.manual_seed(0)
    generator = Recurrent().double()

    def loss(theta, sample):
        return functional_call(generator.cell, theta, (sample["x"],))[0].square().sum()

    x = torch.randn(2, 3, 5, 2, dtype=torch.float64)  # [agent, segment, time, feature]
    d = decompose(generator, loss, {"x": x})
    assert d.residual < 1e-12
    assert d.g.shape == (2, sum(p.numel() for p in generator.parameters()))
    assert not d.psi_layout.unflatten(d.total)["idle"].any()
    assert not d.gram_psi()["idle"].any()
