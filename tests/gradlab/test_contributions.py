"""J_i^T by the generators' own rule against the engine's, which looks into any generator."""

import pytest
import torch
from cases import AGENTS, CONFIG, DECOUPLED, case
from torch import nn

from gradlab.contributions import PullsBack, contributions
from trainers.config import SharingConfig
from trainers.envs.vector_env import Box
from trainers.generators import METHODS
from trainers.networks import MLP
from trainers.policies import make_policy

FORMS = {
    "deep": ("hypermarl", SharingConfig(hypernetwork={"hidden": (5, 4), "bias": False}), None),
    "shared trunk": (
        "hypermarl",
        SharingConfig(hypernetwork={"hidden": (5, 4), "shared_trunk": True}),
        True,
    ),
    "linear, shared trunk": (
        "hypermarl-linear",
        SharingConfig(hypernetwork={"embedding": "learned", "shared_trunk": True}),
        None,
    ),
    "orthogonal": (
        "hypermarl-linear",
        SharingConfig(hypernetwork={"embedding": "orthogonal"}),
        None,
    ),
    "random": (
        "hypermarl",
        SharingConfig(hypernetwork={"embedding": "random", "hidden": (5,)}),
        None,
    ),
    "fups, own log_std": ("fups", SharingConfig(), True),
    "adapters, own log_std": ("adapters", SharingConfig(adapter={"rank": 2}), True),
    "dico, own log_std": ("dico", SharingConfig(dico={"snd": 0}), True),
    "kaleidoscope, own log_std": ("kaleidoscope", CONFIG, True),
    "seps, own log_std": ("seps", SharingConfig(seps={"groups": 3}), True),
    "nops, shared log_std": ("nops", SharingConfig(), False),
}


FORM = {"activation": "relu", "head_gain": 1.0}


class Plain(nn.Module):
    """A generator without a rule of its own, so that the engine has to look into it."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, agents):
        return self.generator(agents)


def generators():
    for method in DECOUPLED:
        yield method, case(method, "ppo-continuous").generator
    random = torch.Generator().manual_seed(0)
    box = Box(low=-torch.ones(2), high=torch.ones(2))
    network = make_policy(3, box, hidden=(4,), activation="tanh").network
    for name, (method, config, own_log_std) in FORMS.items():
        yield name, METHODS[method](network, AGENTS, random, config, own_log_std).double()
    critics = METHODS["kaleidoscope"].ensemble(MLP(sizes=(3, 4, 1), **FORM), AGENTS, random, CONFIG)
    yield "ensemble", critics.double()
    network = make_policy(3, box, hidden=(4,), activation="tanh", memory_size=2).network
    for method in DECOUPLED:
        generator = METHODS[method](network, AGENTS, random, CONFIG)
        yield f"{method}, recurrent", generator.double()


@pytest.mark.parametrize(("method", "generator"), list(generators()))
def test_a_generators_own_rule_equals_the_engines(method, generator):
    assert isinstance(generator, PullsBack), method
    random = torch.Generator().manual_seed(1)
    theta = generator(torch.arange(AGENTS))
    rows = {
        name: torch.randn(4 * AGENTS, *t.shape[1:], generator=random, dtype=torch.float64)
        for name, t in theta.items()
    }
    frozen = next(p for n, p in generator.named_parameters() if n.endswith("bias"))
    frozen.requires_grad_(False)
    agents = torch.arange(AGENTS).repeat(4)
    ours = contributions(generator, rows, agents)
    theirs = contributions(Plain(generator), rows, agents)
    assert {f"generator.{name}" for name in ours} == set(theirs)
    for name, part in ours.items():
        expected = theirs[f"generator.{name}"]
        torch.testing.assert_close(part.rows(), expected.rows(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(part.gram(), expected.gram(), rtol=1e-10, atol=1e-11)
