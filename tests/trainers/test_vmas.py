import pytest
import torch

from gradlab.checks import UsageError
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.vector_env import Box, Discrete
from trainers.train import train_run

NAVIGATION = {"name": "vmas/navigation", "copies": 3, "agents": 2, "args": {"collisions": False}}


def play(env, steps, seed=0):
    random = torch.Generator().manual_seed(seed)
    seen = [env.reset()]
    for _ in range(steps):
        action = 2 * torch.rand(env.spec.agents, env.copies, 2, generator=random) - 1
        seen.append(env.step(action).observation)
    return torch.stack(seen)


def test_navigation_has_agent_copy_observation_axes():
    env = make_env(**NAVIGATION)
    assert isinstance(env.spec.action_space, Box)
    assert play(env, 2).shape == (3, 2, 3, env.spec.observation_size)


def test_same_seed_gives_the_same_trajectory_and_leaves_torch_alone():
    state = torch.random.get_rng_state()
    one = play(make_env(**NAVIGATION, seed=5), 10)
    assert torch.equal(one, play(make_env(**NAVIGATION, seed=5), 10))
    assert not torch.equal(one, play(make_env(**NAVIGATION, seed=6), 10))
    assert torch.equal(state, torch.random.get_rng_state())


def test_two_environments_do_not_share_randomness():
    alone = play(make_env(**NAVIGATION, seed=5), 4)
    first = make_env(**NAVIGATION, seed=5)
    second = make_env(**NAVIGATION, seed=9)
    second.reset()
    together = play(first, 4)
    assert torch.equal(alone, together)


def test_time_limit_truncates_with_the_last_observation():
    env = make_env("vmas/dispersion", copies=2, args={"max_steps": 2, "continuous_actions": False})
    assert isinstance(env.spec.action_space, Discrete)
    env.reset()
    action = torch.ones(env.spec.agents, 2, dtype=torch.int64)
    env.step(action)
    last = env.step(action)
    assert last.truncated.all()
    assert not last.terminated.any()
    assert last.final_observation[:, :, :2].abs().sum() > 0  # moved
    assert last.observation[:, :, :2].eq(0).all()  # dispersion starts at the origin


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vmas/navigaton"}, "Did you mean 'navigation'"),
        ({"name": "vmas/navigation", "args": {"colisions": 1}}, "Did you mean 'collisions'"),
        ({"name": "vmas/simple_spread", "args": {"max_steps": 0}}, "`max_steps` must be at least"),
        ({"name": "vmas/navigation", "args": {"agents_with_same_goal": 2}}, "can't be made"),
    ],
)
def test_bad_input_is_a_usage_error(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_env(copies=2, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scenario", "gain"),
    [("hypermarl", "navigation", 2.0), ("fups-id", "dispersion", 0.1)],
)
def test_return_improves_clearly_with_diagnostics_on(tmp_path, method, scenario, gain):
    config = TrainConfig(method=method, env=f"vmas/{scenario}", agents=4, frames=600_000)
    assert train_run(config, tmp_path / "r")
    run = open_run(tmp_path / "r")
    returns = run.quantity("episode_return").dropna("update")
    assert float(returns[-len(returns) // 10 :].mean()) > float(returns[0]) + gain
    residual = run.quantity("residual")
    assert residual.sizes == {"update": 30, "network": 2}
    assert float(residual.max()) < 1e-4
