"""Critics that read the environment's own world state; what episodes come to."""

import json

import numpy as np
import pytest
import torch
from leaving_game import AGENTS, LeavingGame
from resuming import same_end

from gradlab.checks import UsageError
from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.episodes import rate_interval
from trainers.evaluation import evaluate
from trainers.generators import METHODS
from trainers.loop import Trainer
from trainers.train import train_run

COPIES, STEPS = 9, 12
SETTINGS = {
    "env": "specialisation",  # replaced
    "algorithm": "mappo",
    "critic_input": "state",
    "agents": AGENTS,
    "copies": COPIES,
    "steps": STEPS,
    "frames": COPIES * STEPS * 3,
    "network": {"hidden": [6, 5]},
    "hypernetwork": {"hidden": [7]},
    "seps": {"pretraining_frames": COPIES * STEPS},
    "every": 2,
    "effects_every": 2,
    "evaluation": {"every": 1, "episodes": 5},
}
QUIET = {"diagnostics": "off", "evaluation": {"every": 0}}
RECURRENT = {"network": {"hidden": [6], "memory": "gru", "memory_size": 5}}


@pytest.fixture(autouse=True)
def _game(monkeypatch):
    """Put the game in place of what a trainer makes."""
    monkeypatch.setattr(
        "trainers.loop.make_env",
        lambda _name, *, copies, seed, **_: LeavingGame(copies, seed=seed, garbage=torch.nan),
    )


def trainer_of(**settings):
    return Trainer(TrainConfig.model_validate(SETTINGS | settings))


def watched(env):
    """What an environment says at each step, and how its world stood before."""
    steps, states = [], []
    plain = env.step

    def step(action):
        states.append(env.world_state())
        steps.append(plain(action))
        return steps[-1]

    env.step = step
    return steps, states


def values_by_hand(trainer, states):
    """What each agent's critic says of world states [row, state], one by one."""
    found = torch.empty(AGENTS, len(states))
    for agent in range(AGENTS):
        for row, state in enumerate(states):
            arguments = (state[None, None],) if trainer.critic.reads_observation else ()
            theta = trainer.critic(torch.tensor([agent]), *arguments)
            if arguments:
                theta = {name: tensor[:, 0] for name, tensor in theta.items()}
            theta = {name: tensor[0] for name, tensor in theta.items()}
            found[agent, row] = trainer.critic.mlp.forward(theta, state).item()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_critics_value_how_the_world_stands(method):
    trainer = trainer_of(method=method)
    steps, states = watched(trainer.collector.env)
    samples = trainer._collect().samples
    assert torch.equal(samples["world_state"], torch.cat(states)[None])
    assert trainer.critic.mlp.observation_size == AGENTS + 1
    value = samples["value"].unflatten(1, (STEPS, COPIES))
    with torch.no_grad():
        for t in (0, 5, STEPS - 1):
            torch.testing.assert_close(value[:, t], values_by_hand(trainer, states[t]))
        # a step after which an episode was cut off looks at the world before the reset
        cut = [(t, c) for t, step in enumerate(steps) for c in step.truncated.nonzero()[:, 0]]
        assert len(cut) > 2
        for t, copy in cut[:3]:
            step = steps[t]
            (following,) = values_by_hand(trainer, step.final_world_state[copy][None]).mT
            going_on = step.active[:, copy]
            delta = step.reward[:, copy] + 0.99 * following - value[:, t, copy]
            advantage = samples["advantage"].unflatten(1, (STEPS, COPIES))[:, t, copy]
            torch.testing.assert_close(advantage[going_on], delta[going_on])


OPTIONS = {
    "plain": {},
    "scales": {"normalise": {"observations": True, "rewards": True}, "method": "nops"},
    "memory": RECURRENT,
    "coupled": {"method": "hypermarl-coupled", "effects_every": 1000},
}


@pytest.mark.parametrize(
    "options",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "coupled" else []) for name in OPTIONS],
)
def test_training_is_diagnosed_evaluated_and_resumed_to_the_bit(tmp_path, options):
    config = TrainConfig.model_validate(SETTINGS | OPTIONS[options])
    assert train_run(config, tmp_path / "whole")
    done = []
    for stop in (2, None):
        train_run(
            config,
            tmp_path / "parts",
            resume=True,
            progress=lambda frames, _: done.append(frames // (COPIES * STEPS)),
            stop=lambda stop=stop: done[-1] == stop,
        )
    same_end(tmp_path / "whole", tmp_path / "parts")
    run = open_run(tmp_path / "whole")
    assert set(run.quantity("residual")["network"].values) == {"actor", "critic"}
    assert (run.quantity("residual") < 1e-6).all()
    plain = SETTINGS | OPTIONS[options] | QUIET
    train_run(TrainConfig.model_validate(plain), tmp_path / "plain")
    for name in ("policy_loss", "value_loss", "episode_return"):
        np.testing.assert_array_equal(
            run.quantity(name).values, open_run(tmp_path / "plain").quantity(name).values
        )


def test_world_states_are_scaled_by_moments_of_their_own():
    trainer = trainer_of(normalise={"observations": True})
    _, states = watched(trainer.collector.env)
    for _ in range(2):
        samples = trainer._collect().samples
    moments = trainer.collector.normalisers["world_state"].moments
    seen = torch.cat([*states, trainer.collector.env.world_state()]).double()
    assert moments.count == len(seen)
    torch.testing.assert_close(moments.mean, seen.mean(0))
    last = samples["world_state"][0].unflatten(0, (STEPS, COPIES))[-1]
    known = seen[:-COPIES]
    deviation = (known.var(0, correction=0) + 1e-8).sqrt()
    expected = ((states[-1] - known.mean(0)) / deviation).clamp(-10, 10).float()
    torch.testing.assert_close(last, expected)


def test_recurrent_critics_remember_how_the_world_stood():
    trainer = trainer_of(**RECURRENT)
    rollout = trainer._collect()
    samples = rollout.samples
    assert samples["world_state"].shape == (1, COPIES, STEPS, AGENTS + 1)
    assert trainer.critic.mlp.memory.inputs == AGENTS + 1
    # the same values as reading each segment at once
    with torch.no_grad():
        read = samples["world_state"].expand(AGENTS, -1, -1, -1)
        batch = {
            "observation": read,
            "memory": samples["critic_memory"],
            "starts": samples["starts"],
        }
        theta = trainer.critic.all_agents()
        value = trainer.critic.mlp.forward(theta, trainer.critic.mlp.read(theta, batch)).squeeze(-1)
    torch.testing.assert_close(value, samples["value"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"algorithm": "ippo"},
            "`critic_input` must be observations with --algorithm ippo, whose critics read their "
            "agent's own. Got critic_input='state'.",
        ),
        (
            {},
            "`critic_input` must be observations: specialisation has no world state. Got "
            "critic_input='state'.",
        ),
    ],
)
def test_state_that_is_not_there_or_not_read_is_refused(monkeypatch, settings, message):
    monkeypatch.setattr("trainers.loop.make_env", make_env)
    with pytest.raises(UsageError) as error:
        trainer_of(**settings)
    assert str(error.value) == message


def test_share_of_episodes_that_came_to_something_is_recorded_of_each_rollout(tmp_path):
    config = TrainConfig.model_validate(SETTINGS | {"steps": 4, "frames": COPIES * 4 * 4, **QUIET})
    assert train_run(config, tmp_path / "r")
    found = open_run(tmp_path / "r").quantity("outcome_rate")
    assert found.dims == ("update", "outcome")
    assert found["outcome"].values.tolist() == ["win", "early"]
    trainer = Trainer(config)
    steps, _ = watched(trainer.collector.env)
    for update in range(4):
        steps.clear()
        trainer._next_update()
        ended = torch.cat([step.ended for step in steps])
        for name in ("win", "early"):
            happened = torch.cat([step.outcomes[name] for step in steps])[ended]
            assert found[update].sel(outcome=name) == pytest.approx(happened.double().mean())
    rollouts = {tuple(row) for row in found.values.tolist()}
    assert len(rollouts) > 2
    short = TrainConfig.model_validate(SETTINGS | {"steps": 1, "frames": COPIES})
    trainer = Trainer(short)
    trainer.collector.env.last = torch.full((AGENTS, COPIES), 9)  # nobody leaves
    assert trainer._collect().outcomes == {"win": [], "early": []}


def test_no_episode_that_ended_has_no_rate(tmp_path, monkeypatch):
    def patient(_name, *, copies, seed, **_):
        env = LeavingGame(copies, seed=seed)
        env._draw = lambda: torch.full((AGENTS, copies), 9)
        env.last = env._draw()
        return env

    monkeypatch.setattr("trainers.loop.make_env", patient)
    settings = SETTINGS | {"steps": 5, "frames": COPIES * 10, **QUIET}
    train_run(TrainConfig.model_validate(settings), tmp_path / "r")
    rates = open_run(tmp_path / "r").quantity("outcome_rate")
    assert np.isnan(rates.values[0]).all()
    assert rates.values[1].tolist() == [1.0, 0.0]  # all were cut off at the seventh step


def test_evaluation_counts_what_each_copy_s_first_episode_came_to(tmp_path, capsys):
    settings = SETTINGS | {"frames": COPIES * STEPS, "diagnostics": "off"}
    assert train_run(TrainConfig.model_validate(settings), tmp_path / "r")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "r"), "--episodes", "40", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    wins, early = (document["outcomes"][name] for name in ("win", "early"))
    # it is a win if and only if the horizon is reached
    assert wins == [
        length == 7 and win for length, win in zip(document["lengths"], wins, strict=True)
    ]
    assert early == [length < 4 for length in document["lengths"]]
    assert 0 < sum(wins) < 40
    rates = document["quantities"]["evaluation_outcome_rate"]
    assert rates["coordinates"] == {"outcome": ["win", "early"]}
    assert rates["values"] == pytest.approx([sum(wins) / 40, sum(early) / 40])
    assert main(["evaluate", str(tmp_path / "r"), "--episodes", "40"]) == 0
    printed = capsys.readouterr().out
    rate, low, high = rate_interval(torch.tensor(wins))
    expected = (
        f"win: {rate:.1%} of the episodes ({sum(wins)}; 95 % interval {low:.1%} to {high:.1%})."
    )
    assert expected in printed.replace("\n", " ")
    recorded = open_run(tmp_path / "r").quantity("evaluation_outcome_rate")
    again = evaluate(tmp_path / "r").metrics
    assert again.evaluation_outcome_rate.values.tolist() == recorded.values[-1].tolist()
    assert (again.evaluation_outcome_rate_low < again.evaluation_outcome_rate_high).all()


@pytest.mark.parametrize(("happened", "of"), [(0, 5), (3, 7), (20, 20), (31, 100)])
def test_interval_of_a_share_is_wilsons(happened, of):
    rate, low, high = rate_interval(torch.arange(of) < happened)
    p, z = happened / of, 1.959963984540054
    middle = (p + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * (p * (1 - p) / of + z**2 / (4 * of**2)) ** 0.5
    assert (rate, low, high) == pytest.approx((p, middle - half, middle + half), abs=1e-12)
