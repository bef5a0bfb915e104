"""DiCo: scaled deviations, the diversity they are scaled to, and what can't be met."""

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.checks import UsageError
from gradlab.cli import run as main
from gradlab.metrics.diversity import diversity
from gradlab.run import open_run
from trainers.agent_policy import load_policy
from trainers.config import DiCoConfig, TrainConfig
from trainers.generators.dico import DiCo
from trainers.loop import Trainer
from trainers.networks import MLP, make_network
from trainers.train import train_run

NAVIGATION = {
    "method": "dico",
    "env": "vmas/navigation",
    "agents": 3,
    "copies": 16,
    "steps": 16,
    "frames": 16 * 16 * 4,
    "network": {"hidden": [16]},
    "ppo": {"learning_rate": 3e-3},
}


def make(snd, mlp=None, agents=3):
    mlp = mlp or MLP(sizes=(5, 4, 2), activation="tanh", head_gain=0.01, log_std_size=2)
    return DiCo(mlp, agents, torch.Generator().manual_seed(0), DiCoConfig(snd=snd))


def snd_of(trainer, observation):
    """The diversity on all agents' observations, by gradlab's own measure."""
    shared = observation.flatten(0, 1).expand(trainer.spec.agents, -1, -1)
    with torch.no_grad():
        found = trainer.policy.distribution(trainer.actor.all_agents(), shared)
    return float(diversity(**found).snd)


def test_a_policy_is_the_shared_one_plus_the_scaled_deviation():
    generator = make(1.0)
    generator.ratio.fill_(2.5)
    plain = [
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in ("shared", 0, 1, 2)
    ]
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.1  # biases start at 0
        for number, network in enumerate(plain):
            prefix, own = ("", ...) if number == 0 else ("deviation_", number - 1)
            for place, layer in ((0, "layer0"), (2, "head")):
                for kind in ("weight", "bias"):
                    psi = generator.theta[f"{prefix}{layer}/{kind}"]
                    getattr(network[place], kind).copy_(psi[own])
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    shared, *deviations = plain
    expected = torch.stack([shared(x[i]) + 2.5 * deviations[i](x[i]) for i in range(3)])
    torch.testing.assert_close(generator.mlp.forward(generator.all_agents(), x), expected)


@pytest.mark.parametrize("memory", [None, 3], ids=["plain", "recurrent"])
def test_deviations_are_scaled_to_the_wanted_diversity_of_what_was_seen(memory):
    form = {"hidden": (4,), "activation": "tanh", "head_gain": 0.01, "log_std_size": 2}
    generator = make(0.9, make_network(5, 2, memory_size=memory, **form))
    random = torch.Generator().manual_seed(1)
    samples = {"observation": torch.randn(3, 6, 5, generator=random)}
    samples["active"] = torch.rand(3, 6, generator=random) < 0.7
    if memory is not None:
        samples["observation"] = torch.randn(3, 2, 6, 5, generator=random)
        samples["memory"] = torch.randn(3, 2, memory, generator=random)
        samples["starts"] = torch.rand(3, 2, 6, generator=random) < 0.2
        samples["active"] = torch.rand(3, 2, 6, generator=random) < 0.7
    generator.adapt(samples)
    theta = generator.all_agents()
    read = generator.mlp.read(theta, samples)[samples["active"]]
    made = generator.mlp.forward(theta, read.expand(3, *read.shape))
    distances = [
        (made[i, o] - made[k, o]).norm().item()
        for i in range(3)
        for k in range(i)
        for o in range(len(read))
    ]
    assert np.mean(distances) == pytest.approx(0.9, rel=1e-5)


def test_a_training_has_the_diversity_that_it_is_set_to():
    trainer = Trainer(TrainConfig.model_validate(NAVIGATION | {"dico": {"snd": 0.8}}))
    before = trainer.actor.theta["deviation_head/weight"].detach().clone()
    ratios = []
    for _ in range(3):
        rollout, _ = trainer._next_update()
        assert snd_of(trainer, rollout.samples["observation"]) == pytest.approx(0.8, rel=1e-4)
        ratios.append(trainer.actor.ratio.item())
    assert len(set(ratios)) == 3
    assert torch.dist(before, trainer.actor.theta["deviation_head/weight"]) > 1e-3
    fresh = trainer._collect().samples["observation"]  # of observations that it was not set on
    assert snd_of(trainer, fresh) == pytest.approx(0.8, rel=0.15)


def test_a_diversity_of_0_makes_all_agents_alike_and_none_leaves_it():
    for snd, held in ((0.0, True), (None, False)):
        trainer = Trainer(TrainConfig.model_validate(NAVIGATION | {"dico": {"snd": snd}}))
        rollout, _ = trainer._next_update()
        found = snd_of(trainer, rollout.samples["observation"])
        assert (found == 0) == held
        assert trainer.actor.ratio == (0 if held else 1)


def test_a_run_is_diagnosed_with_the_diversity_resumed_to_the_bit_and_loaded(tmp_path):
    config = TrainConfig.model_validate(
        NAVIGATION | {"dico": {"snd": 0.5}, "every": 1, "effects_every": 2, "frames": 16 * 16 * 3}
    )
    assert train_run(config, tmp_path / "whole")
    done = []
    again = {"progress": lambda frames, _: done.append(frames)}
    train_run(config, tmp_path / "r", **again, stop=lambda: len(done) == 2)
    assert train_run(config, tmp_path / "r", resume=True, **again)
    run, whole = open_run(tmp_path / "r"), open_run(tmp_path / "whole")
    assert (run.method, run.method_of("actor"), run.method_of("critic")) == ("dico", "dico", "nops")
    for name in ("cosine", "snd", "policy_loss"):
        np.testing.assert_array_equal(run.quantity(name), whole.quantity(name))
    assert run.quantity("residual").max() < 1e-4
    assert run.quantity("snd").values == pytest.approx(0.5, rel=0.15)
    policies = [load_policy(run, agent=agent) for agent in range(3)]
    random = torch.Generator().manual_seed(0)
    observation = torch.randn(9, policies[0].observation_size, generator=random)
    means = torch.stack([policy(observation)[0] for policy in policies])
    trainer = Trainer(config)
    trainer._next_update()  # any state: what counts is that the form is the training's
    theta = {
        name: torch.stack([
            dict(policy.layers.terms[number].named_parameters())[f"{place}.{kind}"]
            for policy in policies
        ])
        for number, prefix in enumerate(("", "deviation_"))
        for place, layer in ((0, "layer0"), (2, "head"))
        for kind in ("weight", "bias")
        for name in [f"{prefix}{layer}.{kind}"]
    }
    expected = trainer.actor.mlp.forward(theta, observation.expand(3, -1, -1))
    torch.testing.assert_close(means, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dico.snd", "2.9"], "`dico.snd` must be at most 2.828: 2 agents with 2 action comp"),
        (["--agents", "1", "--dico.snd", "0.5"], "`dico.snd` must be 0 or left out with 1 agent"),
        (["--dico.snd", "-1"], "`dico.snd`: Input should be greater than or equal to 0"),
        (["--critic-method", "dico"], "`critic_method` must be a sharing scheme of value func"),
    ],
)
def test_what_cannot_be_met_is_refused(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--method", "dico", "--env", "vmas/navigation", "--agents", "2"]
    assert main([*command, "--copies", "2", *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_the_greatest_diversity_of_two_agents_is_that_of_opposite_corners():
    mlp = MLP(sizes=(5, 4, 2), activation="tanh", head_gain=0.01, log_std_size=2)
    opposite = float(torch.dist(torch.ones(2), -torch.ones(2)))
    assert make(opposite - 1e-3, mlp, agents=2).snd == pytest.approx(opposite, abs=2e-3)
    with pytest.raises(UsageError, match=r"`dico\.snd` must be at most"):
        make(opposite + 1e-3, mlp, agents=2)
