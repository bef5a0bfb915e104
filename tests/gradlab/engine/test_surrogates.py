"""Losses that read their parameters in unusual ways, and callables of unusual kinds."""

import functools
import gc
import warnings
import weakref

import pytest
import torch
from agreement import assert_agrees
from reference import theta_gradients
from torch import nn
from torch.nn import functional

from gradlab.checks import UsageError
from gradlab.engine.accumulate import gradient_moments
from gradlab.engine.part import Part
from gradlab.engine.plan import planned_gradients
from gradlab.engine.recorder import _RULES

AGENTS, SAMPLES = 2, 5
ONES = torch.ones(6, dtype=torch.float64)


def draw(*shape, seed=0):
    random = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(AGENTS, *shape, generator=random, dtype=torch.float64)


def linear(theta, sample):
    return functional.linear(sample["x"], theta["w"], theta.get("b"))


def plain(theta, sample):
    return linear(theta, sample).tanh().square().sum()


LINEAR = {"w": (4, 6), "b": (4,)}
CASES = {}


def case(engine, **shapes):
    """Register a loss with its parameters' shapes, and which engine is to take its first one."""

    def register(loss):
        CASES[loss.__name__] = (loss, shapes, engine)
        return loss

    return register


# torch does not announce these uses to whom watches its functions


@case("general", w=(3, 4, 6))
def parameter_handed_to_an_inner_vmap(theta, sample):
    return torch.vmap(lambda w: (w @ sample["x"]).sin().sum())(theta["w"]).sum()


@case("general", **LINEAR)
def parameter_handed_to_an_inner_grad(theta, sample):
    def inner(w):
        return functional.linear(sample["x"], w).tanh().sum()

    return torch.func.grad(inner)(theta["w"]).square().sum() + linear(theta, sample).sum()


@case("general", **LINEAR)
def read_within_an_inner_vmap(theta, sample):
    both = torch.stack([sample["x"], 2 * sample["x"]])
    return torch.vmap(lambda x: linear(theta, {"x": x}).tanh())(both).square().sum()


@case("general", **LINEAR)
def read_within_an_inner_grad(theta, sample):
    return torch.func.grad(lambda x: plain(theta, {"x": x}))(sample["x"]).square().sum()


@case("general", **LINEAR)
def read_within_an_inner_jvp(theta, sample):
    x = sample["x"]
    return torch.func.jvp(lambda x: plain(theta, {"x": x}), (x,), (x,))[1].square()


@torch.jit.script
def scripted(x, w):
    return (x * w).sum()


@case("general", w=(6,))
def read_within_scripted_code(theta, sample):
    return scripted(sample["x"], theta["w"]).square()


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, gradient * x


@case("general", w=(6,))
def read_within_a_function_with_its_own_backward(theta, sample):
    return Product.apply(sample["x"], theta["w"]).square().sum()


@case("general", **LINEAR)
def read_by_an_operator_of_the_dispatcher(theta, sample):
    return torch.ops.aten.linear(sample["x"], theta["w"], theta["b"]).square().sum()


# what is read without a gradient does not count


@case("structured", **LINEAR)
def target_without_gradient(theta, sample):
    with torch.no_grad():
        target = linear(theta, {"x": 2 * sample["x"]})
    return (linear(theta, sample) - target).square().sum()


@case("structured", **LINEAR)
def parameters_detached(theta, sample):
    fixed = {name: tensor.detach() for name, tensor in theta.items()}
    return (linear(theta, sample) - linear(fixed, {"x": 2 * sample["x"]})).square().sum()


@case("structured", **LINEAR)
def output_detached(theta, sample):
    y = linear(theta, sample)
    return (y - linear(theta, {"x": 2 * sample["x"]}).detach()).square().sum()


@case("structured", **LINEAR)
def only_shape_and_type_asked_for(theta, sample):
    w = theta["w"]
    return linear(theta, sample).square().sum() / w.shape[0] / w.numel() + w.new_zeros(())


@case("structured", **LINEAR)
def norm_of_a_weight_as_a_constant(theta, sample):
    with torch.no_grad():
        scale = theta["w"].norm()
    return plain(theta, sample) / scale


# in-place operations on what a layer returned


@case("structured", **LINEAR)
def output_assigned_to(theta, sample):
    y = linear(theta, sample)
    y[0] = 0
    y[1:3] *= 2
    return y.square().sum()


@case("structured", **LINEAR)
def output_filled_where(theta, sample):
    y = linear(theta, sample)
    y.masked_fill_(y > 0, 0.5)
    return y.square().sum()


@case("structured", w=(2, 3), b=(2, 3))
def layer_norm_of_two_axes_written_over(theta, sample):
    x = sample["x"].view(2, 3)
    return functional.relu_(functional.layer_norm(x, (2, 3), theta["w"], theta["b"])).square().sum()


@case("structured", w=(3, 2))
def looked_up_rows_written_over(theta, sample):
    y = theta["w"][(sample["x"] > 0).long().view(2, 3)]
    z = y + 1
    y.mul_(2)
    return (z * y).sum()


def test_a_layers_output_may_be_written_over_even_if_it_is_a_view(monkeypatch):
    # No layer of torch 2.13 returns one here; its place in the graph would be lost unnoticed.
    def rule(recorder, input, weight):
        y = functional.linear(input, recorder.twin_of(weight))
        return recorder.record("linear", input, torch.stack([y, y])[0], weight)

    def loss(theta, sample):
        y = functional.linear(sample["x"], theta["w"])
        before = y.sum()
        y.mul_(2)
        return y.square().sum() + before

    monkeypatch.setitem(_RULES, functional.linear, rule)
    found = assert_agrees(loss, {"w": draw(4, 6)}, {"x": draw(SAMPLES, 6)})
    assert found.engines == {"w": "structured"}


# layers' inputs and outputs that do not differ between samples


@case("structured", **LINEAR)
def layer_that_sees_no_sample(theta, sample):
    return linear(theta, {"x": ONES}).square().sum() * sample["x"].sum()


@case("structured", **LINEAR)
def loss_that_sees_no_sample(theta, sample):  # noqa: ARG001
    return linear(theta, {"x": ONES}).square().sum()


@case("structured", w=(6,), b=(6,))
def layer_norm_that_sees_no_sample(theta, sample):
    y = functional.layer_norm(ONES.cumsum(0), (6,), theta["w"], theta["b"])
    return (y * sample["x"]).sum().square()


@case("structured", w=(3, 2))
def look_up_that_sees_no_sample(theta, sample):
    return theta["w"][torch.tensor([0, 2, 2])].square().sum() * sample["x"].sum()


# look-ups


@case("structured", w=(3,))
def number_looked_up(theta, sample):
    return theta["w"][(sample["x"] > 0).long()].sum().square()


@case("structured", w=(3,))
def single_number_looked_up(theta, sample):
    return theta["w"][(sample["x"][0] > 0).long()].square()


@case("structured", w=(3, 2))
def looked_up_from_the_end(theta, sample):
    return theta["w"][(sample["x"] > 0).long() - 1].square().sum()


@case("structured", w=(3, 2))
def looked_up_by_short_integers(theta, sample):
    return theta["w"][(sample["x"] > 0).int()].square().sum()


@case("structured", q=(3, 2))
def value_of_a_state_and_action(theta, sample):
    state, action = (sample["x"][:2] > 0).long().unbind()
    return theta["q"][state, action].square()


@case("structured", w=(6, 6))
def place_of_a_later_axis(theta, sample):
    y = linear(theta, sample).view(2, 3)
    action = (sample["x"][0] > 0).long()
    return y[:, action].square().sum() + y[..., action - 1].sum() + y[0, None, action].sum()


@case("structured", w=(3, 2))
def embedding_with_padding(theta, sample):
    numbers = (sample["x"] > 0).long()
    front = functional.embedding(numbers, theta["w"], padding_idx=0)
    back = functional.embedding(numbers, theta["w"], padding_idx=-2)
    return front.square().sum() + back.sin().sum()


@case("general", w=(3, 2))
def embedding_with_padding_read_otherwise_too(theta, sample):
    rows = functional.embedding((sample["x"] > 0).long(), theta["w"], padding_idx=0)
    return rows.square().sum() + theta["w"].sin().sum()


@case("general", w=(3, 6))
def gathered(theta, sample):
    return theta["w"].gather(0, (sample["x"] > 0).long()[None]).square().sum()


@case("structured", w=(4, 3))
def one_hot_input(theta, sample):
    one_hot = functional.one_hot((sample["x"][0] > 0).long(), num_classes=3)
    return linear(theta, {"x": one_hot.double()}).square().sum()


# shapes out of the ordinary


@case("general", w=(6,))
def weight_of_one_axis(theta, sample):
    return functional.linear(sample["x"], theta["w"]).square()


@case("general", w=(4, 6), b=(1,))
def one_bias_for_all_outputs(theta, sample):
    return functional.linear(sample["x"], theta["w"], theta["b"]).square().sum()


@case("general", scale=(), w=(4, 6))
def scalar_parameter(theta, sample):
    return (theta["scale"].exp() * linear(theta, sample)).square().sum()


@case("structured", w=(4, 6), nothing=(0,))
def parameter_without_entries(theta, sample):
    return linear(theta, sample).square().sum() + theta["nothing"].sum()


@case("general", log_std=(4,), w=(4, 6))
def free_standard_deviation(theta, sample):
    normal = torch.distributions.Normal(linear(theta, sample), theta["log_std"].exp())
    return -normal.log_prob(sample["x"][:4]).sum()


@case("general", e=(6,), w=(4, 6))
def parameter_as_a_layers_input(theta, sample):
    return linear(theta, {"x": theta["e"]}).square().sum() * sample["x"].sum()


@case("structured", b=(4,))
def bias_of_a_fixed_weight(theta, sample):
    return functional.linear(sample["x"], torch.ones(4, 6).double(), theta["b"]).square().sum()


@case("general", b=(4,), w=(4, 6))
def bias_added_once_more(theta, sample):
    return (linear(theta, sample).tanh() + theta["b"]).square().sum()


@case("structured", **LINEAR)
def same_layer_on_one_and_on_many(theta, sample):
    many = torch.outer(ONES[:3].cumsum(0), sample["x"])
    return (linear(theta, {"x": many}).tanh().sum(0) * linear(theta, sample)).sum()


@case("general", w=(6,))
def row_by_row(theta, sample):
    return sum((w * x).square().exp() for w, x in zip(theta["w"], sample["x"], strict=True))


@case("general", **LINEAR)
def penalty_on_all_parameters(theta, sample):
    return plain(theta, sample) + sum(p.square().sum() for p in theta.values())


@case("structured", **LINEAR)
def what_it_was_given_rearranged(theta, sample):
    sample["x"] = sample["x"] * 2
    sample["unused"] = sample.pop("x")
    return plain(theta, {"x": sample["unused"]})


@case("structured", **LINEAR)
def called_by_names(theta, sample):
    y = functional.linear(input=sample["x"], bias=theta["b"], weight=theta["w"])
    return y.square().sum()


@case("general", a=(1,))
def leaky_relu_of_its_own(theta, sample):
    return functional.prelu(sample["x"][None], theta["a"]).square().sum()


@case("general", a=(3,))
def leaky_relu_by_channel(theta, sample):
    return functional.prelu(sample["x"].view(1, 3, 2), theta["a"]).square().sum()


@case("general", a=(6,), b=(6,))
def group_norm(theta, sample):
    y = functional.group_norm(sample["x"][None], 2, theta["a"], theta["b"])
    return y.tanh().square().sum()


@case("structured", w=(4, 6))
def equal_values(theta, sample):
    y = linear(theta, sample)
    zero = y - y.detach()  # all equal, with a gradient
    least = torch.minimum(zero, torch.zeros_like(zero)).sum() + torch.relu(zero).sum()
    return least + zero.max() + zero.min() + torch.max(zero) + zero.abs().sum() + zero.norm()


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("name", CASES)
def test_unusual_loss_is_exact(name, engine):
    loss, shapes, taken = CASES[name]
    theta = {parameter: draw(*shape) for parameter, shape in shapes.items()}
    batch = {"x": draw(SAMPLES, 6, seed=1)}
    before = {key: value.clone() for key, value in (theta | batch).items()}
    with warnings.catch_warnings():
        # That a matrix is formed is tested in test_layers; torch's own are about its speed.
        warnings.simplefilter("ignore", UserWarning)
        found = assert_agrees(loss, theta, batch, engine=engine)
    for key, value in (theta | batch).items():
        assert torch.equal(value, before[key])
    wanted = "general" if engine == "general" else taken
    assert found.engines[next(iter(shapes))] == wanted


def test_a_look_up_out_of_range_does_not_read_another_agents_table():
    def loss(theta, sample):
        return functional.embedding(sample["n"], theta["w"]).sum()

    theta = {"w": draw(3, 2)}
    batch = {"n": torch.tensor([[[0, 1]], [[0, 3]]])}
    for engine in ("auto", "general"):
        with pytest.raises(UsageError, match=r"must look up numbers from 0 .* index 3 is out of"):
            gradient_moments(loss, theta, batch, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_fixed_parameters_of_a_module_are_left_alone(engine):
    torch.manual_seed(0)
    head = nn.Linear(4, 2).double()  # requires a gradient, but is not among what is taken apart

    def loss(theta, sample):
        return head(linear(theta, sample)).square().sum()

    batch = {"x": draw(SAMPLES, 6).requires_grad_()}
    found = assert_agrees(loss, {"w": draw(4, 6), "b": draw(4)}, batch, engine=engine)
    assert head.weight.grad is None
    for name in ("sum", "square", "squared_norm"):  # no graph is kept alive by them
        assert not getattr(found, name).requires_grad


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_non_contiguous_and_integer_samples_are_exact(engine):
    def loss(theta, sample):
        return (linear(theta, sample) * sample["n"]).square().sum()

    x = torch.randn(6, SAMPLES, AGENTS, dtype=torch.float64).permute(2, 1, 0)
    numbers = torch.arange(2 * AGENTS * SAMPLES).view(AGENTS, SAMPLES, 2)[..., 0]
    w = torch.randn(6, 4, AGENTS, dtype=torch.float64).permute(2, 1, 0)
    assert_agrees(loss, {"w": w, "b": draw(4)}, {"x": x, "n": numbers}, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_context_is_read_by_all_samples(engine):
    def loss(theta, sample):
        return (linear(theta, sample) @ sample["c"]).square()

    theta, batch = {"w": draw(4, 6)}, {"x": draw(SAMPLES, 6)}
    assert_agrees(loss, theta, batch, engine=engine, context={"c": draw(4)})


def test_autocast_within_a_loss_costs_its_own_precision_only():
    def loss(theta, sample):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(theta, sample).float()

    theta = {"w": draw(4, 6).float(), "b": draw(4).float()}
    batch = {"x": draw(SAMPLES, 6).float()}
    expected = theta_gradients(loss, theta, batch)
    for engine in ("auto", "general"):
        found = gradient_moments(loss, theta, batch, engine=engine, coordinates=True)
        total = torch.cat([g.sum(1).flatten(1) for g in expected.values()], 1).double()
        # bfloat16 has 8 significant bits
        torch.testing.assert_close(found.sum, total, rtol=0, atol=0.02 * total.abs().max().item())


# what a plan is remembered with


class Losses:
    """Two losses of one object, and an object that is a loss."""

    __slots__ = ()

    def linear(self, theta, sample):
        return plain(theta, sample)

    def scaled(self, theta, sample):
        return (theta["w"] * sample["x"][0]).sum().square() + theta["b"].sum()

    __call__ = linear


class Equal:
    """A loss that equals others that do something else, and has no hash."""

    def __init__(self, loss):
        self.loss = loss

    def __eq__(self, other):
        return isinstance(other, Equal)

    __hash__ = None

    def __call__(self, theta, sample):
        return self.loss(theta, sample)


class EqualWithHash(Equal):
    def __hash__(self):
        return 0


SURROGATES = {
    "partial": lambda: functools.partial(plain),
    "method": lambda: Losses().linear,
    "object without weak references": Losses,
    "object without hash": lambda: Equal(plain),
    "lambda": lambda: lambda theta, sample: plain(theta, sample),
    "module": lambda: type("Module", (nn.Module,), {"forward": staticmethod(plain)})(),
}


@pytest.mark.parametrize("kind", SURROGATES)
def test_any_callable_is_a_surrogate(kind):
    theta = {"w": draw(4, 6), "b": draw(4)}
    surrogate = SURROGATES[kind]()
    for seed in (1, 2):
        assert_agrees(surrogate, theta, {"x": draw(SAMPLES, 6, seed=seed)})


def test_two_methods_of_one_object_are_not_taken_for_each_other():
    theta, batch = {"w": draw(4, 6), "b": draw(4)}, {"x": draw(SAMPLES, 6)}
    losses = type("Losses", (Losses,), {})()
    assert assert_agrees(losses.linear, theta, batch).engines["w"] == "structured"
    with pytest.warns(UserWarning, match="w are formed"):
        found = assert_agrees(losses.scaled, theta, batch)
    assert found.engines["w"] == "general"
    assert assert_agrees(losses.linear, theta, batch).engines["w"] == "structured"


def test_losses_that_claim_to_be_equal_are_still_exact():
    theta, batch = {"w": draw(4, 6), "b": draw(4)}, {"x": draw(SAMPLES, 6)}
    first, second = EqualWithHash(plain), EqualWithHash(Losses().scaled)
    assert_agrees(first, theta, batch)
    with pytest.warns(UserWarning, match="w are formed"):
        found = assert_agrees(second, theta, batch)
    assert found.engines["w"] == "general"


def test_a_loss_that_comes_to_read_more_is_exact_and_its_engines_are_up_to_date():
    theta, batch = {"w": draw(4, 6), "b": draw(4)}, {"x": draw(SAMPLES, 6)}
    names = ["w"]

    def changing(theta, sample):
        return plain({name: theta[name] for name in names}, sample)

    assert assert_agrees(changing, theta, batch).engines["b"] == "unused"
    names.append("b")
    found = assert_agrees(changing, theta, batch)
    assert found.engines == {"w": "structured", "b": "structured"}


def test_a_loss_that_comes_to_read_otherwise_within_a_batch_is_refused():
    calls = 0

    def changing(theta, sample):
        nonlocal calls
        calls += 1
        extra = (theta["w"] ** 2).sum() if calls % 3 == 0 else 0
        return plain(theta, sample) + extra

    theta, batch = {"w": draw(4, 6), "b": draw(4)}, {"x": draw(SAMPLES, 6)}
    with pytest.raises(UsageError, match=r"in the same way for all samples\. Got another use of w"):
        gradient_moments(changing, theta, batch, budget=1)


def test_a_plan_of_another_owner_that_no_longer_fits_is_made_anew():
    class Owner:
        pass

    owner, theta = Owner(), {"w": draw(4, 6), "b": draw(4)}
    part = Part(batch={"x": draw(SAMPLES, 6)})
    for loss in (plain, Losses().scaled):
        found = planned_gradients(loss, theta, part, owner=owner, warn=False)
        expected = theta_gradients(loss, theta, part.batch)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient.rows(), expected[name], rtol=1e-10, atol=1e-12)


def test_the_memo_keeps_no_surrogate_alive():
    def loss(theta, sample):
        return plain(theta, sample)

    gradient_moments(loss, {"w": draw(4, 6)}, {"x": draw(SAMPLES, 6)})
    last = weakref.ref(loss)
    del loss
    gc.collect()
    assert last() is None


# what must not be written over


def batch_written(theta, sample):
    sample["x"].mul_(2)
    return plain(theta, sample)


def batch_written_through_a_view(theta, sample):
    sample["x"][0] = 0
    return plain(theta, sample)


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("loss", [batch_written, batch_written_through_a_view])
def test_a_loss_that_writes_over_its_batch_is_refused_at_no_harm(loss, engine):
    theta, batch = {"w": draw(4, 6), "b": draw(4)}, {"x": draw(SAMPLES, 6)}
    before = batch["x"].clone()
    with pytest.raises(UsageError, match=r"must not write in place\. It wrote over 'x'"):
        gradient_moments(loss, theta, batch, engine=engine)
    assert torch.equal(batch["x"], before)


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_a_loss_that_writes_over_parameters_is_refused(engine):
    def direct(theta, sample):
        theta["w"].mul_(2)
        return plain(theta, sample)

    def detached(theta, sample):
        theta["w"].detach().mul_(2)
        return plain(theta, sample)

    for loss in (direct, detached):
        with pytest.raises(UsageError, match="must not write in place"):
            gradient_moments(loss, {"w": draw(4, 6)}, {"x": draw(SAMPLES, 6)}, engine=engine)


REFUSED = {
    "autograd": (
        lambda theta, sample: torch.autograd.grad(plain(theta, sample), theta["w"])[0].sum(),
        "Use torch.func.grad in place of torch.autograd.grad",
    ),
    "requires_grad_": (
        lambda theta, sample: plain(theta, {"x": sample["x"].detach().requires_grad_()}),
        "Use torch.func.grad in place of torch.autograd.grad, requires_grad_()",
    ),
    "backward": (lambda theta, sample: plain(theta, sample).backward(), "and backward()"),
    "data": (
        lambda theta, sample: plain(theta, sample) - theta["w"].data.sum(),
        r"Use `\.detach\(\)`",
    ),
    "numpy": (
        lambda theta, sample: plain(theta, sample) * sample["x"].numpy().sum(),
        "must be made of torch functions",
    ),
    "checkpoint": (
        lambda theta, sample: torch.utils.checkpoint.checkpoint(
            lambda x: plain(theta, {"x": x}), sample["x"], use_reentrant=False
        ),
        "leave out torch.utils.checkpoint",
    ),
    "random": (
        lambda theta, sample: plain(theta, sample) * torch.randn(()),
        "must not draw random numbers",
    ),
    "norm of rows": (
        lambda theta, sample: functional.embedding(
            (sample["x"] > 0).long(), theta["w"], max_norm=1.0
        ).sum(),
        "must leave its table as it is .*Got max_norm=1.0",
    ),
    "frequencies": (
        lambda theta, sample: functional.embedding(
            (sample["x"] > 0).long(), theta["w"], scale_grad_by_freq=True
        ).sum(),
        "Got max_norm=None, scale_grad_by_freq=True; use neither",
    ),
    "classes": (
        lambda theta, sample: (
            plain(theta, sample) * functional.one_hot((sample["x"] > 0).long()).sum()
        ),
        "must be given `num_classes`",
    ),
    "integer": (lambda theta, sample: plain(theta, sample).long(), "floating-point.*torch.int64"),
    "no such sample": (
        lambda theta, sample: plain(theta, sample) * sample["advantage"],
        "`batch` must hold what `surrogate` reads. Got no 'advantage' among x",
    ),
    "no such parameter": (
        lambda theta, sample: plain(theta, sample) * theta["log_std"],
        "`theta` must hold what `surrogate` reads. Got no 'log_std' among w, b",
    ),
}


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_engine_takes_is_named_with_its_mend(name, engine):
    loss, message = REFUSED[name]
    theta, batch = {"w": draw(4, 6), "b": draw(4)}, {"x": draw(SAMPLES, 6)}
    with pytest.raises(UsageError, match=message) as caught:
        gradient_moments(loss, theta, batch, engine=engine)
    assert "\n" not in str(caught.value)


def test_an_error_of_the_loss_itself_is_passed_on():
    def loss(theta, sample):
        return plain(theta, sample) * {"one": 1}["two"]

    with pytest.raises(KeyError, match="two"):
        gradient_moments(loss, {"w": draw(4, 6)}, {"x": draw(SAMPLES, 6)})


def test_a_loss_may_try_for_what_there_is_not():
    def loss(theta, sample):
        try:
            weight = sample["weight"]
        except KeyError:
            weight = 2.0
        return weight * plain(theta, sample)

    found = gradient_moments(loss, {"w": draw(4, 6)}, {"x": draw(SAMPLES, 6)})
    single = gradient_moments(plain, {"w": draw(4, 6)}, {"x": draw(SAMPLES, 6)})
    torch.testing.assert_close(found.sum, 2 * single.sum)
