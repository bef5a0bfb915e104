import warnings

import pytest
import torch
from agreement import assert_agrees
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from gradlab.checks import UsageError
from gradlab.engine.accumulate import gradient_moments

AGENTS, SAMPLES = 2, 5
MASK = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])


class Net(nn.Module):
    """A module from its parts and what happens between them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self._run(self, x)


def linear_and_relu_(m, x):
    return m.b(functional.relu(m.a(x), inplace=True))


def masked_gru(m, x):
    """A GRU cell over time whose state starts anew where an episode ended."""
    hidden, outputs = torch.zeros(4, dtype=x.dtype), []
    for step in x:
        hidden = m.cell(step[None], hidden[None])[0]
        outputs.append(m.head(hidden))
        hidden = torch.where(step[0] > 0, torch.zeros_like(hidden), hidden)
    return torch.stack(outputs)


def packed(m, x):
    return m.g(nn.utils.rnn.pack_sequence([x[None]]))[0].data


def already_packed(m, x):
    rows = nn.utils.rnn.PackedSequence(x[None], torch.ones(1, dtype=torch.long))
    return m.g(rows)[0].data


def zeroed(m, x):
    y = m.a(x)
    y[x[:3] > 0] = 0
    return y


def whole_gru(m, x):
    return m.head(m.gru(x)[0])


def gru_with_state(m, x):
    return m.head(m.gru(x, torch.full((2, 4), 0.1, dtype=x.dtype))[0])


def cell(m, x):
    state = m.cell(x)
    return m.head(state[0] if isinstance(state, tuple) else state)


def last_state(m, x):
    last = m.rnn(x)[1]
    return m.head(torch.cat(last) if isinstance(last, tuple) else last)


def padded(m, x):
    return m.out(m.embedding((x > 0).long()).sum(-2))


def in_sequence(m, x):
    return m.layers(x)


def picked(m, x):
    return m.a(x).log_softmax(-1)[(x[0] > 0).long()]


def twice(m, x):
    return m.a(torch.tanh(m.a(x)))


def tied(m, x):
    return functional.linear(torch.tanh(m.a(x)), m.a.weight.T)


def table(m, x):
    return m.out(m.a(x).tanh()) + m.scale[(x[..., 0] > 0).long()]


def lookup(m, x):
    return m.out(m.embedding((x[..., 0] > 0).long() + (x[..., 1] > 0).long()))


def tied_embedding(m, x):
    rows = m.embedding((x[..., 0] > 0).long())
    return functional.linear(torch.tanh(rows), m.embedding.weight)


def derived_weight(m, x):
    return functional.linear(x, m.a.weight / m.a.weight.norm(), m.a.bias)


def sliced_weight(m, x):
    return functional.linear(x[..., :3], m.a.weight[:, :3])


def norm(m, x):
    return m.out(m.norm(m.a(x)))


def shared_output(m, x):
    y = m.a(x)
    return m.b(y) + y.sum(-1, keepdim=True) + m.b(y * y)


def added_in_place(m, x):
    y = m.a(x)
    y = y.clone()
    y += 1
    return y * y


def written_over(m, x):
    y = m.a(x)
    z = m.b(y)
    y.mul_(2)
    return z.sum() + y.sum()


TIME = (3, 6)
NETS = {
    "linear": (lambda: Net(lambda m, x: m.a(x), a=nn.Linear(6, 3)), (6,)),
    "no bias": (lambda: Net(lambda m, x: m.a(x), a=nn.Linear(6, 3, bias=False)), (6,)),
    "inplace relu": (lambda: Net(linear_and_relu_, a=nn.Linear(6, 4), b=nn.Linear(4, 2)), (6,)),
    "time axis": (
        lambda: Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(6, 4), b=nn.Linear(4, 2)),
        TIME,
    ),
    "long time": (lambda: Net(lambda m, x: m.a(x).sin(), a=nn.Linear(6, 4)), (40, 6)),
    "two axes": (lambda: Net(lambda m, x: m.a(x).sin(), a=nn.Linear(6, 4)), (2, 3, 6)),
    "number as index": (lambda: Net(picked, a=nn.Linear(6, 3)), (6,)),
    "twice": (lambda: Net(twice, a=nn.Linear(6, 6)), (6,)),
    "shared output": (lambda: Net(shared_output, a=nn.Linear(6, 4), b=nn.Linear(4, 2)), (6,)),
    "in place": (lambda: Net(added_in_place, a=nn.Linear(6, 4)), (6,)),
    "layer norm": (
        lambda: Net(norm, a=nn.Linear(6, 4), norm=nn.LayerNorm(4), out=nn.Linear(4, 2)),
        (6,),
    ),
    "layer norm no bias": (
        lambda: Net(norm, a=nn.Linear(6, 4), norm=nn.LayerNorm(4, bias=False), out=nn.Linear(4, 2)),
        (6,),
    ),
    "layer norm time": (
        lambda: Net(norm, a=nn.Linear(6, 4), norm=nn.LayerNorm(4), out=nn.Linear(4, 2)),
        TIME,
    ),
    "layer norm 2d": (
        lambda: Net(lambda m, x: m.norm(m.a(x)), a=nn.Linear(6, 4), norm=nn.LayerNorm((3, 4))),
        TIME,
    ),
    "embedding": (lambda: Net(lookup, embedding=nn.Embedding(3, 4), out=nn.Linear(4, 2)), (6,)),
    "embedding time": (
        lambda: Net(lookup, embedding=nn.Embedding(3, 4), out=nn.Linear(4, 2)),
        TIME,
    ),
    "table": (
        lambda: Net(
            table, a=nn.Linear(6, 4), out=nn.Linear(4, 2), scale=nn.Parameter(torch.randn(2, 2))
        ),
        (6,),
    ),
    "unused": (lambda: Net(lambda m, x: m.a(x), a=nn.Linear(6, 3), b=nn.Linear(2, 2)), (6,)),
    "gru cell with resets": (
        lambda: Net(masked_gru, cell=nn.GRUCell(6, 4), head=nn.Linear(4, 2)),
        TIME,
    ),
    "gru": (
        lambda: Net(
            whole_gru, gru=nn.GRU(6, 4, num_layers=2, batch_first=True), head=nn.Linear(4, 2)
        ),
        TIME,
    ),
    "rnn": (lambda: Net(last_state, rnn=nn.RNN(6, 4, 2), head=nn.Linear(4, 2)), TIME),
    "rnn relu": (
        lambda: Net(last_state, rnn=nn.RNN(6, 4, nonlinearity="relu"), head=nn.Linear(4, 2)),
        TIME,
    ),
    "rnn cell": (lambda: Net(cell, cell=nn.RNNCell(6, 4), head=nn.Linear(4, 2)), (6,)),
    "lstm": (lambda: Net(last_state, rnn=nn.LSTM(6, 4, 2), head=nn.Linear(4, 2)), TIME),
    "lstm no bias": (
        lambda: Net(last_state, rnn=nn.LSTM(6, 4, bias=False), head=nn.Linear(4, 2)),
        TIME,
    ),
    "lstm cell": (lambda: Net(cell, cell=nn.LSTMCell(6, 4), head=nn.Linear(4, 2)), (6,)),
    "gru cell no bias": (
        lambda: Net(cell, cell=nn.GRUCell(6, 4, bias=False), head=nn.Linear(4, 2)),
        (6,),
    ),
    "embedding with padding": (
        lambda: Net(padded, embedding=nn.Embedding(3, 4, padding_idx=1), out=nn.Linear(4, 2)),
        (6,),
    ),
    "all in place": (
        lambda: Net(
            in_sequence,
            layers=nn.Sequential(
                nn.Linear(6, 4),
                nn.LayerNorm(4),
                nn.ELU(inplace=True),
                nn.Linear(4, 3),
                nn.LayerNorm((3, 3)),
                nn.LeakyReLU(inplace=True),
            ),
        ),
        TIME,
    ),
    "dropout in eval mode": (
        lambda: Net(in_sequence, layers=nn.Sequential(nn.Linear(6, 4), nn.Dropout())).eval(),
        (6,),
    ),
    "gru with state": (
        lambda: Net(gru_with_state, gru=nn.GRU(6, 4, num_layers=2), head=nn.Linear(4, 2)),
        TIME,
    ),
}
FORMED = {
    "tied": (lambda: Net(tied, a=nn.Linear(6, 4)), (6,)),
    "tied embedding": (lambda: Net(tied_embedding, embedding=nn.Embedding(3, 4)), (6,)),
    "derived weight": (lambda: Net(derived_weight, a=nn.Linear(6, 4)), (6,)),
    "sliced weight": (lambda: Net(sliced_weight, a=nn.Linear(6, 4)), (6,)),
    "matmul": (lambda: Net(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(6, 4))), (6,)),
    "einsum": (
        lambda: Net(
            lambda m, x: torch.einsum("i,ij->j", x, m.w), w=nn.Parameter(torch.randn(6, 4))
        ),
        (6,),
    ),
    "attention": (
        lambda: Net(
            lambda m, x: m.a(x[None], x[None], x[None])[0],
            a=nn.MultiheadAttention(6, 2, batch_first=True),
        ),
        TIME,
    ),
    "convolution": (
        lambda: Net(
            lambda m, x: m.out(m.c(x).flatten()), c=nn.Conv1d(3, 2, 3), out=nn.Linear(8, 2)
        ),
        TIME,
    ),
}


def build(make, shape):
    torch.manual_seed(0)
    module = make().double()
    batch = {
        "x": torch.randn(AGENTS, SAMPLES, *shape, dtype=torch.float64),
        "w": torch.randn(AGENTS, SAMPLES, dtype=torch.float64),
    }
    theta = {
        name: torch.stack([p.detach(), p.detach() + 0.1]) for name, p in module.named_parameters()
    }

    def loss(theta, sample):
        y = functional_call(module, theta, (sample["x"],))
        return sample["w"] * y.square().sum() + y.sum()

    return loss, theta, batch


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("name", NETS)
def test_known_layers_are_exact_without_forming_gradients(name, mask):
    found = assert_agrees(*build(*NETS[name]), mask)
    assert set(found.engines.values()) <= {"structured", "unused"}


@pytest.mark.parametrize("name", NETS)
def test_general_engine_takes_them_too(name):
    found = assert_agrees(*build(*NETS[name]), engine="general")
    assert set(found.engines.values()) <= {"general", "unused"}


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("name", FORMED)
def test_other_layers_are_formed_and_said_once(name, mask):
    loss, theta, batch = build(*FORMED[name])
    with pytest.warns(UserWarning, match="are formed one by one"):
        found = assert_agrees(loss, theta, batch, mask)
    assert "general" in found.engines.values()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_moments(loss, theta, batch, mask=mask)


def test_a_model_may_mix_both_engines():
    loss, theta, batch = build(*FORMED["convolution"])
    with pytest.warns(UserWarning, match=r"c\.weight"):
        engines = gradient_moments(loss, theta, batch).engines
    assert engines["c.weight"] == "general"
    assert engines["out.weight"] == engines["out.bias"] == "structured"


def test_shared_parameters_need_no_copies_per_agent():
    loss, theta, batch = build(*NETS["layer norm"])
    assert_agrees(loss, {name: t[:1] for name, t in theta.items()}, batch)


def test_a_surrogate_that_changes_its_mind_is_still_exact():
    loss, theta, batch = build(*NETS["linear"])
    scaled = False

    def surrogate(theta, sample):
        if scaled:
            return loss(theta, sample) + (theta["a.weight"] ** 2).sum()
        return loss(theta, sample)

    assert_agrees(surrogate, theta, batch)
    scaled = True
    with pytest.warns(UserWarning, match="are formed"):
        assert_agrees(surrogate, theta, batch)
    scaled = False
    assert_agrees(surrogate, theta, batch)


BAD = {
    "dropout": (
        lambda: Net(lambda m, x: m.d(m.a(x)), a=nn.Linear(6, 3), d=nn.Dropout()),
        "must not draw random numbers",
    ),
    "batch norm": (
        lambda: Net(lambda m, x: m.n(m.a(x)[None])[0], a=nn.Linear(6, 3), n=nn.BatchNorm1d(3)),
        "Batch norm in training mode mixes samples",
    ),
    "branch": (
        lambda: Net(lambda m, x: m.a(x) if x.sum() > 0 else -m.a(x), a=nn.Linear(6, 3)),
        "must not branch on a tensor's value",
    ),
    "in place": (
        lambda: Net(lambda m, x: torch.zeros(3, dtype=x.dtype).add_(m.a(x)), a=nn.Linear(6, 3)),
        "must not write in place",
    ),
    "input written over": (
        lambda: Net(written_over, a=nn.Linear(6, 3), b=nn.Linear(3, 2)),
        "must not write in place",
    ),
    "projected": (
        lambda: Net(lambda m, x: m.g(x[None])[0], g=nn.LSTM(6, 3, proj_size=2)),
        "must be unidirectional, .* Got projections; loop over torch.nn.LSTMCell",
    ),
    "dropout between layers": (
        lambda: Net(lambda m, x: m.g(x[None])[0], g=nn.GRU(6, 3, 2, dropout=0.5)),
        r"torch.nn.GRU under .* Got dropout=0\.5 in training mode",
    ),
    "bidirectional": (
        lambda: Net(lambda m, x: m.g(x[None])[0], g=nn.GRU(6, 3, bidirectional=True)),
        "Got bidirectional=True; loop over torch.nn.GRUCell",
    ),
    "packed": (
        lambda: Net(packed, g=nn.GRU(6, 3)),
        "functions that torch.func.vmap knows.*in place of packed sequences, pad them",
    ),
    "handed in packed": (
        lambda: Net(already_packed, g=nn.LSTM(6, 3)),
        "Got a packed sequence; pad it, and leave",
    ),
    "picked by a mask": (
        lambda: Net(lambda m, x: m.a(x)[x[:3] > 0], a=nn.Linear(6, 3)),
        "must not pick by a mask",
    ),
    "written by a mask": (
        lambda: Net(zeroed, a=nn.Linear(6, 3)),
        "must not pick by a mask",
    ),
}


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("name", BAD)
def test_what_no_engine_takes_is_named_with_its_mend(name, engine):
    make, message = BAD[name]
    loss, theta, batch = build(make, (6,))
    with pytest.raises(UsageError, match=message):
        gradient_moments(loss, theta, batch, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda theta, sample: sample["x"] * theta["a.weight"].sum(), r"Got shape \(6,\)"),
        (lambda theta, sample: 1.0, "Got float"),  # noqa: ARG005
    ],
)
def test_a_loss_that_is_not_per_sample_is_refused(wrong, got, engine):
    _, theta, batch = build(*NETS["linear"])
    with pytest.raises(UsageError, match=got):
        gradient_moments(wrong, theta, batch, engine=engine)
