import torch
from torch.func import grad, jvp, vmap

from trainers.activations import tanh


def test_tanh_is_torchs_whatever_the_mode():
    x = torch.cat([torch.linspace(-30, 30, 999), torch.tensor([0.0, torch.inf, -torch.inf])])
    x = x.double()
    with torch.no_grad():
        torch.testing.assert_close(tanh(x), x.tanh(), rtol=0, atol=1e-15)
    torch.testing.assert_close(tanh(x.requires_grad_()), x.tanh(), rtol=0, atol=1e-15)
    assert torch.equal(vmap(tanh)(x), vmap(torch.tanh)(x))


def test_derivatives_of_tanh():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(tanh, (x,))
    (ours,), (torchs,) = (torch.autograd.grad(f(x).sum(), x) for f in (tanh, torch.tanh))
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-14)
    fixed = x.detach()
    assert torch.equal(vmap(grad(tanh))(fixed), vmap(grad(torch.tanh))(fixed))
    ones = torch.ones_like(fixed)
    assert torch.equal(jvp(tanh, (fixed,), (ones,))[1], jvp(torch.tanh, (fixed,), (ones,))[1])
