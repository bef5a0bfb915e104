"""What users hand in by mistake: refused in one line that names it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from gradlab.checks import UsageError
from gradlab.decomposition import decompose
from gradlab.engine.accumulate import gradient_moments
from gradlab.engine.gram import sample_gram
from trainers.config import SharingConfig
from trainers.generators import METHODS
from trainers.networks import MLP

AGENTS, SAMPLES = 2, 5
THETA = {"w": torch.ones(AGENTS, 3, 6), "b": torch.ones(1, 3)}
BATCH = {"x": torch.ones(AGENTS, SAMPLES, 6)}
TYPES = r"`theta` must hold tensors all of float32 or all of float64, at least one; convert with"


def loss(theta, sample):
    return functional.linear(sample["x"], theta["w"], theta["b"]).square().sum()


def with_theta(**changed):
    return {"theta": THETA | changed}


def with_batch(**changed):
    return {"batch": BATCH | changed}


SHARED = {  # by gradient_moments and sample_gram
    "theta empty": ({"theta": {}}, r"`theta` must hold tensors by name.*Got theta=\{\}"),
    "theta a module": ({"theta": nn.Linear(6, 3)}, "`theta` must hold tensors by name.*'Linear'"),
    "theta lists": (with_theta(b=[[1.0]]), "`theta` must hold tensors by name.*'b': 'list'"),
    "theta integers": (with_theta(b=torch.ones(1, 3, dtype=torch.int64)), TYPES + ".*'b': 'int64'"),
    "theta half": (with_theta(w=THETA["w"].half()), TYPES + ".*'w': 'float16'"),
    "theta complex": (with_theta(w=THETA["w"] * 1j), TYPES + ".*'w': 'complex64'"),
    "theta mixed": (with_theta(w=THETA["w"].double()), TYPES + ".*'w': 'float64', 'b': 'float32'"),
    "theta of other agents": (
        with_theta(w=torch.ones(3, 3, 6)),
        r"'w' must have a leading axis of 1 or 2, the batch's number of agents. "
        r"Got shape \(3, 3, 6\)",
    ),
    "theta without agents": (with_theta(b=torch.tensor(1.0)), r"'b' must have a leading axis"),
    "batch empty": ({"batch": {}}, r"`batch` must hold tensors by name, at least one"),
    "batch a list": ({"batch": [BATCH["x"]]}, "`batch` must hold tensors by name.*'list'"),
    "batch of lists": (with_batch(x=BATCH["x"].tolist()), "`batch` must hold.*'x': 'list'"),
    "batch of arrays": (with_batch(x=np.ones((2, 5, 6))), "`batch` must hold.*'x': 'ndarray'"),
    "batch of one axis": (with_batch(x=torch.ones(5)), r"two leading axes.*'x': \(5,\)"),
    "batch without samples": (
        with_batch(x=torch.ones(2, 0, 6)),
        r"two leading axes \[agent, sample\], neither of size 0. .*\(2, 0, 6\)",
    ),
    "batch of unequal axes": (
        with_batch(y=torch.ones(2, 4)),
        r"`batch` must .*the same two leading axes.*'x': \(2, 5, 6\), 'y': \(2, 4\)",
    ),
    "mask turned round": (
        {"mask": torch.ones(5, 2, dtype=torch.bool)},
        r"`mask` must hold booleans and have shape \(2, 5\).*\(5, 2\)",
    ),
    "mask of numbers": ({"mask": torch.ones(2, 5)}, "`mask` must hold booleans.*torch.float32"),
    "mask a list": ({"mask": [[True] * 5] * 2}, "`mask` must be a tensor. Got mask='list'"),
    "context of other agents": (
        {"context": {"c": torch.ones(3, 4)}},
        r"`context\['c'\]` must have a leading axis of 2, the batch's number of agents.*\(3, 4\)",
    ),
    "context without agents": ({"context": {"c": torch.tensor(1.0)}}, r"leading axis of 2.*\(\)"),
    "context lists": ({"context": {"c": [1, 2]}}, "`context` must hold tensors.*'c': 'list'"),
    "context of the batch's name": (
        {"context": {"x": torch.ones(2, 6)}},
        r"`context\['x'\]` must have a name that the batch has not",
    ),
}
OWN = {  # by gradient_moments alone
    "copy too short": ({"copy": torch.arange(4)}, r"`copy` must .*shape \(5,\).*\(4,\)"),
    "copy of agents": ({"copy": torch.zeros(2, 5, dtype=torch.int64)}, r"`copy` must .*\(2, 5\)"),
    "copy of fractions": ({"copy": torch.zeros(5)}, "`copy` must hold whole numbers.*float32"),
    "copy a list": ({"copy": [0] * 5}, "`copy` must be a tensor. Got copy='list'"),
    "engine unknown": ({"engine": "fast"}, "`engine` must be 'auto' or 'general'. Got .*'fast'"),
    "budget nothing": ({"budget": 0}, "`budget` must be a positive number of bytes. Got budget=0"),
}


def refused(call, message):
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def _no_shape_checks(monkeypatch):
    """As in a user's process: shapes in signatures are checked in `make test-all` only."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("name", SHARED | OWN)
def test_wrong_arguments_are_named_in_one_line(name, engine):
    changed, message = (SHARED | OWN)[name]
    arguments = {"theta": THETA, "batch": BATCH, "engine": engine} | changed
    refused(lambda: gradient_moments(loss, **arguments), message)


@pytest.mark.parametrize("name", SHARED)
def test_wrong_arguments_of_the_gram_are_named_in_one_line(name):
    changed, message = SHARED[name]
    arguments = {"theta": THETA, "batch": BATCH, "samples": torch.tensor([0])} | changed
    refused(lambda: sample_gram(loss, **arguments), message)


@pytest.mark.parametrize("samples", [[], [5], [-1], [0.0], [[0]]])
def test_numbers_of_samples_are_checked(samples):
    numbers = torch.tensor(samples)
    message = "`samples` must be numbers from 0 to 4, at least one. Got samples="
    refused(lambda: sample_gram(loss, THETA, BATCH, numbers), message)


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_inference_mode_is_refused(engine):
    def call(theta=THETA, batch=BATCH):
        return gradient_moments(loss, theta, batch, engine=engine)

    def within():
        with torch.inference_mode():
            call()

    with torch.inference_mode():
        made_there = {"x": BATCH["x"].clone()}, {n: t.clone() for n, t in THETA.items()}
    message = "cannot be taken under torch.inference_mode.*Got {}; use torch.no_grad instead"
    refused(within, message.format("the mode enabled"))
    refused(lambda: call(batch=made_there[0]), message.format("x"))
    refused(lambda: call(theta=made_there[1]), message.format("w, b"))
    with torch.no_grad():
        assert call().sum.any()


def test_sums_under_autocast_are_refused():
    def call():
        with torch.autocast("cpu", torch.bfloat16):
            gradient_moments(loss, THETA, BATCH)

    refused(call, "must not be summed under torch.autocast.*enter it inside `surrogate`")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "hypermarl-coupled"])
def test_decompose_passes_the_checks_on(method):
    random = torch.Generator().manual_seed(0)
    mlp = MLP(sizes=(6, 4, 3), activation="tanh", head_gain=1.0)
    generator = METHODS[method](mlp, AGENTS, random, SharingConfig(seps={"groups": 2}))

    def surrogate(theta, sample):
        return mlp.forward(theta, sample["x"]).square().sum()

    for name in ("mask of numbers", "context of other agents", "batch of unequal axes"):
        changed, message = SHARED[name]
        arguments = {"batch": BATCH} | changed
        refused(lambda arguments=arguments: decompose(generator, surrogate, **arguments), message)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fups"])
def test_an_agent_out_of_range_is_named(method):
    random = torch.Generator().manual_seed(0)
    mlp = MLP(sizes=(6, 4, 3), activation="tanh", head_gain=1.0)
    generator = METHODS[method](mlp, 2, random, SharingConfig(seps={"groups": 2}))
    batch = {"observation": torch.ones(3, SAMPLES, 6)}  # of agent 2 as well

    def surrogate(theta, sample):
        return mlp.forward(theta, sample["observation"]).square().sum()

    message = (
        "`generator` must make parameters for all of the batch's 3 agents|must look up numbers"
    )
    refused(lambda: decompose(generator, surrogate, batch), message)
