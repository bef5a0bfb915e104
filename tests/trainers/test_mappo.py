import pytest
import torch
from selection import slow_but

from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.config import TrainConfig
from trainers.generators import METHODS
from trainers.loop import Trainer, describe

SMALL = {
    "algorithm": "mappo",
    "env": "specialisation-temporal",
    "env_args": {"horizon": 6},
    "agents": 3,
    "copies": 4,
    "steps": 8,
    "frames": 4 * 8 * 4,
    "every": 2,
    "effects_every": 2,
    "network": {"hidden": [8]},
    "hypernetwork": {"hidden": [4]},
    "seps": {"pretraining_frames": 32},
}


def train(folder, **settings):
    trainer = Trainer(TrainConfig.model_validate(SMALL | settings))
    with RunWriter(folder) as writer:
        writer.describe(**describe(trainer), state="running")
        trainer.run(writer, lambda *_: None)
    return trainer, open_run(folder)


def joint(observation):
    """What all agents see, by hand [sample, agents * obs]."""
    return torch.cat([observation[agent] for agent in range(len(observation))], dim=-1)


@pytest.mark.parametrize("method", METHODS)
def test_critics_value_what_all_agents_see(method):
    trainer = Trainer(TrainConfig.model_validate(SMALL | {"method": method}))
    samples = trainer._collect().samples
    read = joint(samples["observation"])
    assert read.shape == (32, 3 * trainer.spec.observation_size)
    for agent in range(3):
        for sample in (0, 7, 31):
            one = read[sample][None]
            arguments = (one,) if trainer.critic.reads_observation else ()
            theta = trainer.critic(torch.tensor([agent]), *arguments)
            theta = {name: tensor[0] for name, tensor in theta.items()}
            value = trainer.critic.mlp.forward(theta, one[0])[0]
            # float32: batched products round otherwise
            torch.testing.assert_close(
                samples["value"][agent, sample], value.detach(), rtol=1e-5, atol=1e-5
            )
    alike = torch.allclose(samples["value"][0], samples["value"][1])
    assert alike == (method in {"fups", "seps"})  # who knows no agent has one value for all
    _, actor = next(iter(trainer.policy.network.layers.values()))
    assert actor == trainer.spec.observation_size


@pytest.mark.parametrize("method", slow_but(METHODS, "nops", "hypermarl"))
def test_diagnosed_run_ends_with_the_weights_of_a_plain_one(tmp_path, method):
    diagnosed, run = train(tmp_path / "a", method=method)
    plain, _ = train(tmp_path / "b", method=method, diagnostics="off")
    for network in ("actor", "critic"):
        ours, theirs = (getattr(t, network).state_dict() for t in (diagnosed, plain))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    residual = run.quantity("residual")
    assert residual.sizes == {"update": 2, "network": 2}
    assert residual.max() < 1e-10
    assert run.info["algorithm"] == "mappo"
    assert bool((run.quantity("factorisation_gap").sel(network="critic") > 1e-3).all()) == (
        method == "hypermarl-coupled"
    )


def test_critic_is_diagnosed_on_what_it_reads():
    trainer = Trainer(TrainConfig.model_validate(SMALL))
    rollout = trainer._collect()
    batches, *_ = trainer.diagnosis._batches(rollout)
    expected = joint(rollout.samples["observation"])  # every step is diagnosed
    assert batches["critic"]["observation"].shape == (3, *expected.shape)
    assert all(torch.equal(seen, expected) for seen in batches["critic"]["observation"])
    assert torch.equal(batches["actor"]["observation"], rollout.samples["observation"])
