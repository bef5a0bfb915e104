"""Recurrent policies: a sample is a segment of a trajectory, with resets where episodes end."""

import pytest
import torch
from agreement import assert_agrees
from reference import theta_gradients
from torch import nn
from torch.func import functional_call

from gradlab.engine.accumulate import gradient_moments
from gradlab.engine.part import Part
from gradlab.engine.plan import planned_gradients

AGENTS, SEGMENTS, TIME, OBSERVATION, HIDDEN, ACTIONS = 2, 4, 7, 3, 5, 4
CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


class Recurrent(nn.Module):
    """Logits at every step; the state of an episode's first step is 0."""

    def __init__(self, kind):
        super().__init__()
        self.encoder = nn.Linear(OBSERVATION, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.cell = CELLS[kind](HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, ACTIONS)

    def forward(self, observation, starts, state):
        features = torch.tanh(self.norm(self.encoder(observation)))
        logits = []
        for step in range(len(observation)):
            state = tuple(torch.where(starts[step], torch.zeros_like(s), s) for s in state)
            new = self.cell(features[step], state if len(state) > 1 else state[0])
            state = new if isinstance(new, tuple) else (new,)
            logits.append(self.head(state[0]))
        return torch.stack(logits)


def make(kind):
    torch.manual_seed(0)
    module = Recurrent(kind).double()
    states = 2 if kind == "lstm" else 1
    theta = {
        name: torch.stack([p.detach() + 0.1 * agent for agent in range(AGENTS)])
        for name, p in module.named_parameters()
    }
    batch = {
        "observation": torch.randn(AGENTS, SEGMENTS, TIME, OBSERVATION, dtype=torch.float64),
        "action": torch.randint(ACTIONS, (AGENTS, SEGMENTS, TIME)),
        "advantage": torch.randn(AGENTS, SEGMENTS, TIME, dtype=torch.float64),
        "starts": torch.rand(AGENTS, SEGMENTS, TIME) < 0.3,
        "exists": torch.ones(AGENTS, SEGMENTS, TIME, dtype=torch.bool),
        # what a rollout's beginning cut off: handed in, no gradient goes through it
        "state": torch.randn(AGENTS, SEGMENTS, states, HIDDEN, dtype=torch.float64),
    }

    def loss(theta, sample):
        state = tuple(sample["state"].unbind())
        logits = functional_call(module, theta, (sample["observation"], sample["starts"], state))
        chosen = logits.log_softmax(-1).gather(-1, sample["action"][:, None]).squeeze(-1)
        return -(sample["exists"] * sample["advantage"] * chosen).sum()

    return loss, theta, batch


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_segments_are_exact(kind, engine):
    loss, theta, batch = make(kind)
    mask = torch.tensor([[True] * 4, [True, False, True, True]])
    for exists in (None, mask):
        found = assert_agrees(loss, theta, batch, exists, engine=engine)
        assert set(found.engines.values()) == {"structured" if engine == "auto" else "general"}


@pytest.mark.parametrize("kind", CELLS)
def test_each_segments_gradient_is_its_own(kind):
    loss, theta, batch = make(kind)
    expected = theta_gradients(loss, theta, batch)
    found = planned_gradients(loss, theta, Part(batch=batch))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.rows(), expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CELLS)
def test_no_gradient_crosses_the_end_of_an_episode(kind):
    # A segment that a reset cuts in two has the sum of the gradients of its two episodes.
    loss, theta, batch = make(kind)
    cut = 3
    batch["starts"][:] = False
    batch["starts"][..., cut] = True

    def half(steps):
        picked = {name: t[:, :, steps] for name, t in batch.items() if name != "state"}
        return gradient_moments(loss, theta, picked | {"state": batch["state"]}).sum

    whole = gradient_moments(loss, theta, batch).sum
    parts = half(slice(0, cut)) + half(slice(cut, TIME))
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CELLS)
def test_a_segment_cut_short_by_the_rollout_may_be_filled_up(kind):
    loss, theta, batch = make(kind)
    length = 4
    batch["exists"][:, 0, length:] = False  # what stands there counts for nothing
    filled = gradient_moments(loss, theta, {name: t[:, :1] for name, t in batch.items()})
    short = {n: t[:, :1] if n == "state" else t[:, :1, :length] for n, t in batch.items()}
    cut = gradient_moments(loss, theta, short)
    torch.testing.assert_close(filled.sum, cut.sum, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(filled.squared_norm, cut.squared_norm, rtol=1e-10, atol=1e-12)


def test_a_layer_over_time_equals_its_cell():
    torch.manual_seed(0)
    layer = nn.GRU(OBSERVATION, HIDDEN).double()
    cell = nn.GRUCell(OBSERVATION, HIDDEN).double()
    cell.load_state_dict({
        name.removesuffix("_l0"): tensor for name, tensor in layer.state_dict().items()
    })
    observation = torch.randn(AGENTS, SEGMENTS, TIME, OBSERVATION, dtype=torch.float64)

    def of_layer(theta, sample):
        return functional_call(layer, theta, (sample["x"],))[0].square().sum()

    def of_cell(theta, sample):
        state, total = torch.zeros(HIDDEN, dtype=torch.float64), 0
        for x in sample["x"]:
            state = functional_call(cell, theta, (x, state))
            total = total + state.square().sum()
        return total

    sums = [
        gradient_moments(
            loss, {n: p.detach()[None] for n, p in module.named_parameters()}, {"x": observation}
        ).sum
        for loss, module in ((of_layer, layer), (of_cell, cell))
    ]
    torch.testing.assert_close(*sums, rtol=1e-10, atol=1e-12)
