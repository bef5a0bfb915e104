"""The engine against two libraries that others wrote."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from gradlab.engine.accumulate import gradient_moments
from gradlab.engine.part import Part
from gradlab.engine.plan import planned_gradients

pytestmark = [
    pytest.mark.peers,
    # both hook the first layer, whose input needs no gradient
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients:UserWarning"),
]
SAMPLES = 40


@pytest.fixture
def plain():
    """A network, a batch of one agent, and the loss of a sample."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    net = net.double()
    x = torch.randn(SAMPLES, 6, dtype=torch.float64)
    y = torch.randint(3, (SAMPLES,))

    def loss(theta, sample):
        logits = functional_call(net, theta, (sample["x"],))
        return nn.functional.cross_entropy(logits, sample["y"])

    theta = {name: p.detach()[None] for name, p in net.named_parameters()}
    return net, loss, theta, {"x": x[None], "y": y[None]}


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_backpack_gives_the_same_norms_and_variances(plain, engine):
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad, Variance

    net, loss, theta, batch = plain
    gradients = planned_gradients(loss, theta, Part(batch=batch), engine)
    found = gradient_moments(loss, theta, batch, coordinates=True, engine=engine)
    squares, means = (found.layout.unflatten(t[0]) for t in (found.square, found.mean))
    net, criterion = extend(net), extend(nn.CrossEntropyLoss())
    with backpack(BatchL2Grad(), Variance()):
        criterion(net(batch["x"][0]), batch["y"][0]).backward()
    for name, parameter in net.named_parameters():
        # its loss is a mean over samples
        norms, variance = parameter.batch_l2 * SAMPLES**2, parameter.variance * SAMPLES**2
        ours = gradients[name].squared_norms()[0]
        torch.testing.assert_close(ours, norms, rtol=1e-10, atol=1e-14)
        ours = squares[name] / SAMPLES - means[name].square()
        torch.testing.assert_close(ours, variance, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_opacus_ghost_norms_are_the_same(plain, engine):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    net, loss, theta, batch = plain
    gradients = planned_gradients(loss, theta, Part(batch=batch), engine)
    ours = torch.stack([gradient.squared_norms()[0] for gradient in gradients.values()]).sum(0)
    wrapped = GradSampleModuleFastGradientClipping(
        net, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
    )
    logits = wrapped(batch["x"][0])
    nn.functional.cross_entropy(logits, batch["y"][0], reduction="sum").backward()
    torch.testing.assert_close(ours, wrapped.get_norm_sample().square(), rtol=1e-10, atol=1e-14)
