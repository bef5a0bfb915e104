import numpy as np
import pytest
import torch
from cases import AGENTS, DECOUPLED, case
from torch.func import functional_call

from gradlab.checks import UsageError
from gradlab.jacobian import Jacobian


def dense(generator):
    """Every agent's Jacobian [agent, theta, psi], one backward pass for each row."""
    psi = {
        n: p.detach().clone().requires_grad_()
        for n, p in generator.named_parameters()
        if p.requires_grad
    }
    blocks = []
    for agent in range(AGENTS):
        theta = functional_call(generator, psi, (torch.tensor([agent]),))
        rows = []
        for tensor in theta.values():
            for value in tensor[0].flatten():
                grads = [torch.zeros_like(p) for p in psi.values()]
                if value.requires_grad:  # a constant is made from nothing that is trained
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
    close(jacobian.vjp_agent(2, v[2]), pulled[2])
    close(jacobian.jvp(u), (matrix @ u[..., None])[..., 0])
    close(jacobian.jvp(u[0]), matrix @ u[0])
    close(jacobian.couple(2, 0, v[0]), matrix[2] @ (matrix[0].mT @ v[0]))
    # adjoint: <v, J u> = <J^T v, u>
    close((v * jacobian.jvp(u)).sum(1), (jacobian.vjp(v) * u).sum(1))


def test_singular_values_equal_the_dense_ones(both):
    jacobian, matrix = both
    expected = np.linalg.svd(matrix[1].numpy(), compute_uv=False)[:4]
    np.testing.assert_allclose(jacobian.singular_values(1, 4), expected, rtol=1e-8)


def test_all_singular_values_but_one_of_a_tall_jacobian():
    generator = Tall()
    expected = np.linalg.svd(dense(generator)[0].numpy(), compute_uv=False)
    found = Jacobian(generator, AGENTS).singular_values(0, 3)
    np.testing.assert_allclose(found, expected[:3], rtol=1e-8)


def test_singular_values_in_float32():
    generator = case("hypermarl", "q", torch.float32).generator
    expected = np.linalg.svd(dense(generator.double())[1].numpy(), compute_uv=False)[:4]
    found = Jacobian(generator.float(), AGENTS).singular_values(1, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


class Tall(torch.nn.Module):
    """Fewer trained parameters than policy parameters, one frozen, and a buffer."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=random, dtype=torch.float64)  # noqa: E731
        self.code = torch.nn.Parameter(draw(4))
        self.scale = torch.nn.Parameter(draw(1), requires_grad=False)
        self.register_buffer("directions", draw(AGENTS, 9, 4))

    def forward(self, agents):
        return {"w": self.scale * (self.directions[agents] @ self.code.tanh())}


def test_only_trained_parameters_are_psi():
    jacobian = Jacobian(Tall(), AGENTS)
    assert jacobian.psi_layout.shapes == {"code": torch.Size([4])}


def test_it_is_a_snapshot_that_leaves_no_trace():
    for generator in (case("hypermarl", "q").generator, Tall()):
        jacobian = Jacobian(generator, AGENTS)
        v = torch.ones(AGENTS, jacobian.theta_layout.size, dtype=torch.float64)
        state, before = torch.random.get_rng_state(), jacobian.vjp(v.requires_grad_())
        assert not before.requires_grad
        assert all(p.grad is None for p in generator.parameters())
        assert torch.equal(state, torch.random.get_rng_state())
        with torch.no_grad():
            for tensor in (*generator.parameters(), *generator.buffers()):
                tensor.zero_()
            close(jacobian.vjp(v), before)


def test_results_have_the_generators_dtype():
    jacobian = Jacobian(case("hypermarl", "q", torch.float32).generator, AGENTS)
    v = torch.ones(AGENTS, jacobian.theta_layout.size, dtype=torch.float64)
    assert jacobian.vjp(v).dtype == torch.float32
    assert jacobian.jvp(jacobian.vjp_sum(v)).dtype == torch.float32
    assert jacobian.singular_values(0, 1).dtype == np.float64


def test_bad_input_is_named():
    jacobian = Jacobian(case("fups", "q").generator, AGENTS)
    v = torch.zeros(jacobian.theta_layout.size, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"`agent` must be from 0 to 2\. Got agent=3\."):
        jacobian.couple(3, 0, v)
    with pytest.raises(UsageError, match=r"`other` must be from 0 to 2\. Got other=-1\."):
        jacobian.couple(0, -1, v)
    with pytest.raises(UsageError, match=r"`agent` must be from 0 to 2\. Got agent=3\."):
        jacobian.singular_values(3)
    with pytest.raises(
        UsageError, match=r"`vectors` must have shape \(3, 105\).* Got .*\(1, 105\)"
    ):
        jacobian.vjp(v[None])
    with pytest.raises(
        UsageError, match=r"`vectors` must have shape \(3, 105\).* Got .*\(2, 105\)"
    ):
        jacobian.jvp(v.expand(2, -1))
    with pytest.raises(
        UsageError, match=r"`vector` must have shape \(105,\).* Got vector=\(104,\)"
    ):
        jacobian.couple(0, 1, v[1:])
    with pytest.raises(UsageError, match=r"`count` must be from 1 to 104\. Got count=105"):
        jacobian.singular_values(0, 105)
    with pytest.raises(UsageError, match=r"`agents` must be at least 1\. Got agents=0"):
        Jacobian(case("fups", "q").generator, 0)
    with pytest.raises(UsageError, match=r"`generator` must not read .* Got generator='Coupled"):
        Jacobian(case("hypermarl-coupled", "q").generator, AGENTS)
    with pytest.raises(UsageError, match="`generator` must have parameters that require"):
        Jacobian(case("fups", "q").generator.requires_grad_(False), AGENTS)
