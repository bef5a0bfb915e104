"""The engine against two libraries that others wrote."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from gradlab.engine.accumulate import gradient_moments

SAMPLES = 40


@pytest.fixture
def plain():
    """A network, a batch of one agent, and the network's moments by our engine."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    net = net.double()
    x = torch.randn(SAMPLES, 6, dtype=torch.float64)
    y = torch.randint(3, (SAMPLES,))

    def loss(theta, sample):
        logits = functional_call(net, theta, (sample["x"],))
        return nn.functional.cross_entropy(logits, sample["y"])

    theta = {name: p.detach()[None] for name, p in net.named_parameters()}
    found = gradient_moments(loss, theta, {"x": x[None], "y": y[None]}, coordinates=True)
    return net, x, y, found


def test_backpack_gives_the_same_norms_and_variances(plain):
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad, Variance

    net, x, y, found = plain
    net, criterion = extend(net), extend(nn.CrossEntropyLoss())
    with warnings.catch_warnings(), backpack(BatchL2Grad(), Variance()):
        warnings.simplefilter("ignore")  # of its own use of hooks
        criterion(net(x), y).backward()
    squares = found.layout.unflatten(found.square[0])
    means = found.layout.unflatten(found.mean[0])
    for layer, expected in zip(found.layout.layers, found.squared_norm[0], strict=True):
        parameters = [(n, p) for n, p in net.named_parameters() if n.startswith(layer + ".")]
        norms = sum(p.batch_l2.sum() for _, p in parameters)
        # its loss is a mean over samples
        torch.testing.assert_close(norms * SAMPLES**2, expected, rtol=1e-10, atol=0)
        for name, parameter in parameters:
            variance = squares[name] / SAMPLES - means[name].square()
            torch.testing.assert_close(
                parameter.variance * SAMPLES**2, variance, rtol=1e-9, atol=1e-14
            )


def test_opacus_ghost_norms_are_the_same(plain):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        net, x, y, found = plain
        wrapped = GradSampleModuleFastGradientClipping(
            net, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
        )
        nn.functional.cross_entropy(wrapped(x), y, reduction="sum").backward()
        norms = wrapped.get_norm_sample()
    torch.testing.assert_close(norms.square().sum(), found.squared_norm.sum(), rtol=1e-10, atol=0)
