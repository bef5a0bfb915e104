import pytest
import torch
from cases import AGENTS, DECOUPLED, SAMPLES, case
from torch import nn
from torch.func import functional_call

from gradlab.checks import UsageError
from gradlab.decomposition import decompose
from gradlab.factorisation import factorise

SURROGATES = ("ppo-discrete", "ppo-continuous", "value-clipped")


def oracle(c):
    """g, z and E[J]^T E[z] of every agent, by loops and a dense Jacobian for every sample."""
    psi = {n: p.detach().clone().requires_grad_() for n, p in c.generator.named_parameters()}
    reads = getattr(c.generator, "reads_observation", False)
    g, z, factored = [], [], []
    for agent in range(AGENTS):
        products, gradients, jacobians = [], [], []
        for t in range(SAMPLES):
            sample = {name: tensor[agent, t] for name, tensor in c.batch.items()}
            arguments = (torch.tensor([agent]),)
            if reads:
                arguments += (sample["observation"][None],)
            theta = {n: v[0] for n, v in functional_call(c.generator, psi, arguments).items()}
            loss = c.surrogate(theta, sample)
            product = torch.autograd.grad(
                loss, list(psi.values()), retain_graph=True, materialize_grads=True
            )
            products.append(torch.cat([p.flatten() for p in product]))
            gradient = torch.autograd.grad(loss, list(theta.values()), retain_graph=True)
            gradients.append(torch.cat([p.flatten() for p in gradient]))
            rows = [
                torch.cat([
                    d.flatten()
                    for d in torch.autograd.grad(
                        value, list(psi.values()), retain_graph=True, materialize_grads=True
                    )
                ])
                for tensor in theta.values()
                for value in tensor.flatten()
            ]
            jacobians.append(torch.stack(rows))
        g.append(torch.stack(products).mean(0))
        z.append(torch.stack(gradients).mean(0))
        factored.append(torch.stack(jacobians).mean(0).mT @ z[-1])
    return torch.stack(g), torch.stack(z), torch.stack(factored)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 2**22], ids=["parts", "whole"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_coupled_generator_equals_the_dense_oracle(surrogate, budget):
    c = case("hypermarl-coupled", surrogate)
    found = factorise(c.generator, c.surrogate, c.batch, budget=budget)
    g, z, factored = oracle(c)
    close(found.g, g)
    close(found.moments.mean, z)
    close(found.factored, factored)
    difference = (g - factored).sum(0).norm() / g.sum(0).norm()
    assert found.gap == pytest.approx(difference.item(), rel=1e-9)
    assert found.gap > 1e-3
    close(found.gap_agent, (g - factored).norm(dim=1) / g.norm(dim=1))


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("method", DECOUPLED)
def test_decoupled_generators_factor_to_rounding(method, surrogate):
    c = case(method, surrogate)
    found = factorise(c.generator, c.surrogate, c.batch)
    d = decompose(c.generator, c.surrogate, c.batch)
    close(found.g, d.g)
    close(found.moments.mean, d.z)
    close(found.moments.squared_norm, d.moments.squared_norm)
    assert found.gap < 1e-12
    assert d.factorisation_gap == 0


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_decompose_takes_the_coupled_generator(surrogate):
    c = case("hypermarl-coupled", surrogate)
    d = decompose(c.generator, c.surrogate, c.batch)
    g, z, _ = oracle(c)
    close(d.g, g)
    close(d.z, z)
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
