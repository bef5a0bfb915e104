import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.config import TrainConfig
from trainers.loop import Trainer
from trainers.normalisers import ObservationNormaliser, RewardNormaliser, RunningMoments


def draw(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


@given(cuts=st.lists(st.integers(1, 39), max_size=6), shift=st.sampled_from([0.0, 1e6]))
def test_moments_of_parts_are_those_of_the_whole(cuts, shift):
    rows = shift + 3 * draw(40, 2)
    moments = RunningMoments(2)
    for part in rows.tensor_split(sorted(set(cuts))):
        moments.add(part)
    assert moments.count == 40
    np.testing.assert_allclose(moments.mean, rows.numpy().mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.squares / 40, rows.numpy().var(0), rtol=1e-10)
    expected = np.sqrt(rows.numpy().var(0) + 1e-8)
    np.testing.assert_allclose(moments.deviation(), expected, rtol=1e-10)


def test_nothing_is_scaled_before_anything_is_seen():
    observation = draw(2, 3, 4)
    assert torch.equal(ObservationNormaliser(4, clip=10.0)(observation), observation)


def test_what_never_changes_is_0_and_what_is_far_is_cut_off():
    normaliser = ObservationNormaliser(2, clip=2.0)
    seen = torch.stack([torch.full((1, 100), 0.1), draw(1, 100).float()], dim=-1)
    normaliser.learn(seen[0])
    assert normaliser(seen)[..., 0].abs().max() < 1e-3
    far = normaliser(torch.tensor([[[0.1, 50.0], [0.1, -50.0]]]))
    assert far[0, :, 1].tolist() == [2.0, -2.0]
    assert far.dtype == torch.float32


def test_rewards_are_divided_by_the_spread_of_discounted_returns():
    rewards, normaliser = draw(6, 2, 3), RewardNormaliser(2, 3, discount=0.9, clip=5.0)
    ended = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]])
    sums, seen = np.zeros((2, 3)), []
    for reward, end in zip(rewards, ended.bool(), strict=True):
        found = normaliser(reward, end, torch.ones(2, 3, dtype=torch.bool))
        for agent, copy in np.ndindex(2, 3):
            sums[agent, copy] = 0.9 * sums[agent, copy] + reward[agent, copy].item()
            seen.append(sums[agent, copy])
        expected = np.clip(reward.numpy() / np.sqrt(np.var(seen) + 1e-8), -5, 5)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        sums[:, end.numpy()] = 0


SETTINGS = {
    "env": "specialisation-temporal",
    "env_args": {"horizon": 5},
    "agents": 2,
    "copies": 3,
    "steps": 8,
    "reward": "team",
    "normalise": {"observations": True, "rewards": True, "clip": 1.5},
}


def watched(settings):
    """A trainer, the observation it starts from, and the steps that its environment makes."""
    trainer = Trainer(TrainConfig.model_validate(settings))
    env, steps = trainer.collector.env, []
    step = env.step

    def watch(action):
        steps.append(step(action))
        return steps[-1]

    env.step = watch
    return trainer, steps


def test_rollout_holds_what_the_networks_read_and_learn_from():
    trainer, steps = watched(SETTINGS)
    rollout = trainer._collect()
    seen, expected = [], []
    observation = torch.full((2, 3, 4), -1.0)  # the game's first
    paid, sums, returns = [], np.zeros(3), []
    for step in steps:
        seen.append(observation.numpy().reshape(-1, 4))
        rows = np.concatenate(seen).astype(float)
        scale = np.sqrt(rows.var(0) + 1e-8)
        expected.append(np.clip((observation.numpy() - rows.mean(0)) / scale, -1.5, 1.5))
        team = step.reward.numpy().mean(0)
        sums = 0.99 * sums + team
        returns += [*sums, *sums]  # of two agents
        paid.append(np.clip(team / np.sqrt(np.var(returns) + 1e-8), -1.5, 1.5))
        sums = np.where(step.truncated.numpy(), 0, sums)
        observation = step.observation
    found = rollout.samples["observation"].unflatten(1, (8, 3)).numpy()
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-5, atol=1e-6)
    raw = np.stack([step.reward.numpy() for step in steps])
    assert rollout.reward_per_step == pytest.approx(raw.mean(), rel=1e-6)
    # The last step's advantage is r + discount * V' - V, and V' is not in the samples: with a
    # discount of 0 it is r - V.
    trainer, steps = watched(SETTINGS | {"ppo": {"discount": 0.0}})
    samples = trainer._collect().samples
    learned = (samples["advantage"] + samples["value"]).unflatten(1, (8, 3))
    returns, expected = [], []
    for step in steps:
        team = step.reward.numpy().mean(0)
        returns += [*team, *team]
        expected.append(np.clip(team / np.sqrt(np.var(returns) + 1e-8), -1.5, 1.5))
    np.testing.assert_allclose(learned[0], np.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(learned[0], learned[1])


def test_end_of_an_episode_is_valued_by_the_scale_of_its_time():
    trainer, steps = watched(SETTINGS | {"steps": 5, "normalise": {"observations": True}})
    rollout = trainer._collect()
    final = steps[-1].final_observation
    rows = [torch.full((6, 4), -1.0), *(step.observation.flatten(0, 1) for step in steps)]
    rows = torch.cat(rows).double()
    scale = (rows.var(0, correction=0) + 1e-8).sqrt()
    read = ((final - rows.mean(0)) / scale).clamp(-10, 10).float()
    with torch.no_grad():
        value = trainer.critic.mlp.forward(trainer.critic.all_agents(), read).squeeze(-1)
    samples = {name: t.unflatten(1, (5, 3))[:, -1] for name, t in rollout.samples.items()}
    team = steps[-1].reward.mean(0)
    torch.testing.assert_close(samples["target"], team + 0.99 * value, rtol=1e-4, atol=1e-5)


def test_diagnosing_leaves_the_moments_as_they_are():
    trainer, _ = watched(SETTINGS)
    rollout = trainer._collect()
    before = {name: t.clone() for name, t in trainer.state().tensors.items()}
    assert trainer.diagnosis.of(trainer.config.effects_period, rollout)
    after = trainer.state().tensors
    assert any(name.startswith("normaliser.reward") for name in after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
