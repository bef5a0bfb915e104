import numpy as np
import pytest
import torch
from cases import AGENTS, DECOUPLED, SAMPLES, case
from selection import covering
from torch import nn
from torch.func import functional_call

from gradlab.checks import UsageError
from gradlab.copies import split_copies
from gradlab.metrics.transference import transference
from gradlab.preconditioner import adam_preconditioner

METHODS = (*DECOUPLED, "hypermarl-coupled")
PAIRS = ("transference", "transference_predicted")
OFF = ~np.eye(AGENTS, dtype=bool)


def halves(c):
    """Every other sample, as if they came from two sets of copies."""
    return split_copies(c.batch, torch.arange(SAMPLES) % 4)


def mean_losses(c, psi, batch, mask=None):
    """Each agent's mean loss, by a loop over agents and samples."""
    losses = []
    for agent in range(AGENTS):
        values = []
        for s in range(next(iter(batch.values())).shape[1]):
            if mask is not None and not mask[agent, s]:
                continue
            sample = {name: tensor[agent, s] for name, tensor in batch.items()}
            sample |= {name: tensor[agent] for name, tensor in c.context.items()}
            arguments = [torch.tensor([agent])]
            if getattr(c.generator, "reads_observation", False):
                arguments.append(sample["observation"][None])
            theta = functional_call(c.generator, psi, tuple(arguments))
            values.append(c.surrogate({name: t[0] for name, t in theta.items()}, sample))
        losses.append(torch.stack(values).mean())
    return losses


def oracle(c, batch, held_out, length=None, weights=None, masks=(None, None)):
    """Both matrices by plain backward passes, one for each agent and batch."""
    psi = {n: p.detach().clone().requires_grad_() for n, p in c.generator.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in psi.values()])
    length = 1e-3 * flat.norm() if length is None else length
    weight = 1 if weights is None else torch.cat([weights[n].flatten() for n in psi]).double()

    def gradients(batch, mask):
        found = []
        for loss in mean_losses(c, psi, batch, mask):
            parts = torch.autograd.grad(loss, list(psi.values()), materialize_grads=True)
            found.append(torch.cat([part.flatten() for part in parts]))
        return found

    before = torch.stack(mean_losses(c, psi, held_out, masks[1])).detach()
    predicted, taken = [], []
    of_losses = gradients(held_out, masks[1])
    for g in gradients(batch, masks[0]):
        step = -length * weight * g / (weight * g).norm()
        predicted.append([(step @ h).item() for h in of_losses])
        parts = (flat + step).split([p.numel() for p in psi.values()])
        moved = {n: part.view_as(psi[n]) for n, part in zip(psi, parts, strict=True)}
        after = torch.stack(mean_losses(c, moved, held_out, masks[1])).detach()
        taken.append((after - before).tolist())
    return np.array(taken), np.array(predicted)


def assert_equals(found, expected):
    for name, values in zip(PAIRS, expected, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("budget", [1, 2**25], ids=["parts", "whole"])
@pytest.mark.parametrize(
    ("method", "surrogate"),
    covering(METHODS, ["ppo-discrete", "ppo-continuous", "value-clipped"]),
)
def test_transference_equals_loops_and_plain_backward_passes(method, surrogate, budget):
    c = case(method, surrogate)
    batch, held_out = halves(c)
    found = transference(c.generator, c.surrogate, batch, held_out, budget=budget)
    assert_equals(found, oracle(c, batch, held_out))
    assert (method == "nops") == np.allclose(found.transference, found.transference.T)


@pytest.mark.parametrize("method", METHODS)
def test_preconditioned_transference_equals_the_oracle(method):
    c = case(method, "ppo-continuous")
    batch, held_out = halves(c)
    random = torch.Generator().manual_seed(2)
    weights = {
        n: torch.rand(p.shape, generator=random, dtype=p.dtype).square()
        for n, p in c.generator.named_parameters()
    }
    found, plain = (
        transference(c.generator, c.surrogate, batch, held_out, length=0.02, preconditioner=given)
        for given in (weights, None)
    )
    assert_equals(found, oracle(c, batch, held_out, 0.02, weights))
    assert found.transference_length == 0.02
    assert not np.allclose(found.transference, plain.transference, rtol=0.01)
    scaled = {name: 7 * weight for name, weight in weights.items()}
    again = transference(
        c.generator, c.surrogate, batch, held_out, length=0.02, preconditioner=scaled
    )
    np.testing.assert_allclose(found.transference, again.transference, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", ["hypermarl", "hypermarl-coupled"])
def test_samples_that_do_not_exist_do_not_count(method):
    c = case(method, "ppo-discrete")
    batch, held_out = halves(c)
    masks = [torch.ones(AGENTS, len(half["advantage"][0])).bool() for half in (batch, held_out)]
    masks[0][0, 1:3] = False
    masks[1][2, 0] = False
    for half, mask in zip((batch, held_out), masks, strict=True):
        for tensor in half.values():
            if tensor.is_floating_point():
                tensor[~mask] = torch.nan
    found = transference(
        c.generator, c.surrogate, batch, held_out, mask=masks[0], held_out_mask=masks[1]
    )
    assert_equals(found, oracle(c, batch, held_out, masks=masks))


def test_context_is_held_by_every_sample():
    c = case("hypermarl", "dpg")
    batch, held_out = halves(c)
    found = transference(c.generator, c.surrogate, batch, held_out, context=c.context)
    assert_equals(found, oracle(c, batch, held_out))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("surrogate", ["ppo-continuous", "value"])
def test_without_sharing_no_agent_moves_another(surrogate, weighted):
    c = case("nops", surrogate)
    weights = {n: 2 + p.detach().sin() for n, p in c.generator.named_parameters()}
    found = transference(
        c.generator, c.surrogate, *halves(c), preconditioner=weights if weighted else None
    )
    for name in PAIRS:
        values = found[name].to_numpy()
        assert (values[OFF] == 0).all()
        assert not np.signbit(values[OFF]).any()
        assert (values[~OFF] != 0).all()


def test_agents_that_share_everything_and_see_the_same_help_each_other_equally():
    c = case("fups", "ppo-discrete")
    same = {name: tensor[:1].expand_as(tensor).clone() for name, tensor in c.batch.items()}
    found = transference(c.generator, c.surrogate, same, same)
    for name in PAIRS:
        np.testing.assert_allclose(found[name], found[name][0, 0], rtol=1e-12)
        assert (found[name] < 0).all()
    assert np.isnan(found.transference_agreement)
    assert found.transference_error < 0.2


def test_opposite_agents_harm_each_other():
    c = case("fups", "pg-discrete")
    loss = c.surrogate
    c.context = {"sign": torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)}

    def signed(theta, sample):
        return sample["sign"] * loss(theta, sample)

    same = {name: tensor[:1].expand_as(tensor).clone() for name, tensor in c.batch.items()}
    found = transference(c.generator, signed, same, same, context=c.context)
    signs = np.outer([1, -1, 1], [1, -1, 1])
    for name in PAIRS:
        np.testing.assert_array_equal(np.sign(found[name]), -signs)


class Point(nn.Module):
    """theta = w for every agent."""

    def __init__(self, *w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, agents):  # noqa: ARG002
        return {"w": self.w[None]}


def quadratic(theta, sample):
    return 0.5 * (theta["w"] - sample["x"]).square().sum()


def line(theta, sample):
    return (theta["w"] * sample["x"]).sum()


def points(*x):
    return {"x": torch.tensor(x, dtype=torch.float64)}


def test_quadratic_losses_have_a_closed_form():
    # One sample each: agent 0 wants to go to (2, 0), agent 1 to (0, -1); held out are others.
    generator, step = Point(0.0, 0.0), 0.1
    held_out = points([[3.0, 1.0]], [[-1.0, 1.0]])
    found = transference(
        generator, quadratic, points([[2.0, 0]], [[0, -1.0]]), held_out, length=step
    )
    # The steps are (step, 0) and (0, -step); the held-out gradients at 0 are minus the points.
    predicted = step * np.array([[-3.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(found.transference_predicted, predicted, rtol=1e-14)
    np.testing.assert_allclose(found.transference, predicted + step**2 / 2, rtol=1e-13)
    assert found.transference_agreement == pytest.approx(1)
    error = 2 * step**2 / 2 / np.linalg.norm(predicted)
    assert found.transference_error == pytest.approx(error, rel=1e-12)
    assert found.transference.dims == ("agent", "agent_other")
    assert found.transference.attrs["unit"] == "loss"


def test_a_preconditioner_turns_the_step_not_its_length():
    weights = {"w": torch.tensor([0.0, 5.0], dtype=torch.float64)}
    batch = points([[1.0, 1.0]], [[1.0, -3.0]])
    found = transference(Point(0.0, 0.0), line, batch, batch, length=0.1, preconditioner=weights)
    np.testing.assert_allclose(found.transference, [[-0.1, 0.3], [0.1, -0.3]], rtol=1e-13)


@pytest.mark.parametrize("method", ["fups", "hypermarl"])
def test_prediction_and_change_agree_as_the_step_shrinks(method):
    c = case(method, "value")
    batch, held_out = halves(c)
    found = [
        transference(c.generator, c.surrogate, batch, held_out, length=length)
        for length in (1e-3, 1e-4, 1e-5)
    ]
    errors = [float(data.transference_error) for data in found]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 10, rtol=0.2)
    agreement = [1 - float(data.transference_agreement) for data in found]
    assert agreement[2] < 1e-6
    assert agreement[2] < agreement[1] < agreement[0]


def test_agreement_is_that_of_numpy():
    c = case("hypermarl", "ppo-continuous")
    found = transference(c.generator, c.surrogate, *halves(c), length=0.5)
    taken, predicted = (found[name].to_numpy().ravel() for name in PAIRS)
    assert 0.1 < found.transference_agreement < 0.9999
    expected = np.corrcoef(taken, predicted)[0, 1]
    assert found.transference_agreement == pytest.approx(expected, rel=1e-12)


def test_an_agent_without_a_gradient_has_no_direction():
    batch = points([[0.0, 0.0]], [[1.0, 0.0]])
    found = transference(Point(1.0, 1.0), line, batch, batch, length=0.1)
    for name in PAIRS:
        np.testing.assert_allclose(found[name], [[np.nan, np.nan], [0, -0.1]], atol=1e-15)
    assert found.transference_error < 1e-12
    nobody = transference(Point(1.0, 1.0), line, points([[0.0, 0]]), points([[0.0, 0]]), length=1.0)
    assert np.isnan(nobody.transference_agreement)
    assert np.isnan(nobody.transference_error)


def test_an_agent_whose_gradient_is_not_finite_has_no_direction_either():
    batch = points([[torch.nan, 0.0]], [[1.0, 0.0]])
    found = transference(Point(1.0, 1.0), line, batch, points([[1.0, 0]], [[2.0, 0]]), length=0.1)
    for name in PAIRS:
        np.testing.assert_allclose(found[name], [[np.nan, np.nan], [-0.1, -0.2]])
    assert found.transference_agreement == pytest.approx(1)


def test_an_agent_without_samples_has_no_row_and_no_column():
    batch, mask = points([[1.0, 0.0]], [[1.0, 0.0]]), torch.tensor([[True], [False]])
    ours = transference(Point(1.0, 1.0), line, batch, batch, mask=mask, length=0.1)
    others = transference(Point(1.0, 1.0), line, batch, batch, held_out_mask=mask, length=0.1)
    for name in PAIRS:
        np.testing.assert_allclose(ours[name], [[-0.1, -0.1], [np.nan, np.nan]])
        np.testing.assert_allclose(others[name], [[-0.1, np.nan], [-0.1, np.nan]])


def test_one_agent():
    found = transference(
        Point(0.0, 0.0), quadratic, points([[2.0, 0]]), points([[1.0, 0]]), length=1.0
    )
    assert found.transference.values.tolist() == [[-0.5]]
    assert found.transference_predicted.values.tolist() == [[-1]]
    assert np.isnan(found.transference_agreement)
    assert found.transference_error == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_the_module_and_random_states_are_left_as_they_are(method):
    c = case(method, "ppo-continuous")
    batch, held_out = halves(c)
    for parameter in c.generator.parameters():
        parameter.grad = parameter.detach().cos()
    parameters = dict(c.generator.named_parameters())
    tensors = {**c.generator.state_dict(), **batch}
    tensors |= {f"grad/{n}": p.grad for n, p in parameters.items()}
    tensors |= {f"held out/{n}": t for n, t in held_out.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    grads = {name: p.grad for name, p in parameters.items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = transference(c.generator, c.surrogate, batch, held_out)
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])
    assert dict(c.generator.named_parameters()).keys() == parameters.keys()
    for name, parameter in c.generator.named_parameters():
        assert parameter is parameters[name]
        assert parameter.grad is grads[name]
        assert parameter.requires_grad
        assert parameter.is_leaf
    for name, tensor in tensors.items():
        bits, bits_before = (t.flatten().view(torch.uint8) for t in (tensor, before[name]))
        assert torch.equal(bits, bits_before), name
    with torch.no_grad():
        again = transference(c.generator, c.surrogate, batch, held_out)
    np.testing.assert_array_equal(first.transference, again.transference)
    np.testing.assert_array_equal(first.transference_predicted, again.transference_predicted)


def test_frozen_parameters_stay_where_they_are():
    c = case("hypermarl", "ppo-continuous")
    c.generator.embedding.requires_grad_(False)
    batch, held_out = halves(c)
    weights = {n: torch.ones_like(p) for n, p in c.generator.named_parameters()}
    weights["embedding"] = torch.zeros_like(c.generator.embedding)
    found = transference(c.generator, c.surrogate, batch, held_out, length=0.01)
    assert_equals(found, oracle(c, batch, held_out, 0.01, weights))


@pytest.mark.parametrize("method", METHODS)
def test_the_default_step_is_long_enough_for_float32(method):
    double, single = (
        transference(c.generator, c.surrogate, *halves(c))
        for c in (case(method, "ppo-continuous", dtype) for dtype in (torch.float64, torch.float32))
    )
    for name in PAIRS:
        difference = np.linalg.norm(single[name] - double[name])
        assert difference < 0.01 * np.linalg.norm(double[name])


def test_steps_of_many_samples_are_cut_into_parts():
    many = torch.randn(2, 9000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    held_out = {"x": many}
    found = transference(
        Point(0.0, 0.0), quadratic, points([[2.0, 0]], [[0, 1.0]]), held_out, length=0.1
    )
    mean = many.mean(1)
    expected = [[-0.1 * float(mean[k, i]) + 0.005 for k in range(2)] for i in range(2)]
    np.testing.assert_allclose(found.transference, expected, rtol=1e-10, atol=1e-14)


def test_adam_preconditioner_is_what_a_step_multiplies_the_gradient_by():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    module[3].requires_grad_(False)
    module.idle = nn.Parameter(torch.ones(3))
    groups = [
        {"params": module[0].parameters(), "lr": 0.02},
        {"params": module[2].parameters(), "lr": 0.01, "amsgrad": True},
        {"params": [module.idle]},
    ]
    # without momentum the step is the preconditioned gradient, nothing else
    optimiser = torch.optim.Adam(groups, betas=(0.0, 0.9), eps=1e-3)
    for scale in (3.0, 1.0, 0.2):
        optimiser.zero_grad()
        module(scale * torch.randn(8, 3, dtype=torch.float64)).square().sum().backward()
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        optimiser.step()
        found = adam_preconditioner(optimiser, module)
        assert set(found) == {"idle", "0.weight", "0.bias", "2.weight", "2.bias"}
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                step = before[name] - parameter.detach()
                torch.testing.assert_close(found[name] * parameter.grad, step, rtol=1e-12, atol=0)
    assert found["idle"].tolist() == [0, 0, 0]
    assert len(optimiser.state) == 4


def test_adam_preconditioner_fits_a_trained_generator():
    c = case("hypermarl", "ppo-continuous", torch.float32)
    batch, held_out = halves(c)
    optimiser = torch.optim.AdamW(c.generator.parameters(), lr=1e-3)
    psi = dict(c.generator.named_parameters())
    for _ in range(3):
        optimiser.zero_grad()
        torch.stack(mean_losses(c, psi, batch)).sum().backward()
        optimiser.step()
    weights = adam_preconditioner(optimiser, c.generator)
    double = case("hypermarl", "ppo-continuous")
    double.generator.load_state_dict(c.generator.state_dict())
    batch, held_out = halves(double)
    found = transference(
        double.generator, double.surrogate, batch, held_out, preconditioner=weights
    )
    assert_equals(found, oracle(double, batch, held_out, weights=weights))


def test_an_optimiser_that_moved_nothing_has_no_preconditioner():
    module = Point(1.0, 2.0)
    for optimiser in (
        torch.optim.Adam(module.parameters()),
        torch.optim.Adam([nn.Parameter(torch.ones(2))]),
    ):
        with pytest.raises(UsageError, match=r"`optimiser` must be Adam .* Got optimiser='Adam'"):
            adam_preconditioner(optimiser, module)


def test_halves_have_no_copy_in_common():
    copy = torch.tensor([7, 3, 9, 5, 3, 7, 5, 9, 3])
    batch = {"t": torch.arange(18).view(2, 9), "x": torch.zeros(2, 9, 4)}
    ours, held_out = split_copies(batch, copy)
    assert copy[ours["t"][0]].tolist() == [7, 3, 3, 7, 3]
    assert copy[held_out["t"][0]].tolist() == [9, 5, 5, 9]
    assert ours["t"][1].tolist() == (ours["t"][0] + 9).tolist()
    assert ours["x"].shape == (2, 5, 4)


def test_halves_can_be_drawn():
    copy = torch.arange(40) % 20
    batch = {"copy": copy[None]}
    drawn = set()
    for seed in (0, 0, 1):
        ours, held_out = split_copies(batch, copy, random=torch.Generator().manual_seed(seed))
        sets = [frozenset(half["copy"][0].tolist()) for half in (ours, held_out)]
        assert [len(copies) for copies in sets] == [10, 10]
        assert not sets[0] & sets[1]
        drawn.add(sets[0])
    assert len(drawn) == 2


def test_wrong_arguments_are_named():
    c = case("fups", "q")
    batch, held_out = halves(c)

    def fails(match, generator=c.generator, held_out=held_out, **kwargs):
        with pytest.raises(UsageError, match=match):
            transference(generator, c.surrogate, batch, held_out, **kwargs)

    two = {name: tensor[:2] for name, tensor in held_out.items()}
    fails(
        r"`held_out` must hold .* of 3 agents .* Got held_out=\{'observation': \(2, 5\)",
        held_out=two,
    )
    fails(r"`held_out` must .* Got held_out=\{\}", held_out={})
    fails(r"`length` must be above 0 and finite\. Got length=0", length=0.0)
    fails(r"`length` must be above 0 and finite\. Got length=inf", length=float("inf"))
    zeros = case("fups", "q").generator
    torch.nn.utils.vector_to_parameters(
        torch.zeros(sum(p.numel() for p in zeros.parameters())).double(), zeros.parameters()
    )
    fails("`length` must be given where all trained parameters are 0", zeros)
    fails(
        r"`preconditioner` must name the trained .*\. Got preconditioner=\['w'\]",
        preconditioner={"w": torch.ones(2)},
    )
    weights = {n: torch.ones_like(p) for n, p in c.generator.named_parameters()}
    name, first = next(iter(weights.items()))
    fails("must have the parameter's shape", preconditioner=weights | {name: torch.ones(3)})
    for wrong in (-1.0, torch.nan, torch.inf):
        first = first.clone()
        first.view(-1)[3] = wrong
        fails(
            rf"must hold finite numbers, none below 0\. .*\[{wrong}\]",
            preconditioner=weights | {name: first},
        )
    frozen = case("fups", "q").generator.requires_grad_(False)
    fails("`generator` must have parameters that require a gradient", frozen)
    with pytest.raises(UsageError, match=r"`copy` must have shape \(10,\) .* Got copy=\(9,\)"):
        split_copies(c.batch, torch.arange(9))
    with pytest.raises(UsageError, match=r"`copy` must name at least 2 copies.* Got copy=\[4\]"):
        split_copies(c.batch, torch.full((10,), 4))
