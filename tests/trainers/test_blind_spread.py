"""Blind particle spread against a re-computation, agent by agent, in loops."""

import math

import numpy as np
import pytest
import torch
from resuming import same_end

from gradlab.checks import UsageError
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.train import train_run

GROUPS = {"1": [5] * 3, "2": [10] * 3, "3": [6] * 5, "4": [3, 3, 3, 12, 9]}


class OneCopy:
    """The particle world of the source, for one copy: a force, damping, a step, a distance."""

    def __init__(self, groups, position, landmark, *, local_ratio, cooperative):
        self.group_of = [number for number, size in enumerate(groups) for _ in range(size)]
        self.position = [list(xy) for xy in position]
        self.velocity = [[0.0, 0.0] for _ in position]
        self.landmark = landmark
        self.local_ratio = local_ratio
        self.cooperative = cooperative

    def observe(self):
        rows = []
        for at, speed in zip(self.position, self.velocity, strict=True):
            row = [*speed, *at]
            for x, y in self.landmark:
                row += [x - at[0], y - at[1]]
            rows.append(row)
        return np.array(rows)

    def step(self, actions):
        for agent, action in enumerate(actions):
            force = [0.0, 0.0]
            if action == 1:
                force[0] = -5.0
            elif action == 2:
                force[0] = 5.0
            elif action == 3:
                force[1] = -5.0
            elif action == 4:
                force[1] = 5.0
            for axis in (0, 1):
                self.velocity[agent][axis] *= 0.75
                self.velocity[agent][axis] += force[axis] / 1.0 * 0.1
                self.position[agent][axis] += self.velocity[agent][axis] * 0.1

    def rewards(self):
        away = []
        for agent, (x, y) in enumerate(self.position):
            goal = self.landmark[self.group_of[agent]]
            away.append(math.sqrt((x - goal[0]) ** 2 + (y - goal[1]) ** 2))
        of_all = -sum(away) if self.cooperative else 0.0
        return np.array([
            of_all * (1 - self.local_ratio) + (0.0 if self.cooperative else -own) * self.local_ratio
            for own in away
        ])


def actions(env, random):
    return torch.randint(5, (env.spec.agents, env.copies), generator=random)


@pytest.mark.parametrize("args", [{}, {"cooperative": True, "local_ratio": 0.2}])
@pytest.mark.parametrize("name", GROUPS)
def test_every_step_is_that_of_the_plain_world(name, args):
    env = make_env(f"bps/{name}", copies=3, seed=4, args=args)
    random = torch.Generator().manual_seed(0)
    env.reset()
    for episode in range(2):
        # From here on in float64: only what is drawn at the start is float32.
        env._position, env._velocity, env._landmark = (
            x.double() for x in (env._position, env._velocity, env._landmark)
        )
        worlds = [
            OneCopy(
                GROUPS[name],
                env._position[:, copy].tolist(),
                env._landmark[copy].tolist(),
                local_ratio=args.get("local_ratio", 0.5),
                cooperative=args.get("cooperative", False),
            )
            for copy in range(3)
        ]
        for time in range(50):
            action = actions(env, random)
            step = env.step(action)
            for copy, world in enumerate(worlds):
                world.step(action[:, copy].tolist())
                for found, expected in (
                    (step.final_observation, world.observe()),
                    (step.reward, world.rewards()),
                ):
                    np.testing.assert_allclose(found[:, copy], expected, rtol=1e-12, atol=1e-12)
            assert step.truncated.tolist() == [time == 49] * 3, episode
            assert not step.terminated.any()
            over = step.truncated.all()
            assert torch.equal(step.observation, step.final_observation) != over


def test_episodes_start_at_rest_where_the_source_lets_them():
    env = make_env("bps/3", copies=400)
    assert env.spec.agents == 30
    first = env.reset()
    assert first.dtype == torch.float32
    velocity, position = first[..., :2], first[..., 2:4]
    landmark = first[..., 4:].unflatten(-1, (5, 2)) + position[:, :, None]
    assert not velocity.any()
    torch.testing.assert_close(landmark, landmark[:1].expand_as(landmark))  # the same for all
    for drawn, end in ((position, 1.0), (landmark[0], 3.0)):
        assert drawn.abs().max() <= end
        assert drawn.amax() > 0.99 * end
        assert drawn.amin() < -0.99 * end
        assert abs(float(drawn.mean())) < 0.03 * end
        assert float(drawn.std()) == pytest.approx(end / 3**0.5, rel=0.03)
    assert len(position.flatten(0, 1).unique(dim=0)) == 30 * 400


def test_same_seed_gives_the_same_steps_and_leaves_torch_alone():
    before = torch.random.get_rng_state()

    def play(seed):
        env, random = make_env("bps/1", copies=2, seed=seed), torch.Generator().manual_seed(1)
        env.reset()
        return torch.stack([env.step(actions(env, random)).observation for _ in range(60)])

    assert torch.equal(play(3), play(3))
    assert not torch.equal(play(3), play(4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_stopped_and_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    settings = {
        "env": "bps/1",
        "copies": 4,
        "steps": 8,
        "frames": 4 * 8 * 8,
        "diagnostics": "light",
    }
    config = TrainConfig.model_validate(
        settings | {"network": {"hidden": [8]}, "hypernetwork": {"hidden": [8]}}
    )
    assert train_run(config, tmp_path / "whole")
    updates = iter(range(1, 9))
    assert not train_run(config, tmp_path / "parts", stop=lambda: next(updates) == 3)
    assert train_run(config, tmp_path / "parts", resume=True)
    same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "bps/5"}, "Unknown blind particle spread '5'. Known: 1, 2, 3, 4"),
        ({"name": "bps/2", "agents": 15}, "`agents` must be 30 in bps/2. Got agents=15"),
        ({"name": "bps/1", "args": {"steps": 9}}, "Unknown argument of bps/1 'steps'"),
        ({"name": "bps/1", "args": {"max_steps": 0.5}}, "`max_steps` must be a whole number"),
        ({"name": "bps/1", "args": {"local_ratio": 2}}, "`local_ratio` must be a number between"),
        ({"name": "bps/1", "args": {"cooperative": 1}}, "`cooperative` must be true or false"),
    ],
)
def test_bad_input_is_a_usage_error(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_env(copies=2, **arguments)
