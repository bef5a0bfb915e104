"""Finished copies start anew from rows made ahead: as `reset_at` would do it, and only they."""

import pytest
import torch

from trainers.envs import make_env
from trainers.envs.object_state import capture
from trainers.envs.vmas import scenario_files

ONE_BY_ONE = {  # their resets take random scalars, other copies' rows, or what was there before
    *("asym_joint", "ball_passage", "ball_trajectory", "buzz_wire", "football", "het_mass"),
    *("joint_passage", "joint_passage_size", "road_traffic", "sampling", "simple_adversary"),
    *("simple_push", "simple_reference", "simple_speaker_listener", "simple_world_comm"),
    *("waterfall", "wind_flocking"),
}
DIFFERENT_SIZES = {"simple_adversary", "simple_crypto", "simple_speaker_listener", "simple_tag"}
FAST = ("navigation", "dispersion", "discovery", "wind_flocking")
SCENARIOS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in scenario_files()
    if name not in DIFFERENT_SIZES
]
EASY = {"n_food": 1, "food_radius": 0.5, "max_steps": 9}


def play(env, steps, seed=0):
    random = torch.Generator().manual_seed(seed)
    size = env.spec.action_space.size
    taken = []
    for _ in range(steps):
        action = 2 * torch.rand(env.spec.agents, env.copies, size, generator=random) - 1
        taken.append(env.step(action))
    return taken


def tensors(env):
    found, values = capture(env._env, env._packages)
    return found | {path: found[same] for path, same in values["aliases"].items()}


@pytest.mark.filterwarnings("ignore:Force limits not specified")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_finished_copies_alone_start_anew(scenario):
    try:
        env = make_env(f"vmas/{scenario}", copies=5, seed=1)
    except ValueError as error:
        pytest.skip(str(error))
    env.reset()
    play(env, 3)
    starts = env._own_starts()
    assert starts.possible == (scenario not in ONE_BY_ONE)
    if not starts.possible:
        return
    before = tensors(env)
    with torch.inference_mode():
        places, observation = starts.into(env._env, torch.tensor([1, 4]), slice(0, 5))
    after = tensors(env)
    made = {path: x for path, x in tensors_of(starts).items() if path in starts._paths}
    rows = slice(starts._used - 2, starts._used)  # some copies may have finished while we played
    assert places.tolist() == [1, 4]
    assert observation.shape == (env.spec.agents, 2, env.spec.observation_size)
    for path, old in before.items():
        new = after[path]
        if old.shape[:1] != (5,):
            assert torch.equal(old, new), path
            continue
        for copy in (0, 2, 3):
            torch.testing.assert_close(old[copy], new[copy], rtol=0, atol=0, equal_nan=True)
        if path in made:
            torch.testing.assert_close(
                new[[1, 4]], made[path][rows], rtol=0, atol=0, equal_nan=True
            )
    # What `reset_at` changes is among what was written.
    play(env, 2)
    before = tensors(env)
    with torch.inference_mode():
        env._env.reset_at(2, return_observations=False)
    changed = {path for path, x in tensors(env).items() if not torch.equal(before[path], x)}
    assert changed
    assert changed <= set(starts._paths) | {p for p in changed if same_object(env, p, starts)}


def tensors_of(starts):
    found, values = capture(starts._env, starts._packages)
    return found | {path: found[same] for path, same in values["aliases"].items()}


def same_object(env, path, starts):
    """Whether a path leads to a tensor that is written under another path."""
    aliases = capture(env._env, env._packages)[1]["aliases"]
    written = {aliases.get(p, p) for p in starts._paths}
    return aliases.get(path, path) in written


def test_copies_that_finish_apart_start_where_agents_are_seen_and_unlike_each_other():
    env = make_env("vmas/dispersion", copies=40, agents=3, seed=0, args=EASY)
    env.reset()
    apart, first = 0, []
    for step in play(env, 60):
        ended = step.terminated | step.truncated
        torch.testing.assert_close(
            step.observation[:, ~ended], step.final_observation[:, ~ended], rtol=0, atol=0
        )
        if ended.any() and not ended.all():
            apart += 1
            first.append(step.observation[0, ended])
            assert first[-1][:, :4].eq(0).all()  # at the origin, at rest
            assert first[-1][:, -1].eq(0).all()  # nothing eaten
    starts = torch.cat(first)
    assert apart > 5
    assert len(starts) > 100  # more than are made at once
    assert len(starts.unique(dim=0)) == len(starts)


def test_same_seed_and_resumed_state_give_the_same_starts():
    def make():
        env = make_env("vmas/dispersion", copies=6, agents=3, seed=2, args=EASY)
        env.reset()
        return env

    one, other = make(), make()
    play(one, 20)
    tensors, values = one.state()
    assert any(name.startswith("/starts") for name in tensors)
    expected = torch.stack([step.observation for step in play(one, 40, seed=1)])
    play(other, 3)
    other.load_state(tensors, values)
    found = torch.stack([step.observation for step in play(other, 40, seed=1)])
    assert torch.equal(expected, found)
