"""Recurrent policies of somebody else's loop: a sample is a segment of a trajectory."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradlab
from gradlab.checks import UsageError

AGENTS, SEGMENTS, TIME, OBSERVATION, HIDDEN, ACTIONS = 3, 8, 6, 4, 5, 3
COPY = torch.arange(SEGMENTS) % 4
OF_ACTOR = {"network": "actor", "space": "psi", "layer": "all"}


class Cells(nn.Module):
    """A GRU cell called step by step; a state is forgotten where an episode starts."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(OBSERVATION, HIDDEN)
        self.cell = nn.GRUCell(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, ACTIONS)

    def forward(self, obs, start, state):
        features, logits = self.encoder(obs).tanh(), []
        for step in range(len(obs)):
            state = self.cell(features[step], state * (1 - start[step]))
            logits.append(self.head(state))
        return torch.stack(logits)


class Layer(nn.Module):
    """A layer over time that is called once for each step, as single-file PPOs do."""

    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.layer = kind(OBSERVATION, HIDDEN)
        self.head = nn.Linear(HIDDEN, ACTIONS)

    def forward(self, obs, start, state):
        states = (state[None],) * (2 if isinstance(self.layer, nn.LSTM) else 1)
        logits = []
        for step in range(len(obs)):
            states = tuple(s * (1 - start[step]) for s in states)
            seen, new = self.layer(obs[step][None], states if len(states) > 1 else states[0])
            states = new if isinstance(new, tuple) else (new,)
            logits.append(self.head(seen[0]))
        return torch.stack(logits)


class Whole(nn.Module):
    """Layers that read a whole segment at once, with a batch axis of 1; no episode ends inside."""

    def __init__(self):
        super().__init__()
        self.layers = nn.GRU(OBSERVATION, HIDDEN, num_layers=2, batch_first=True)
        self.head = nn.Linear(HIDDEN, ACTIONS)

    def forward(self, obs, start, state):
        state = torch.stack([state, state.cos()])[:, None] * (1 - start[0])
        return self.head(self.layers(obs[None], state)[0][0])


class Keeping(Cells):
    """The same as `Cells`, with a state that it keeps in an attribute between its calls."""

    def reset(self, state):
        self.state = state

    def forward(self, obs, start, state):  # noqa: ARG002
        logits = []
        for step in range(len(obs)):
            features = self.encoder(obs[step]).tanh()
            self.state = self.cell(features, self.state * (1 - start[step]))
            logits.append(self.head(self.state))
        return torch.stack(logits)


def loss(policy, segment):
    if isinstance(policy, Keeping):
        policy.reset(segment["state"])
    logits = policy(segment["obs"], segment["start"], segment["state"])
    chosen = logits.log_softmax(-1).gather(-1, segment["action"][:, None])[:, 0]
    return -(segment["exists"] * segment["advantage"] * chosen).sum()


def seeded(make):
    torch.manual_seed(0)
    return make()


def segments():
    random = torch.Generator().manual_seed(1)
    shape = (AGENTS, SEGMENTS, TIME)

    def drawn(*more):
        return torch.randn(*shape, *more, generator=random, dtype=torch.float64)

    length = torch.randint(2, TIME + 1, shape[:2], generator=random)
    return {
        "obs": drawn(OBSERVATION),
        "action": torch.randint(ACTIONS, shape, generator=random),
        "advantage": drawn(),
        "start": (torch.rand(shape, generator=random) < 0.3).double(),
        "exists": torch.arange(TIME) < length[..., None],  # the rest fills a segment up
        "state": drawn(HIDDEN)[:, :, 0],
    }


def oracle(policy, batch):
    """Each segment's gradient by torch's own functions, [agent, segment, psi]."""
    trained = list(policy.parameters())
    rows = torch.zeros(AGENTS, SEGMENTS, sum(p.numel() for p in trained), dtype=torch.float64)
    for agent in range(AGENTS):
        own = policy[agent] if isinstance(policy, nn.ModuleList) else policy
        for segment in range(SEGMENTS):
            of = loss(own, {name: tensor[agent, segment] for name, tensor in batch.items()})
            found = torch.autograd.grad(of, trained, materialize_grads=True, allow_unused=True)
            rows[agent, segment] = torch.cat([gradient.flatten() for gradient in found])
    return rows


POLICIES = {
    "cells": Cells,
    "layer, step by step": Layer,
    "lstm, step by step": lambda: Layer(nn.LSTM),
    "layers over a segment": Whole,
    "state in an attribute": Keeping,
    "own cells": lambda: nn.ModuleList([Cells() for _ in range(AGENTS)]),
    "own layers": lambda: nn.ModuleList([Layer() for _ in range(AGENTS)]),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_segments_gradients_are_exact(kind, tmp_path):
    policy, batch = seeded(POLICIES[kind]).double(), segments()
    rows = oracle(copy.deepcopy(policy), batch)
    with (
        warnings.catch_warnings(action="error"),
        gradlab.Probe(policy, loss, agents=AGENTS, every=1, out=tmp_path / "run") as probe,
    ):
        found = probe(batch, copy=COPY)
    g = rows.mean(1)
    whole = found.sel(OF_ACTOR)
    exact = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(whole.norm, g.norm(dim=1), **exact)
    cosine = torch.nn.functional.cosine_similarity(g[:, None], g, dim=-1)
    off = ~np.eye(AGENTS, dtype=bool)
    np.testing.assert_allclose(whole.cosine.values[off], cosine[off], **exact)
    other = COPY[:, None] != COPY  # without the products of segments of one copy
    products = torch.einsum("isp,jtp,st->ij", rows, rows, other.double()) / other.sum()
    np.testing.assert_allclose(whole.squared_norm_debiased, products.diagonal(), **exact)
    assert found.residual < 1e-12
    engines = gradlab.open_run(tmp_path / "run").info["engines"]["actor"]
    assert set(engines.values()) == {"structured"}


class Forgetful(Keeping):
    """Goes on from whatever it was left with."""

    def __init__(self):
        super().__init__()
        self.state = torch.zeros(HIDDEN, dtype=torch.float64)

    def reset(self, state):
        pass


class Branching(Cells):
    def forward(self, obs, start, state):
        state = torch.zeros_like(state) if start[0] else state
        return super().forward(obs, start, state)


class Masking(Cells):
    def forward(self, obs, start, state):
        state = state.clone()
        state[start[:1].bool().expand(HIDDEN)] = 0
        return super().forward(obs, start, state)


class Filling(Cells):
    def forward(self, obs, start, state):
        logits = torch.zeros(TIME, ACTIONS, dtype=torch.float64)
        for step, found in enumerate(super().forward(obs, start, state)):
            logits[step] = found
        return logits


class Packing(Whole):
    def forward(self, obs, start, state):  # noqa: ARG002
        packed = self.layers(nn.utils.rnn.pack_sequence([obs]))[0]
        return self.head(nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Branching, "`loss` must not branch on a tensor's value. Use torch.where"),
        (Masking, "`loss` must not pick by a mask.*Use torch.where"),
        (Filling, "`loss` must not write in place.*torch.stack for"),
        (Packing, "torch.nn.GRU under.*Got a packed sequence; pad it"),
    ],
)
def test_what_cannot_be_taken_apart_is_explained(make, message, tmp_path):
    batch = segments()
    with gradlab.Probe(
        seeded(make).double(), loss, agents=AGENTS, every=1, out=tmp_path / "run"
    ) as probe:
        with pytest.raises(UsageError, match=message) as raised:
            probe(batch)
        assert "\n" not in str(raised.value)


def test_state_that_goes_from_one_sample_to_the_next_is_noticed_once_it_is_read(tmp_path):
    batch = segments()
    begun = batch | {"start": torch.ones_like(batch["start"])}
    later = batch | {"start": torch.zeros_like(batch["start"])}
    settings = {"agents": AGENTS, "every": 1}
    policy = seeded(Forgetful).double()
    with (
        gradlab.Probe(policy, loss, out=tmp_path / "at once", **settings) as probe,
        pytest.raises(UsageError, match=r"called again .* hand the state in with the sample"),
    ):
        probe(later)
    with gradlab.Probe(policy, loss, out=tmp_path / "later", **settings) as probe:
        assert probe(begun) is not None
        with pytest.raises(UsageError, match=r"set it when `loss` begins"):
            probe(later)
