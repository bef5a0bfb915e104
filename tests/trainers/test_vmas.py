from pathlib import Path

import pytest
import torch

from gradlab.checks import UsageError
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.object_state import capture
from trainers.envs.vector_env import Box, Discrete
from trainers.envs.vmas import scenario_arguments, scenario_files
from trainers.train import train_run

PAGE = Path(__file__).parents[2] / "docs" / "vmas.md"
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
        ({"name": "vmas/football", "args": {"x": 1}}, "Known: .*continuous_actions, .*max_steps"),
        ({"name": "vmas/football", "agents": 4}, "`agents` must be 3 in this scenario"),
        ({"name": "vmas/navigation", "agents": 0}, "`agents` must be at least 1"),
        ({"name": "vmas/simple_spread", "args": {"max_steps": 0}}, "`max_steps` must be at least"),
        ({"name": "vmas/navigation", "args": {"agents_with_same_goal": 2}}, "can't be made"),
    ],
)
def test_bad_input_is_a_usage_error(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_env(copies=2, **arguments)


def scenarios(*fast):
    """Every scenario that ships; all but some are slow."""
    return [
        pytest.param(name, marks=() if name in fast else pytest.mark.slow)
        for name in scenario_files()
    ]


WARNS = pytest.mark.filterwarnings("ignore:Force limits not specified")


@WARNS
@pytest.mark.parametrize(
    ("scenario", "actions"),
    [
        *(("dispersion", "continuous"), ("simple_world_comm", "numbered")),
        ("joint_passage", "continuous"),
        *(
            pytest.param(name, actions, marks=pytest.mark.slow)
            for name in scenario_files()
            for actions in ("continuous", "numbered")
        ),
    ],
)
def test_every_scenario_trains_with_full_diagnostics(tmp_path, scenario, actions):
    config = TrainConfig.model_validate({
        "env": f"vmas/{scenario}",
        "env_args": {"max_steps": 5, "continuous_actions": actions == "continuous"},
        "pad": True,
        "copies": 3,
        "steps": 8,
        "frames": 3 * 8 * 2,
        "every": 1,
        "effects_every": 1,
        "network": {"hidden": [8]},
        "hypernetwork": {"hidden": [8]},
    })
    assert train_run(config, tmp_path / "r", tell=lambda _: None)
    run = open_run(tmp_path / "r")
    residual = run.quantity("residual")
    assert residual.sizes == {"update": 2, "network": 2}
    assert float(residual.max()) < 1e-4
    assert run.quantity("episode_return").notnull().all()
    several = run.info["agents"] > 1  # one agent is not unlike any other
    assert run.quantity("snd").notnull().all() == several


def documented():
    """Rows of the page's table of scenarios by name."""
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| `")
    ]
    return {row[0]: row[1:] for row in rows if len(row) == 7}


def test_page_lists_every_scenario():
    assert documented().keys() == scenario_files().keys()


@WARNS
@pytest.mark.parametrize("scenario", scenarios("simple_tag", "navigation"))
def test_page_has_the_sizes_of_the_scenario(scenario):
    name = f"vmas/{scenario}"
    vectors = make_env(name, copies=1).spec
    numbered = make_env(name, copies=1, args={"continuous_actions": False}).spec
    assert isinstance(vectors.action_space, Box)
    assert isinstance(numbered.action_space, Discrete)
    sets_agents = "n_agents" in scenario_arguments(scenario_files()[scenario])
    assert documented()[scenario] == [
        str(vectors.agents),
        "yes" if sets_agents else "",
        str(vectors.observation_size),
        str(vectors.action_space.size),
        str(numbered.action_space.n),
        "yes" if vectors.padding else "",
    ]


NOISY = {
    "asym_joint": {"obs_noise": 0.2},
    "joint_passage": {"obs_noise": 0.2},
    "joint_passage_size": {"obs_noise": 0.2},
    "road_traffic": {},
}


@WARNS
@pytest.mark.parametrize("scenario", scenarios("joint_passage", "simple_reference", "discovery"))
def test_what_the_agents_of_other_copies_see_is_left_as_it_was(scenario):
    env = make_env(f"vmas/{scenario}", copies=4, seed=3, args=NOISY.get(scenario, {}))
    first = env.reset()
    space = env.spec.action_space
    assert isinstance(space, Box)
    high = space.high[:, None] if space.high.dim() == 2 else space.high
    final = env.step(high.expand(env.spec.agents, 4, -1) / 2).final_observation
    ended = torch.tensor([False, True, False, True])
    for _ in range(2):
        with env._own_random(), torch.inference_mode():
            following = env._restart(ended, final).clone()
        assert torch.equal(following[:, ~ended], final[:, ~ended])
        # pollock's agents see nothing that a step changes
        assert torch.equal(following[:, ended], final[:, ended]) == torch.equal(first, final)


@pytest.mark.slow
def test_looking_at_restarted_copies_is_not_kept_by_those_that_go_on():
    env = make_env("vmas/road_traffic", copies=3, seed=3)
    assert isinstance(env.spec.action_space, Box)
    env.reset()
    final = env.step(torch.zeros(env.spec.agents, 3, env.spec.action_space.size)).final_observation

    def past():
        tensors, values = capture(env._env, env._packages)
        found = {path: x for path, x in tensors.items() if "/observations/past_" in path}
        return found, {p: x for p, x in values["scalars"].items() if "/observations/past_" in p}

    before, pointers = past()
    assert len(before) > 5
    for _ in range(2):
        with env._own_random(), torch.inference_mode():
            env._restart(torch.tensor([False, True, False]), final)
        after, same = past()
        assert same == pointers
        for path, x in before.items():
            torch.testing.assert_close(after[path], x, rtol=0, atol=0, equal_nan=True)


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
