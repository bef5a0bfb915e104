import pytest
import torch
from cases import AGENTS, DECOUPLED, SAMPLES, case, one_agents
from selection import slow_but
from torch import nn
from torch.func import functional_call

from gradlab.checks import UsageError
from gradlab.decomposition import decompose
from gradlab.factorisation import factorise

SURROGATES = ("ppo-discrete", "ppo-continuous", "value-clipped", "ppo-recurrent")


def oracle(c, numbers=range(SAMPLES)):
    """g, E[J]^T E[z] and all z_t of every agent, by loops and a dense Jacobian for every sample."""
    psi = {n: p.detach().clone().requires_grad_() for n, p in c.generator.named_parameters()}
    reads = getattr(c.generator, "reads_observation", False)
    made_by_step = getattr(c.generator, "made_by_step", ())

    def flat(value, of):
        parts = torch.autograd.grad(value, of, retain_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    g, z, factored = [], [], []
    for agent in range(AGENTS):
        products, gradients, jacobians = [], [], []
        for t in numbers:
            sample = {name: tensor[agent, t] for name, tensor in c.batch.items()}
            sample |= {name: tensor[agent] for name, tensor in c.context.items()}
            arguments = (torch.tensor([agent]),)
            if reads:
                arguments += (sample["observation"][None],)
            theta = one_agents(functional_call(c.generator, psi, arguments))
            loss = c.surrogate(theta, sample)
            products.append(flat(loss, list(psi.values())))
            own = torch.autograd.grad(
                loss, list(theta.values()), retain_graph=True, materialize_grads=True
            )
            steps = [sample["observation"].dim() > 1 and name in made_by_step for name in theta]
            gradients.append(
                torch.cat([
                    (z.sum(0) if by_step else z).flatten()
                    for z, by_step in zip(own, steps, strict=True)
                ])
            )
            values = torch.cat([
                (tensor.mean(0) if by_step else tensor).flatten()
                for tensor, by_step in zip(theta.values(), steps, strict=True)
            ])
            jacobians.append(torch.stack([flat(value, list(psi.values())) for value in values]))
        g.append(torch.stack(products).mean(0))
        z.append(torch.stack(gradients))
        factored.append(torch.stack(jacobians).mean(0).mT @ z[-1].mean(0))
    return torch.stack(g), torch.stack(factored), torch.stack(z)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "budget", [1, pytest.param(2**22, marks=pytest.mark.slow)], ids=["parts", "whole"]
)
@pytest.mark.parametrize("surrogate", slow_but(SURROGATES, "ppo-recurrent"))
def test_coupled_generator_equals_the_dense_oracle(surrogate, budget):
    c = case("hypermarl-coupled", surrogate)
    found = factorise(c.generator, c.surrogate, c.batch, budget=budget)
    g, factored, z = oracle(c)
    close(found.g, g)
    close(found.z, z.mean(1))
    close(found.factored, factored)
    difference = (g - factored).sum(0).norm() / g.sum(0).norm()
    assert found.gap == pytest.approx(difference.item(), rel=1e-9)
    assert found.gap > 1e-3
    close(found.gap_agent, (g - factored).norm(dim=1) / g.norm(dim=1))
    layouts = (found.theta_layout, found.psi_layout)
    assert [layout.size for layout in layouts] == [z.shape[2], g.shape[1]]


@pytest.mark.parametrize(
    "budget", [1, pytest.param(2**22, marks=pytest.mark.slow)], ids=["parts", "whole"]
)
def test_moments_of_the_coupled_generator_equal_loops(budget):
    c = case("hypermarl-coupled", "ppo-continuous")
    copy = torch.tensor([5, 2, 5, 5, 2, 0, 7, 2, 5, 0])
    found = factorise(
        c.generator, c.surrogate, c.batch, copy=copy, coordinates=True, budget=budget
    ).moments
    _, _, z = oracle(c)
    close(found.square, z.square().sum(1))
    assert found.copies.tolist() == [0, 2, 5, 7]
    assert found.copy_count.tolist() == [[2, 3, 4, 1]] * AGENTS
    within, across, _ = found.copy_products()
    for number, (_, z_l) in enumerate(found.layout.split_by_layer(z)):
        close(found.squared_norm[:, number], z_l.square().sum((1, 2)))
        for place, label in enumerate(found.copies):
            of_copy = z_l[:, copy == label].sum(1)
            close(within[number, place], of_copy @ of_copy.mT)
            close(across[number, place], of_copy @ z_l.sum(1).mT)


@pytest.mark.parametrize("budget", [1, 2**22], ids=["parts", "whole"])
def test_samples_that_do_not_exist_do_not_count(budget):
    c = case("hypermarl-coupled", "ppo-discrete")
    exist = [0, 1, 2, 4, 5, 7]
    mask = torch.zeros(AGENTS, SAMPLES, dtype=torch.bool)
    mask[:, exist] = True
    for name, tensor in c.batch.items():
        if tensor.is_floating_point():
            c.batch[name][~mask] = torch.nan
    found = factorise(c.generator, c.surrogate, c.batch, mask=mask, budget=budget)
    g, factored, z = oracle(c, exist)
    close(found.g, g)
    close(found.z, z.mean(1))
    close(found.factored, factored)


def test_agent_without_samples_has_no_gap():
    c = case("hypermarl-coupled", "ppo-discrete")
    mask = torch.ones(AGENTS, SAMPLES, dtype=torch.bool)
    mask[1] = False
    found = factorise(c.generator, c.surrogate, c.batch, mask=mask)
    g, factored, _ = oracle(c)
    others = (g - factored)[[0, 2]].sum(0).norm() / g[[0, 2]].sum(0).norm()
    assert found.gap == pytest.approx(others.item(), rel=1e-9)
    assert found.gap_agent[1] == 0
    assert not found.g[1].any()


def test_context_is_what_each_of_an_agents_samples_holds():
    c = case("hypermarl-coupled", "value-clipped")
    c.context = {"scale": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}
    value = c.surrogate
    c.surrogate = lambda theta, sample: sample["scale"] * value(theta, sample)
    found = factorise(c.generator, c.surrogate, c.batch, context=c.context)
    g, factored, z = oracle(c)
    close(found.g, g)
    close(found.z, z.mean(1))
    close(found.factored, factored)


def test_a_frozen_parameter_has_no_share():
    c = case("hypermarl-coupled", "ppo-continuous")
    g, factored, _ = oracle(c)
    c.generator.embedding.requires_grad_(False)
    found = factorise(c.generator, c.surrogate, c.batch)
    embedding = c.generator.embedding.numel()
    assert "embedding" not in found.psi_layout.shapes
    place = list(dict(c.generator.named_parameters())).index("embedding")
    before = sum(p.numel() for p in list(c.generator.parameters())[:place])
    kept = torch.ones(g.shape[1], dtype=torch.bool)
    kept[before : before + embedding] = False
    close(found.g, g[:, kept])
    close(found.factored, factored[:, kept])


def test_no_parameter_gradient_or_random_state_is_touched():
    c = case("hypermarl-coupled", "ppo-continuous")
    before = {name: tensor.clone() for name, tensor in c.generator.state_dict().items()}
    state = torch.get_rng_state()
    factorise(c.generator, c.surrogate, c.batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], t) for n, t in c.generator.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in c.generator.parameters())


def test_in_float32_decoupled_generators_factor_to_its_rounding():
    for method in DECOUPLED:
        c = case(method, "ppo-continuous", torch.float32)
        assert factorise(c.generator, c.surrogate, c.batch).gap < 1e-5


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("method", DECOUPLED)
def test_decoupled_generators_factor_to_rounding(method, surrogate):
    c = case(method, surrogate)
    found = factorise(c.generator, c.surrogate, c.batch)
    d = decompose(c.generator, c.surrogate, c.batch)
    close(found.g, d.g)
    close(found.z, d.z)
    close(found.moments.squared_norm, d.moments.squared_norm)
    assert found.gap < 1e-12
    assert d.factorisation_gap == 0


@pytest.mark.parametrize("surrogate", slow_but(SURROGATES, "ppo-recurrent"))
def test_decompose_takes_the_coupled_generator(surrogate):
    c = case("hypermarl-coupled", surrogate)
    d = decompose(c.generator, c.surrogate, c.batch)
    g, _, z = oracle(c)
    close(d.g, g)
    close(d.z, z.mean(1))
    close(d.total, g.sum(0))
    assert d.residual < 1e-12
    assert d.factorisation_gap > 1e-3


class Times(nn.Module):
    """theta_t = psi o_t."""

    reads_observation = True

    def __init__(self):
        super().__init__()
        self.psi = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, agents, observation):  # noqa: ARG002
        return {"theta": self.psi * observation}


def test_known_gap_by_hand():
    # J_t = o_t and z_t = a_t: E[o a] = (1*1 + 3*2) / 2 = 3.5, E[o] E[a] = 2 * 1.5 = 3
    batch = {
        "observation": torch.tensor([[[1.0], [3.0]]], dtype=torch.float64),
        "a": torch.tensor([[1.0, 2.0]], dtype=torch.float64),
    }
    found = factorise(Times(), lambda theta, s: (s["a"] * theta["theta"]).sum(), batch)
    assert found.g.item() == pytest.approx(3.5)
    assert found.factored.item() == pytest.approx(3.0)
    assert found.gap == pytest.approx(0.5 / 3.5)


def test_a_batch_without_observations_is_refused():
    with pytest.raises(UsageError, match="`batch` must hold 'observation', which the generator"):
        factorise(Times(), lambda theta, s: theta["theta"] * s["a"], {"a": torch.ones(1, 2)})
