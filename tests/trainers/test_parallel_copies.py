"""Copies of environments with PettingZoo's parallel interface, PettingZoo's own among them."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from parallel_game import AGENTS, ParallelGame
from pettingzoo.test import parallel_api_test
from resuming import same_end

from gradlab.checks import UsageError
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.parallel_copies import ParallelCopies
from trainers.envs.pettingzoo import module_names
from trainers.envs.vector_env import Box, EnvironmentFailed
from trainers.train import train_run

SPREAD = "pettingzoo/mpe2.simple_spread_v3"
LISTENER = "pettingzoo/mpe2.simple_speaker_listener_v4"
KNIGHTS = "pettingzoo/pettingzoo.butterfly.knights_archers_zombies_v11"
REAL = {
    SPREAD: {"max_cycles": 7},
    LISTENER: {"max_cycles": 7, "continuous_actions": True},
    KNIGHTS: {"max_cycles": 90, "spawn_delay": 1},
}


def copies_of(*makes, **settings):
    """An environment of one copy for each function given."""
    waiting = list(makes)
    return ParallelCopies(
        "game",
        lambda: waiting.pop(0)(),
        **{"copies": len(makes), "agents": None, "seed": 0} | settings,
    )


def drawn(env, random):
    """Random actions that agents have."""
    space, shape = env.spec.action_space, (env.spec.agents, env.copies)
    if isinstance(space, Box):
        low, high = (end[:, None] if end.dim() == 2 else end for end in (space.low, space.high))
        return low + (high - low) * torch.rand(*shape, space.size, generator=random)
    sizes = torch.tensor(env.spec.action_sizes or [space.n] * env.spec.agents)
    return (torch.rand(shape, generator=random) * sizes[:, None]).long()


def play(env, steps, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [env.step(drawn(env, random)) for _ in range(steps)]


def test_spaces_are_padded_and_every_agent_is_given_an_action_of_its_own():
    for box in (False, True):
        env = copies_of(
            lambda box=box: ParallelGame(box=box), lambda box=box: ParallelGame(box=box)
        )
        assert env.spec.agent_names == AGENTS
        assert env.spec.observation_sizes == env.spec.action_sizes == (3, 3, 2)
        assert env.reset()[:, :, 0].tolist() == [[0, 0], [1, 1], [2, 2]]
        assert not env.reset()[2, :, 2].any()
        play(env, 20)  # the game checks that an action is in its agent's space
        taken = env._envs[0].taken
        if box:
            assert len(taken[0]["c"]) == 2
            assert isinstance(env.spec.action_space, Box)
            assert env.spec.action_space.low[2].tolist() == [-2, -2, -1]
        else:
            assert {actions["c"] for actions in taken} == {5, 6}
            assert {actions["a"] for actions in taken} == {0, 1, 2}


def test_agents_that_die_leave_and_the_time_limit_cuts_off_the_others():
    leaves = {2: {"b": "dead"}, 6: {"a": "dead"}}
    env = copies_of(lambda: ParallelGame(leaves), ParallelGame)
    env.reset()
    steps = play(env, 7)
    alive = [[True] * 3, [True, False, True], [False, False, True]]
    for time, step in enumerate(steps[:6], start=1):
        expected = alive[0] if time < 2 else alive[1] if time < 6 else alive[2]
        assert (step.active is None) == (time == 1)
        if step.active is not None:
            assert step.active[:, 0].tolist() == expected
            assert step.active[:, 1].all()
        assert not step.terminated.any()
        assert step.truncated.all() == step.truncated.any() == (time == 6)
        assert step.reward[2].tolist() == [2 * time] * 2
        assert step.final_observation[0, 1, 2] == time
    last = steps[5]
    assert last.left[:, 0].tolist() == [True, True, False]  # a died with the last step
    assert last.act_next.all()
    assert last.reward[:, 0].tolist() == [0, 0, 12]  # b had left before
    assert last.observation[:2, :, 2].eq(0).all()  # anew
    assert steps[6].active is None
    assert steps[6].final_observation[0, :, 2].eq(1).all()


def test_episode_ends_in_a_terminal_state_when_all_die_and_copies_restart_alone():
    dies = {3: dict.fromkeys(AGENTS, "dead")}
    env = copies_of(lambda: ParallelGame(dies), ParallelGame)
    alone = copies_of(ParallelGame, ParallelGame)
    assert torch.equal(env.reset()[:, 1], alone.reset()[:, 1])
    steps, others = play(env, 9), play(alone, 9)
    assert [step.terminated.tolist() for step in steps] == [
        [time % 3 == 0, False] for time in range(1, 10)
    ]
    assert [step.truncated.tolist() for step in steps] == [
        [False, time == 6] for time in range(1, 10)
    ]
    for step, other in zip(steps, others, strict=True):
        assert torch.equal(step.observation[:, 1], other.observation[:, 1])
        assert torch.equal(step.final_observation[:, 1], other.final_observation[:, 1])
    noise = torch.stack([step.observation[0, 0, 1] for step in steps])
    assert len(noise.unique()) == 9  # each episode has a seed of its own


@pytest.mark.parametrize("name", REAL)
def test_seeds_reproduce_and_global_random_states_are_left_alone(name):
    def played(seed):
        env = make_env(name, copies=2, seed=seed, args=REAL[name])
        first = env.reset()
        return torch.stack([first, *(step.observation for step in play(env, 12))])

    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(played(1), played(1))
    if name != KNIGHTS:  # which look alike until the first zombie comes
        assert not torch.equal(played(1), played(2))
        assert not torch.equal(played(1)[:, :, 0], played(1)[:, :, 1])
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.parametrize("name", REAL)
def test_replayed_episodes_are_where_they_were(name):
    env, other = (make_env(name, copies=3, seed=4, args=REAL[name]) for _ in range(2))
    env.reset(), other.reset()
    before = play(env, 100)
    assert any(step.ended.any() for step in before)
    if name == KNIGHTS:
        assert any(step.active is not None and not step.ended.any() for step in before)
    other.load_state(*env.state())
    for one, two in zip(play(env, 40, seed=1), play(other, 40, seed=1), strict=True):
        for field in ("observation", "reward", "terminated", "truncated", "act_next"):
            assert torch.equal(getattr(one, field), getattr(two, field)), field


def test_episode_that_does_not_repeat_itself_is_one_line_on_resuming():
    env = copies_of(ParallelGame, lambda: ParallelGame(seeded=False))
    env.reset()
    play(env, 3)
    with pytest.raises(UsageError, match=r"can't be resumed: .* of copy 1 is at step 3 not where"):
        env.load_state(*env.state())


def test_numbers_in_infos_are_measures_and_drawing_needs_the_render_mode():
    env = copies_of(lambda: ParallelGame({1: {"b": "dead"}}), ParallelGame, info=True)
    env.reset()
    first, second = play(env, 2)
    assert set(second.info) == {"time"}  # a word is no number
    assert first.info["time"].tolist() == [[1, 1]] * 3
    assert second.info["time"].isnan().tolist() == [[False, False], [True, False], [False, False]]
    with pytest.raises(UsageError, match="--env-arg render_mode=rgb_array"):
        env.render(0)
    drawing = copies_of(lambda: ParallelGame(render_mode="rgb_array"))
    drawing.reset()
    play(drawing, 2)
    assert drawing.render(0).shape == (4, 5, 3)
    assert (drawing.render(0) == 2).all()


class Turns(ParallelGame):
    """Each agent may take another half of the actions at each step; b's has no mask."""

    none_at = -1

    def observation_space(self, agent):
        found = super().observation_space(agent)
        mask = spaces.MultiBinary(int(self.action_space(agent).n))
        return found if agent == "b" else spaces.Dict(observation=found, action_mask=mask)

    def _mask(self, agent):
        numbers = np.arange(self.action_space(agent).n)
        even = (numbers + self.time + AGENTS.index(agent)) % 2 == 0
        return (even & (self.time != self.none_at)).astype(np.int8)

    def _see(self, agents):
        seen = super()._see(agents)
        return {
            agent: x if agent == "b" else {"observation": x, "action_mask": self._mask(agent)}
            for agent, x in seen.items()
        }


def test_action_masks_are_those_of_the_step():
    env = copies_of(lambda: Turns({2: {"a": "dead"}}), Turns)
    assert env.reset()[:, :, 0].tolist() == [[0, 0], [1, 1], [2, 2]]
    even, odd, everything = [True, False, True], [False, True, False], [True] * 3
    random = torch.Generator().manual_seed(0)
    for time in range(6):
        mask = env.action_mask()
        assert mask is not None
        own = odd if time % 2 else even
        assert mask[0].tolist() == [everything if time >= 2 else own, own]
        assert mask[1].tolist() == [everything] * 2
        assert mask[2].tolist() == [[*own[:2], False]] * 2
        env.step(drawn(env, random))
    assert env.action_mask()[0].tolist() == [even] * 2  # anew, with all agents
    other = copies_of(lambda: Turns({2: {"a": "dead"}}), Turns)
    play(env, 3)
    other.load_state(*env.state())
    assert torch.equal(env.action_mask(), other.action_mask())
    stuck = copies_of(type("Stuck", (Turns,), {"none_at": 1}))
    stuck.reset()
    play(stuck, 1)
    with pytest.raises(EnvironmentFailed, match="That of a in copy 0 leaves none"):
        stuck.action_mask()
    boxes = type("Boxes", (Turns,), {"_mask": lambda *_: np.ones(2)})
    boxes.observation_space = lambda *_: spaces.Dict(
        observation=spaces.Box(0, 1, (1,)), action_mask=spaces.MultiBinary(2)
    )
    with pytest.raises(UsageError, match="the actions of an `action_mask` must be Discrete"):
        copies_of(lambda: boxes(box=True))


class Broken(ParallelGame):
    """One thing is not as it must be."""

    what = ""

    def observation_space(self, agent):
        found = super().observation_space(agent)
        image = spaces.Box(0, 255, (8, 8, 3), np.uint8)
        return {"image": image, "text": spaces.Text(5)}.get(self.what, found)

    def action_space(self, agent):
        found = super().action_space(agent)
        other = {
            "multi": spaces.MultiDiscrete([2, 3]),
            "unbounded": spaces.Box(-np.inf, 1, (2,)),
            "mixed": spaces.Box(0, 1, (2,)) if agent == "b" else found,
        }
        return other.get(self.what, found)

    def reset(self, seed=None, options=None):
        brought = super().reset(seed, options)
        if self.what == "half":
            self.agents = ["a"]
        return brought[0] if self.what == "no infos" else brought

    def step(self, actions):
        brought = super().step(actions)
        if self.what == "four":
            return brought[:4]
        if self.what == "error":
            raise ZeroDivisionError("two\nlines")
        if self.what == "unpaid":
            del brought[1]["b"]
        if self.what == "unseen":
            del brought[0]["b"]
        if self.what == "long":
            brought[0]["b"] = np.zeros(7)
        if self.what == "back" and self.time == 2:
            self.agents.append("b")
        return brought


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("image", r"an observation must be a Box of numbers that are no image .* of a\."),
        ("text", "an observation must be a Box"),
        ("multi", r"an action must be Discrete, or a Box .* Got MultiDiscrete\(\[2 3\]\) of a"),
        ("unbounded", "an action must be Discrete, or a Box of one axis within bounds"),
        ("mixed", r"of all agents must be Discrete, or of all be Box. Got a Discrete\(3\), b Box"),
        ("no infos", r"reset must return \(observations, infos\). Got a dict\."),
        ("half", r"must begin with all of possible_agents \(a, b, c\) as its agents. Got a\."),
    ],
)
def test_what_can_not_be_used_is_a_usage_error(what, message):
    broken = type("Broken", (Broken,), {"what": what})
    with pytest.raises(UsageError, match=message) as error:
        copies_of(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("four", r"step must return \(observations, .* Got a tuple of 4\."),
        ("error", r"step of copy 0 raised ZeroDivisionError: two lines \(test_parallel_copies"),
        ("unpaid", "step gave no reward of b"),
        ("unseen", "there is no observation of b"),
        ("long", r"the observation of b must have the 3 numbers of its space. Got shape \(7,\)"),
        ("back", "an agent that has left its episode must stay away until the next. b came back"),
    ],
)
def test_what_breaks_off_is_one_line(what, message):
    broken = type("Broken", (Broken,), {"what": what})
    env = copies_of(lambda: broken({1: {"b": "dead"}} if what == "back" else None))
    env.reset()
    with pytest.raises(EnvironmentFailed, match=message) as error:
        play(env, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pettingzoo/mpe2.simple_spred_v3"}, "Did you mean 'mpe2.simple_spread_v3'"),
        ({"name": "pettingzoo/no_such.module"}, "Unknown PettingZoo module 'no_such.module'"),
        ({"name": "pettingzoo/json"}, "must be a module with a function parallel_env"),
        ({"name": SPREAD, "agents": 5}, "`agents` must be 3 in pettingzoo/mpe2.simple_spread_v3"),
        ({"name": SPREAD, "args": {"n": 2}}, "making it raised TypeError: .* argument 'n'"),
        ({"name": KNIGHTS, "args": {"obs_method": "image"}}, "no image"),
    ],
)
def test_bad_input_is_a_usage_error(arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        make_env(copies=2, **arguments)
    assert "\n" not in str(error.value)


def test_missing_extra_is_one_line_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("gradlab.extras.installed", lambda module: module != "mpe2")
    with pytest.raises(UsageError, match=r"need mpe2, .*: pip install 'gradlab\[pettingzoo\]'"):
        make_env(SPREAD, copies=2)


def test_modules_of_mpe2_are_listed():
    assert f"pettingzoo/{module_names()[-1]}".startswith("pettingzoo/mpe2.simple_")
    assert SPREAD.removeprefix("pettingzoo/") in module_names()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (SPREAD, {"method": "hypermarl", "algorithm": "mappo"}),
        (LISTENER, {"method": "nops", "pad": True}),
        (KNIGHTS, {"method": "fups-id"}),
    ],
)
def test_training_is_diagnosed_and_resumes_to_the_same_bits(tmp_path, name, settings):
    config = TrainConfig.model_validate(
        settings
        | {"env": name, "env_args": REAL[name], "copies": 3, "steps": 32, "frames": 3 * 32 * 3}
        | {
            "every": 2,
            "diagnostics": "full" if name == SPREAD else "light",
            "network": {"hidden": [8]},
        }
        | {"hypernetwork": {"hidden": [8]}, "ppo": {"minibatches": 2, "epochs": 2}}
    )
    told = []
    assert train_run(config, tmp_path / "whole", tell=told.append)
    run = open_run(tmp_path / "whole")
    assert any(name in line and run.info["resuming"] in line for line in told)
    assert run.info["resuming"].startswith("the episodes under way are played again")
    assert float(run.quantity("residual").max()) < 1e-4
    assert not math.isnan(float(run.quantity("episode_return")[-1]))
    updates = iter(range(1, 9))
    assert not train_run(config, tmp_path / "parts", stop=lambda: next(updates) == 2)
    assert train_run(config, tmp_path / "parts", resume=True)
    same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", [SPREAD, LISTENER])
def test_what_is_wrapped_passes_the_test_of_pettingzoo(name):
    for env in make_env(name, copies=1, args=REAL[name])._envs:
        parallel_api_test(env, num_cycles=50)
