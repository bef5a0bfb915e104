import numpy as np
import pytest
import torch
from cases import AGENTS, DECOUPLED, case
from torch.func import functional_call

from gradlab.checks import UsageError
from gradlab.jacobian import Jacobian


def dense(generator):
    """Every agent's Jacobian [agent, theta, psi], one backward pass for each row."""
    psi = {n: p.detach().clone().requires_grad_() for n, p in generator.named_parameters()}
    blocks = []
    for agent in range(AGENTS):
        theta = functional_call(generator, psi, (torch.tensor([agent]),))
        rows = []
        for tensor in theta.values():
            for value in tensor[0].flatten():
                grads = torch.autograd.grad(
                    value, list(psi.values()), retain_graph=True, materialize_grads=True
                )
                rows.append(torch.cat([g.flatten() for g in grads]))
        blocks.append(torch.stack(rows))
    return torch.stack(blocks)


@pytest.fixture(params=DECOUPLED)
def both(request):
    generator = case(request.param, "q").generator
    return Jacobian(generator, AGENTS), dense(generator)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_products_equal_those_of_the_dense_jacobian(both):
    jacobian, matrix = both
    random = torch.Generator().manual_seed(0)
    v = torch.randn(AGENTS, matrix.shape[1], generator=random, dtype=torch.float64)
    u = torch.randn(AGENTS, matrix.shape[2], generator=random, dtype=torch.float64)
    pulled = (v[:, None] @ matrix)[:, 0]
    close(jacobian.vjp(v), pulled)
    close(jacobian.vjp_sum(v), pulled.sum(0))
    close(jacobian.jvp(u), (matrix @ u[..., None])[..., 0])
    close(jacobian.jvp(u[0]), matrix @ u[0])
    close(jacobian.couple(2, 0, v[0]), matrix[2] @ (matrix[0].mT @ v[0]))
    # adjoint: <v, J u> = <J^T v, u>
    close((v * jacobian.jvp(u)).sum(1), (jacobian.vjp(v) * u).sum(1))


def test_singular_values_equal_the_dense_ones(both):
    jacobian, matrix = both
    expected = np.linalg.svd(matrix[1].numpy(), compute_uv=False)[:4]
    np.testing.assert_allclose(jacobian.singular_values(1, 4), expected, rtol=1e-8)


def test_it_is_a_snapshot_that_leaves_no_trace():
    generator = case("hypermarl", "q").generator
    jacobian = Jacobian(generator, AGENTS)
    v = torch.ones(AGENTS, jacobian.theta_layout.size, dtype=torch.float64)
    state, before = torch.random.get_rng_state(), jacobian.vjp(v)
    assert all(p.grad is None for p in generator.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.zero_()
    close(jacobian.vjp(v), before)


def test_bad_input_is_named():
    jacobian = Jacobian(case("fups", "q").generator, AGENTS)
    v = torch.zeros(jacobian.theta_layout.size, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"`agent` must be from 0 to 2. Got agent=3."):
        jacobian.couple(3, 0, v)
    with pytest.raises(UsageError, match=r"`vectors` must have shape \(3, 105\)"):
        jacobian.vjp(v[None])
    with pytest.raises(UsageError, match="`count` must be from 1 to"):
        jacobian.singular_values(0, 10**6)
    with pytest.raises(UsageError, match="`agents` must be at least 1"):
        Jacobian(case("fups", "q").generator, 0)
