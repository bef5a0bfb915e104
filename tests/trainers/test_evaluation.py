"""Evaluations: whole episodes of their own, which the training does not notice."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from gradlab.checks import Failed, TrainingFailed, UsageError
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.acting import fixed_parameters
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.vector_env import Discrete, VectorEnv
from trainers.envs.vmas import VmasEnv
from trainers.episodes import mean_interval, play_episodes
from trainers.evaluation import evaluate
from trainers.loop import Trainer
from trainers.train import train_run

DISPERSION = {  # some copies eat at once and start anew while others go on to the limit
    "env": "vmas/dispersion",
    "agents": 3,
    "env_args": {"n_food": 2, "food_radius": 0.6, "max_steps": 25, "penalise_by_time": True},
    "method": "nops",
    "copies": 4,
    "steps": 8,
}
NAVIGATION = {
    "env": "vmas/navigation",
    "env_args": {"max_steps": 12},
    "agents": 2,
    "method": "hypermarl",
    "algorithm": "mappo",
    "normalise": {"observations": True, "rewards": True},
}
GAME = {"env": "specialisation-temporal", "env_args": {"horizon": 9}, "method": "fups-id"}
SMALL = {
    "copies": 4,
    "steps": 4,
    "frames": 4 * 4 * 6,
    "agents": 2,
    "diagnostics": "off",
    "network": {"hidden": [8]},
    "hypernetwork": {"hidden": [8]},
    "ppo": {"epochs": 1, "minibatches": 2},
}
EVALUATED = {"evaluation": {"every": 2, "episodes": 5}}


def trainer(settings, **more):
    return Trainer(TrainConfig.model_validate(settings | more))


def train(folder, settings, *, stop_after=math.inf):
    """Train until a number of updates is done, or to the end; returns run and final tensors."""
    done = []
    train_run(
        TrainConfig.model_validate(SMALL | settings),
        folder,
        resume=True,
        progress=lambda frames, _: done.append(frames // 16),
        stop=lambda: done[-1] == stop_after,
        tell=pytest.fail,
    )
    checkpoint, _ = newest_checkpoint(folder)
    assert checkpoint is not None
    return open_run(folder), checkpoint.tensors


def episodes_of(subject, **asked):
    return evaluate(subject, **asked).episodes


class Recorded(VectorEnv):
    """Remembers all that goes through another environment."""

    def __init__(self, env):
        self.env, self.spec, self.copies = env, env.spec, env.copies
        self.observations, self.actions, self.steps = [], [], []

    def reset(self):
        self.observations.append(self.env.reset())
        return self.observations[-1]

    def step(self, action):
        self.actions.append(action)
        self.steps.append(self.env.step(action))
        self.observations.append(self.steps[-1].observation)
        return self.steps[-1]

    def state(self):
        return self.env.state()

    def load_state(self, tensors, values):
        self.env.load_state(tensors, values)


def played(subject, episodes, random=None):
    config = subject.config
    env = Recorded(
        make_env(
            config.env,
            copies=episodes,
            agents=config.agents,
            seed=3,
            args=config.env_args,
            info=True,
        )
    )
    theta = fixed_parameters(subject.actor)
    return env, play_episodes(env, subject.policy, theta, random=random)


@pytest.mark.parametrize("settings", [DISPERSION, NAVIGATION, GAME], ids=lambda s: s["env"])
def test_episodes_equal_a_loop_over_each_copys_first_one(settings):
    subject = trainer(SMALL | settings)
    env, found = played(subject, 16, torch.Generator().manual_seed(0))
    for copy in range(16):
        returns, metrics, length = np.zeros(subject.spec.agents), {}, 0
        for step in env.steps:
            length += 1
            returns += step.reward[:, copy].double().numpy()
            for name, value in step.info.items():
                metrics[name] = metrics.get(name, 0.0) + value[:, copy].double().numpy()
            if step.terminated[copy] or step.truncated[copy]:
                break
        assert found.lengths[copy] == length
        np.testing.assert_allclose(found.returns[:, copy], returns, rtol=1e-10)
        assert metrics.keys() == found.metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(found.metrics[name][:, copy], value, rtol=1e-10)
    assert len(env.steps) == found.lengths.max()


def test_finished_copies_start_anew_and_count_no_more():
    env, found = played(trainer(SMALL | DISPERSION), 16, torch.Generator().manual_seed(0))
    first = int(found.lengths.argmin())
    assert found.lengths[first] < 5 < 25 == found.lengths.max()
    later = [step.reward[:, first] for step in env.steps[found.lengths[first] :]]
    assert torch.stack(later).abs().sum() > 0  # there was something to count wrongly


@pytest.mark.parametrize("settings", [DISPERSION, GAME], ids=lambda s: s["env"])
def test_deterministic_actions_are_each_agents_mode(settings):
    subject = trainer(SMALL | settings)
    env, _ = played(subject, 6)
    theta = subject.actor.double().all_agents()
    space = subject.spec.action_space
    for observation, action in zip(env.observations, env.actions, strict=False):
        for agent, copy in np.ndindex(subject.spec.agents, 6):
            own = {name: t[agent if len(t) > 1 else 0].detach() for name, t in theta.items()}
            seen = observation[agent, copy].double()
            if subject.config.method == "fups-id":
                own["layer0.bias"] = theta["layer0.bias"][agent].detach()
            output = subject.policy.network.forward(own, seen)
            if isinstance(space, Discrete):
                assert action[agent, copy] == output.argmax()
            else:
                middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
                expected = torch.clamp(middle + half * output, space.low, space.high)
                torch.testing.assert_close(
                    action[agent, copy].double(), expected.double(), rtol=1e-4, atol=1e-6
                )


@pytest.mark.parametrize("settings", [DISPERSION, GAME], ids=lambda s: s["env"])
def test_mode_has_the_log_probability_that_training_gives_it(settings):
    subject = trainer(SMALL | settings)
    observation = torch.randn(subject.spec.agents, 7, subject.spec.observation_size)
    theta = subject.actor.policy_for(observation)
    action, log_prob = subject.policy.mode(theta, observation)
    torch.testing.assert_close(subject.policy.evaluate(theta, observation, action)[0], log_prob)
    drawn, _ = subject.policy.sample(theta, observation, torch.Generator().manual_seed(0))
    others = subject.policy.evaluate(theta, observation, drawn)[0]
    assert (others <= log_prob + 1e-6).all()
    assert (others < log_prob - 1e-6).any()


def test_navigations_metrics_add_up_to_the_return():
    found = episodes_of(trainer(SMALL | NAVIGATION), episodes=8, deterministic=False)
    assert set(found.metrics) == {"pos_rew", "final_rew", "agent_collisions"}
    torch.testing.assert_close(sum(found.metrics.values()), found.returns, rtol=1e-5, atol=1e-5)
    assert found.metrics["pos_rew"].abs().min() > 0


@pytest.mark.parametrize(
    ("scenario", "measures"),
    [("balance", 2), ("discovery", 3), ("give_way", 5), ("wind_flocking", 7), ("dropout", 2)],
)
def test_what_a_scenario_measures_is_there_for_every_agent_and_copy(scenario, measures):
    env = make_env(f"vmas/{scenario}", copies=3, info=True)
    env.reset()
    space = env.spec.action_space
    assert not isinstance(space, Discrete)
    action = torch.zeros(env.spec.agents, 3, len(space.low))
    info = env.step(action).info
    assert len(info) == measures
    assert {value.shape for value in info.values()} == {(env.spec.agents, 3)}
    assert not make_env(f"vmas/{scenario}", copies=3).step(action).info


def test_measure_that_one_agent_lacks_is_nan_and_vectors_are_left_out(monkeypatch):
    env = make_env("vmas/balance", copies=2, info=True)
    scenario = env._env.scenario
    own = scenario.info

    def uneven(agent):
        more = {"own": torch.ones(2)} if agent.name == "agent_1" else {}
        return own(agent) | more | {"place": torch.zeros(2, 2)}

    monkeypatch.setattr(scenario, "info", uneven)
    env.reset()
    info = env.step(torch.zeros(env.spec.agents, 2, 2)).info
    assert set(info) == {"pos_rew", "ground_rew", "own"}
    assert info["own"][1].tolist() == [1, 1]
    assert info["own"][[0, 2]].isnan().all()


@pytest.mark.parametrize("episodes", [2, 7, 40])
def test_intervals_are_students(episodes):
    values = torch.randn(3, episodes, dtype=torch.float64)
    mean, low, high = mean_interval(values)
    for row in range(3):
        expected = stats.ttest_1samp(values[row].numpy(), 0.0).confidence_interval(0.95)
        np.testing.assert_allclose([low[row], high[row]], [expected.low, expected.high], rtol=1e-10)
        np.testing.assert_allclose(mean[row], sum(values[row].tolist()) / episodes, rtol=1e-10)


def test_a_single_episode_has_no_interval():
    mean, low, high = mean_interval(torch.ones(2, 1, dtype=torch.float64))
    assert mean.tolist() == [1, 1]
    assert np.isnan([low, high]).all()


@pytest.mark.parametrize("settings", [NAVIGATION, GAME], ids=lambda s: s["env"])
def test_training_is_bitwise_the_same_with_evaluations(tmp_path, settings):
    light = settings | {"diagnostics": "light", "every": 2}
    with_them, tensors = train(tmp_path / "with", light | EVALUATED)
    without, plain = train(tmp_path / "without", light)
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors.items())
    own = {name for name in with_them.quantities if name.startswith("evaluation_")}
    assert set(with_them.quantities) - own == set(without.quantities)
    for name in set(without.quantities) - {"seconds"}:
        np.testing.assert_array_equal(with_them.quantity(name), without.quantity(name))
    assert {tuple(with_them.quantity(name)["update"].values) for name in own} == {(1, 3, 5)}


def test_last_update_is_evaluated_whatever_the_period(tmp_path):
    run, _ = train(tmp_path / "r", GAME | {"evaluation": {"every": 4, "episodes": 1}})
    assert run.quantity("evaluation_return")["update"].values.tolist() == [3, 5]
    assert run.quantity("evaluation_return_low").isnull().all()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("settings", [NAVIGATION, GAME], ids=lambda s: s["env"])
def test_resumed_training_records_the_same_evaluations(tmp_path, settings, deterministic):
    asked = {"evaluation": {"every": 1, "episodes": 3, "deterministic": deterministic}}
    whole, _ = train(tmp_path / "whole", settings | asked)
    train(tmp_path / "parts", settings | asked, stop_after=3)
    resumed, _ = train(tmp_path / "parts", settings | asked)
    names = [name for name in whole.quantities if name.startswith("evaluation_")]
    assert len(names) == (8 if settings is NAVIGATION else 7)
    for name in names:
        np.testing.assert_array_equal(whole.quantity(name), resumed.quantity(name))
    returns = whole.quantity("evaluation_return").values.tolist()
    if settings is NAVIGATION:  # other episodes every time
        assert len(set(returns)) == 6


@pytest.mark.parametrize("settings", [NAVIGATION, GAME], ids=lambda s: s["env"])
def test_a_runs_evaluation_is_the_one_that_its_training_recorded(tmp_path, settings):
    run, _ = train(tmp_path / "r", settings | {"evaluation": {"every": 1, "episodes": 4}})
    updates = [int(file.stem) for file in (tmp_path / "r" / "checkpoints").glob("*.json")]
    assert 5 in updates
    for update in updates:
        found = evaluate(tmp_path / "r", update=update)
        assert (found.update, found.frames) == (update, 16 * (update + 1))
        for name, value in found.metrics.items():
            np.testing.assert_array_equal(value, run.quantity(name).sel(update=update))
    assert evaluate(run).update == 5


def test_seed_and_update_say_which_episodes_are_played():
    subject = trainer(SMALL | NAVIGATION)
    before = subject.state().tensors
    first = episodes_of(subject, episodes=3)
    again = episodes_of(subject, episodes=3)
    assert torch.equal(first.returns, again.returns)
    other_seed = episodes_of(subject, episodes=3, seed=1)
    assert not torch.equal(first.returns, other_seed.returns)
    drawn = [episodes_of(subject, episodes=3, deterministic=False).returns for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(first.returns, drawn[0])
    after = subject.state().tensors
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    subject.updates_done = 1
    assert not torch.equal(first.returns, episodes_of(subject, episodes=3).returns)


def test_global_random_states_stay_as_they_are():
    subject = trainer(SMALL | NAVIGATION)
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    episodes_of(subject, episodes=2, deterministic=False)
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


def test_what_is_not_finite_in_an_evaluation_stops_the_training_before_that_update(
    tmp_path, monkeypatch
):
    step = VmasEnv.step

    def broken(self, action):
        found = step(self, action)
        if not self._info:  # the training's own
            return found
        reward = found.reward.clone()
        reward[1, 2] = torch.inf
        return replace(found, reward=reward)

    monkeypatch.setattr(VmasEnv, "step", broken)
    message = (
        r"update 1: reward in the evaluation is inf \(agent 1, copy 2\)\. Saved is .* update 0;"
    )
    with pytest.raises(TrainingFailed, match=message):
        train(tmp_path / "r", NAVIGATION | EVALUATED)
    with pytest.raises(Failed, match=r"after update 0: reward in the evaluation is inf"):
        evaluate(tmp_path / "r")
    monkeypatch.undo()
    resumed, tensors = train(tmp_path / "r", NAVIGATION | EVALUATED)
    whole, expected = train(tmp_path / "whole", NAVIGATION | EVALUATED)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected.items())
    for name in set(whole.quantities) - {"seconds"}:
        assert resumed.quantity(name).equals(whole.quantity(name))


def test_run_that_is_being_written_can_be_evaluated(tmp_path):
    run, _ = train(tmp_path / "r", GAME, stop_after=3)
    with RunWriter(tmp_path / "r", resume=True):
        found = evaluate(run, episodes=2)
    assert (found.update, found.planned) == (2, 6)


def test_document_holds_every_episode_and_is_json(tmp_path):
    train(tmp_path / "r", NAVIGATION)
    found = evaluate(tmp_path / "r", episodes=1, seed=9)
    file = found.save(tmp_path / "r")
    assert file.name == "000000005-deterministic-1-seed9.json"
    kept = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert kept == found.document()
    assert kept["returns"] == found.episodes.returns.tolist()
    assert kept["quantities"]["evaluation_return_low"]["values"] is None
    assert kept["quantities"]["evaluation_metric"]["coordinates"] == {
        "metric": ["pos_rew", "final_rew", "agent_collisions"],
        "agent": [0, 1],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"episodes": 0}, "`episodes` must be at least 1. Got episodes=0."),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"update": 3}, "`update` must be left out with a trainer"),
    ],
)
def test_bad_numbers_are_usage_errors(arguments, message):
    with pytest.raises(UsageError, match=message):
        evaluate(trainer(SMALL | GAME), **arguments)
