import numpy as np
import pytest
import torch

from gradlab.checks import UsageError
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.matrix_games import chance_return, specialisation_reward, synchronisation_reward
from trainers.gae import advantages
from trainers.generators import METHODS
from trainers.loop import Trainer, describe


def train(folder, **settings):
    settings = {"frames": 1024, "copies": 16, "steps": 16, "every": 2, "agents": 3} | settings
    trainer = Trainer(TrainConfig.model_validate(settings))
    with RunWriter(folder) as writer:
        writer.describe(**describe(trainer), state="running")
        trainer.run(writer, lambda *_: None)
        writer.describe(state="done")
    return trainer, open_run(folder)


@pytest.mark.parametrize("method", METHODS)
def test_diagnosed_run_ends_with_the_weights_of_a_plain_one(tmp_path, method):
    diagnosed, run = train(tmp_path / "a", method=method)
    plain, _ = train(tmp_path / "b", method=method, diagnostics="off")
    for one, other in zip(diagnosed.actor.parameters(), plain.actor.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(diagnosed.critic.parameters(), plain.critic.parameters(), strict=True):
        assert torch.equal(one, other)
    assert run.quantity("residual").max() < 1e-4
    assert run.quantity("residual").sizes == {"update": 2, "network": 2}
    assert set(run.embeddings) == {"actor", "critic"}
    assert run.state == "done"


@pytest.mark.parametrize("method", ["hypermarl", "fups-id", "nops"])
def test_specialisation_is_learned(tmp_path, method):
    _, run = train(
        tmp_path / "r",
        method=method,
        agents=2,
        frames=60_000,
        copies=64,
        steps=32,
        diagnostics="off",
    )
    assert float(run.quantity("episode_return")[-1]) > 0.95


def test_policy_without_id_stays_at_chance(tmp_path):
    _, run = train(
        tmp_path / "r",
        method="fups",
        agents=2,
        frames=60_000,
        copies=64,
        steps=32,
        diagnostics="off",
    )
    late = float(run.quantity("episode_return")[-5:].mean())
    assert late == pytest.approx(chance_return(2, 2), abs=0.03)


def test_second_run_into_a_folder_is_refused(tmp_path):
    train(tmp_path / "r", diagnostics="off")
    with pytest.raises(UsageError, match="already holds a run; nothing was overwritten"):
        RunWriter(tmp_path / "r")


@pytest.mark.parametrize("method", ["hypermarl", "hypermarl-linear"])
def test_generated_layers_start_with_ppo_gains(method):
    trainer = Trainer(TrainConfig(method=method, agents=5))
    for name, weights in trainer.actor.all_agents().items():
        if name.endswith("weight"):
            gain = weights.detach().flatten(1).norm(dim=1) / min(weights.shape[1:]) ** 0.5
            expected = trainer.policy.network.gain(name.removesuffix(".weight"))
            torch.testing.assert_close(gain, torch.full_like(gain, expected), rtol=1e-3, atol=0)


def test_rewards_equal_the_papers_examples():
    action = torch.tensor([[1], [1], [2], [3]])
    assert specialisation_reward(action, 4)[:, 0].tolist() == [0.5, 0.5, 1, 1]
    expected = [1 / 3, 1 / 3, 1 / 4, 1 / 4]
    assert synchronisation_reward(action, 4)[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("agents", "expected"), [(2, 0.750), (4, 0.684), (8, 0.656)])
def test_chance_return_is_the_known_one(agents, expected):
    assert chance_return(agents, agents) == pytest.approx(expected, abs=5e-4)


def test_temporal_game_is_cut_off_at_its_horizon():
    env = make_env("specialisation-temporal", copies=2, agents=2, args={"horizon": 2})
    assert env.reset().eq(-1).all()
    first = env.step(torch.tensor([[0, 1], [1, 1]]))
    assert first.observation[0].tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    assert not first.truncated.any()
    last = env.step(torch.zeros(2, 2, dtype=torch.int64))
    assert last.truncated.all()
    assert not last.terminated.any()
    assert last.observation.eq(-1).all()
    assert last.final_observation[0].tolist() == [[1, 0, 1, 0]] * 2


def test_advantages_equal_a_loop():
    random = torch.Generator().manual_seed(0)
    reward, value, following = torch.randn(3, 1, 6, 1, generator=random, dtype=torch.float64)
    terminated = torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.bool)[:, None]
    truncated = torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.bool)[:, None]
    got = advantages(reward, value, following, terminated, truncated, discount=0.9, gae_lambda=0.8)[
        0, :, 0
    ]
    expected = np.zeros(7)
    for t in reversed(range(6)):
        bootstrap = 0 if terminated[t] else 0.9 * following[0, t, 0].item()
        delta = reward[0, t, 0].item() + bootstrap - value[0, t, 0].item()
        ended = bool(terminated[t] or truncated[t])
        expected[t] = delta + (0 if ended else 0.72 * expected[t + 1])
    np.testing.assert_allclose(got, expected[:6], rtol=1e-12)
