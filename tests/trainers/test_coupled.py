import math

import pytest
import torch

from gradlab.checks import UsageError
from gradlab.run import open_run
from trainers.acting import fixed_parameters
from trainers.checkpoints import newest_checkpoint
from trainers.config import SharingConfig, TrainConfig
from trainers.envs.vector_env import Box, Discrete
from trainers.generators import METHODS
from trainers.loop import Trainer
from trainers.policies import make_policy
from trainers.train import train_run

AGENTS, SAMPLES, OBSERVATION = 2, 4, 5
SPACES = {"discrete": Discrete(n=3), "continuous": Box(low=-torch.ones(2), high=torch.ones(2))}
METHOD = "hypermarl-coupled"


def make(space, method=METHOD, config=None):
    """A policy, its generator with parameters away from their start, and observations."""
    random = torch.Generator().manual_seed(0)
    policy = make_policy(OBSERVATION, SPACES[space], hidden=(6, 6), activation="tanh")
    config = config or SharingConfig()
    generator = METHODS[method](policy.network, AGENTS, random, config).double()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    observation = torch.randn(AGENTS, SAMPLES, OBSERVATION, generator=random, dtype=torch.float64)
    return policy, generator, observation


@pytest.mark.parametrize("space", SPACES)
def test_parameters_of_every_sample_are_those_made_one_at_a_time(space):
    policy, generator, observation = make(space)
    together = generator.policy_for(observation)
    for agent in range(AGENTS):
        for sample in range(SAMPLES):
            alone = generator(torch.tensor([agent]), observation[agent, sample][None])
            assert alone.keys() == together.keys()
            for name, tensor in alone.items():
                if name == "log_std":
                    assert torch.equal(together[name], tensor)
                else:
                    torch.testing.assert_close(together[name][agent, sample], tensor[0])
    weights = together[f"{next(iter(policy.network.layers))}.weight"]
    assert not torch.allclose(weights[0, 0], weights[0, 1])
    assert not torch.allclose(weights[0, 0], weights[1, 0])


@pytest.mark.parametrize("space", SPACES)
def test_policy_of_all_samples_is_that_of_one_at_a_time(space):
    policy, generator, observation = make(space)
    random = torch.Generator().manual_seed(1)
    theta = generator.policy_for(observation)
    action, drawn = policy.sample(theta, observation, random)
    together, entropies = policy.evaluate(theta, observation, action)
    torch.testing.assert_close(drawn, together)
    for agent in range(AGENTS):
        for sample in range(SAMPLES):
            own = generator(torch.tensor([agent]), observation[agent, sample][None])
            own = {name: tensor[0] for name, tensor in own.items()}
            log_prob, entropy = policy.evaluate(
                own, observation[agent, sample], action[agent, sample]
            )
            torch.testing.assert_close(together[agent, sample], log_prob)
            torch.testing.assert_close(entropies[agent, sample], entropy)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_made_as_seldom_as_can_be(method):
    _, generator, observation = make("continuous", method, SharingConfig(seps={"groups": 2}))
    calls = []
    generator.register_forward_hook(lambda *_: calls.append(1))
    act = fixed_parameters(generator)
    first, second = act(observation), act(observation)
    assert len(calls) == (2 if method == METHOD else 1)
    assert generator.reads_observation == (method == METHOD)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_policies_for_an_observation_of_zeros_start_with_ppo_gains():
    trainer = Trainer(TrainConfig(method=METHOD, agents=3))
    nothing = torch.zeros(3, 1, trainer.spec.observation_size)
    for name, weights in trainer.actor.policy_for(nothing).items():
        if name.endswith("weight"):
            gain = weights.detach()[:, 0].flatten(1).norm(dim=1) / min(weights.shape[2:]) ** 0.5
            expected = trainer.policy.network.gain(name.removesuffix(".weight"))
            torch.testing.assert_close(gain, torch.full_like(gain, expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize("embedding", ["learned", "one-hot"])
def test_representation_has_a_row_for_each_agent(embedding):
    _, generator, _ = make(
        "continuous", config=SharingConfig(hypernetwork={"embedding": embedding})
    )
    rows, what = generator.representation()
    assert len(rows) == AGENTS
    assert not torch.allclose(rows[0], rows[1])
    if embedding == "learned":
        assert torch.equal(rows, generator.embedding)
    else:
        assert "for an observation of zeros" in what


def test_what_is_said_of_one_j_is_refused():
    _, generator, _ = make("discrete")
    with pytest.raises(UsageError, match="`observation` must be given"):
        generator.all_agents()
    with pytest.raises(UsageError, match="`coupling_forms` must be asked of a generator that"):
        generator.coupling_forms()


def train(folder, stop_after=math.inf, **settings):
    """Train, or go on, to a number of updates or the end; returns the final tensors."""
    small = {"agents": 2, "copies": 4, "steps": 4, "frames": 64, "every": 2}
    done = []
    train_run(
        TrainConfig.model_validate({"method": METHOD} | small | settings),
        folder,
        resume=True,
        progress=lambda frames, _: done.append(frames // 16),
        stop=lambda: done[-1] == stop_after,
        tell=pytest.fail,
    )
    checkpoint, _ = newest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint.tensors


def test_stopped_and_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    whole = train(tmp_path / "whole", diagnostics="off")
    train(tmp_path / "parts", stop_after=2, diagnostics="off")
    resumed = train(tmp_path / "parts", diagnostics="off")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("settings", "gap"),
    [
        ({}, True),
        ({"hypernetwork": {"embedding": "one-hot"}}, True),
        ({"method": "hypermarl"}, False),
    ],
    ids=["coupled", "coupled-one-hot", "decoupled"],
)
def test_diagnosed_run_records_the_factorisation_gap(tmp_path, settings, gap):
    train(tmp_path / "r", env="specialisation-temporal", **settings)
    found = open_run(tmp_path / "r").quantity("factorisation_gap")
    assert found.sizes == {"update": 2, "network": 2}
    assert bool((found > 1e-3).all()) == gap
    assert bool((found == 0).all()) != gap
    assert float(open_run(tmp_path / "r").quantity("residual").max()) < 1e-10
