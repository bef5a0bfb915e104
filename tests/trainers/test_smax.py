import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from resuming import same_end

from gradlab.checks import UsageError
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs import environment_names, make_env
from trainers.envs.smax import map_names
from trainers.loop import Trainer
from trainers.train import train_run

COPIES, LIMIT = 4, 20  # the same everywhere, so that each map is compiled once
ARGS = {"max_steps": LIMIT}


def make(seed=0, **args):
    return make_env("smax/3m", copies=COPIES, seed=seed, args=ARGS | args)


def allowed(env, random):
    """Random actions that are available."""
    mask = env.action_mask()
    drawn = torch.multinomial(mask.float().flatten(0, 1), 1, generator=random)
    return drawn.view(mask.shape[:2])


def play(env, steps, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [env.step(allowed(env, random)) for _ in range(steps)]


def same(one, other):
    fields = ("observation", "reward", "terminated", "truncated", "final_observation", "active")
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in fields)
    assert torch.equal(one.final_world_state, other.final_world_state)
    assert torch.equal(one.outcomes["win"], other.outcomes["win"])


def alive(world_state):
    """Which of six marines live [copy, unit], as the world state shows it: the first is health."""
    return world_state[:, : 6 * 10].unflatten(1, (6, 10))[..., 0] > 0


@pytest.mark.slow
def test_every_step_is_jaxmarls_own():
    import jax
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    theirs = HeuristicEnemySMAX(scenario=map_name_to_scenario("3m"), **ARGS)
    quickly = {"xla_backend_optimization_level": 0}
    step = jax.jit(jax.vmap(theirs.step), compiler_options=quickly)
    available = jax.jit(jax.vmap(theirs.get_avail_actions))
    env = make(seed=5)
    seen = env.reset()
    keys, state = env._now["keys"], env._now["battles"]
    random = torch.Generator().manual_seed(1)
    ended = 0
    for _ in range(60):
        mask = env.action_mask()
        action = allowed(env, random)
        ours = env.step(action)
        masks = available(state)
        keys, now = (jax.vmap(jax.random.split)(keys)[:, i] for i in (0, 1))
        chosen = {agent: action[i].int().numpy() for i, agent in enumerate(theirs.agents)}
        observation, state, reward, done, _ = step(now, state, chosen)
        for i, agent in enumerate(theirs.agents):
            assert torch.equal(mask[i], torch.tensor(masks[agent].tolist(), dtype=torch.bool))
            torch.testing.assert_close(
                ours.observation[i], torch.tensor(observation[agent].tolist())
            )
            torch.testing.assert_close(ours.reward[i], torch.tensor(reward[agent].tolist()))
            going_on = ~ours.ended
            left = torch.tensor(done[agent].tolist())
            assert torch.equal(ours.active[i][going_on], ~left[going_on])
        torch.testing.assert_close(
            env.world_state(), torch.tensor(observation["world_state"].tolist())
        )
        assert torch.equal(ours.ended, torch.tensor(done["__all__"].tolist()))
        ended += int(ours.ended.sum())
        seen = ours.observation
    assert ended > 8
    assert seen.shape == (3, COPIES, env.spec.observation_size)


@pytest.mark.slow
def test_battles_end_when_a_side_is_dead_and_are_cut_off_at_the_limit():
    env = make()
    env.reset()
    time = torch.zeros(COPIES, dtype=torch.int64)
    begun = (env.world_state(), env.action_mask())
    counts = {"terminated": 0, "truncated": 0, "win": 0}
    random = torch.Generator().manual_seed(2)
    for _ in range(200):
        near = env.action_mask()[..., 5:]  # shoot whoever is in reach, so that some battles are won
        action = torch.where(near.any(-1), 5 + near.int().argmax(-1), allowed(env, random))
        step = env.step(action)
        time += 1
        allies, enemies = alive(step.final_world_state).split(3, 1)
        over = ~allies.any(1) | ~enemies.any(1)
        assert torch.equal(step.terminated, over)
        # JaxMARL counts the step before it looks at the limit
        assert torch.equal(step.truncated, ~over & (time == LIMIT + 1))
        assert torch.equal(step.active, allies.mT)
        assert torch.equal(step.outcomes["win"], allies.any(1) & ~enemies.any(1))
        unlike = (step.observation != step.final_observation).any(-1).any(0)
        assert torch.equal(unlike, step.ended)
        assert alive(env.world_state())[step.ended].all()
        # what is dead can only stop
        assert torch.equal(env.action_mask()[..., :4].all(-1), step.act_next)
        assert env.action_mask()[..., 4].all()
        counts["terminated"] += int(step.terminated.sum())
        counts["truncated"] += int(step.truncated.sum())
        counts["win"] += int(step.outcomes["win"][step.ended].sum())
        time[step.ended] = 0
    assert all(counts.values()), counts
    assert env.world_state().shape == begun[0].shape == (COPIES, env.spec.world_state_size)
    assert env.action_mask().shape == begun[1].shape == (3, COPIES, env.spec.action_space.n)


@pytest.mark.slow
def test_dead_units_go_on_if_that_is_asked_for():
    env, plain = make(train_dead=True), make()
    env.reset(), plain.reset()
    for ours, theirs in zip(play(env, 40), play(plain, 40), strict=True):
        assert ours.active is None
        assert ours.act_next.all()
        assert torch.equal(ours.observation, theirs.observation)
        assert torch.equal(ours.reward, theirs.reward)


@pytest.mark.slow
def test_tensors_are_jax_s_own_memory():
    env = make()
    env.reset()
    (step,) = play(env, 1)
    assert not step.ended.any()
    seen = env._now["seen"]
    for name, tensor in {
        "observation": step.observation,
        "world_state": env.world_state(),
        "available": env.action_mask(),
    }.items():
        assert tensor.data_ptr() == seen[name].unsafe_buffer_pointer(), name
        assert tensor.is_contiguous()


def test_seed_says_all():
    before = torch.random.get_rng_state()
    first, again, other = (make(seed) for seed in (1, 1, 2))
    assert torch.equal(first.reset(), again.reset())
    assert not torch.equal(first.reset(), other.reset())
    again.reset()
    for one, two in zip(play(first, 40), play(again, 40), strict=True):
        same(one, two)
    assert torch.equal(torch.random.get_rng_state(), before)
    largest = make(2**32 - 1)  # as evaluations may have
    assert not torch.equal(largest.reset(), make(2**32 - 2).reset())


def test_state_is_all_that_the_future_depends_on():
    env, other = make(0), make(7)
    env.reset(), other.reset()
    play(env, 30), play(other, 3)
    other.load_state(*env.state())
    assert torch.equal(env.action_mask(), other.action_mask())
    assert torch.equal(env.world_state(), other.world_state())
    for one, two in zip(play(env, 40), play(other, 40), strict=True):
        same(one, two)
    assert env._battle.step._cache_size() == env._battle.start._cache_size() == 1
    tensors, values = env.state()
    tensors.pop("/keys")
    with pytest.raises(UsageError, match=r"smax/3m and the simulator differ in '/keys'"):
        other.load_state(tensors, values)


@pytest.mark.parametrize(
    ("name", "agents", "args", "message"),
    [
        ("3n", None, {}, "Unknown SMAX map '3n'. Did you mean '3m'? Known: 3m, 2s3z"),
        ("3m", 4, {}, "`agents` must be 3 on this map. Got agents=4."),
        ("3m", None, {"max_step": 3}, "Unknown argument of smax/3m 'max_step'. Did you mean 'max_"),
        ("3m", None, {"num_allies": 4}, "Unknown argument of smax/3m 'num_allies'"),
        ("3m", None, {"max_steps": 0}, "`max_steps` must be at least 1. Got max_steps=0."),
        ("3m", None, {"max_steps": 2.5}, "`max_steps` must be of type int. Got max_steps=2.5."),
        ("3m", None, {"train_dead": 1}, "`train_dead` must be of type bool. Got train_dead=1."),
        ("3m", None, {"time_per_step": 0.0}, "`time_per_step` must be above 0."),
        (
            "3m",
            None,
            {"attack_mode": "nearest"},
            "`attack_mode` must be one of closest, random. Got attack_mode='nearest'.",
        ),
    ],
)
def test_what_there_is_not_is_named(name, agents, args, message):
    with pytest.raises(UsageError) as error:
        make_env(f"smax/{name}", copies=2, agents=agents, args=args)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_missing_package_is_named_with_what_installs_it(monkeypatch):
    find = "gradlab.extras.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None if name == "jaxmarl" else object())
    assert map_names() == []
    with pytest.raises(UsageError, match=r"jaxmarl, which is not installed.*gradlab\[smax\]"):
        make_env("smax/3m", copies=2)


def test_maps_are_jaxmarls():
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    assert map_names() == list(MAP_NAME_TO_SCENARIO)
    assert {f"smax/{name}" for name in map_names()} < set(environment_names())


TRAINING = {
    "method": "hypermarl",
    "algorithm": "mappo",
    "critic_input": "state",
    "env": "smax/3m",
    "env_args": ARGS,
    "copies": COPIES,
    "steps": 16,
    "frames": COPIES * 16 * 4,
    "network": {"hidden": [8]},
    "hypernetwork": {"hidden": [8]},
    "every": 2,
    "effects_every": 2,
    "evaluation": {"every": 2, "episodes": COPIES},
}


def trainer_of(**settings):
    return Trainer(TrainConfig.model_validate(TRAINING | settings))


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_dead_units_have_no_samples_and_nobody_does_what_is_out_of_reach(memory):
    trainer = trainer_of(steps=40, network={"hidden": [8], "memory": memory, "memory_size": 8})
    env = trainer.collector.env
    states, plain = [], env.step

    def step(action):
        states.append(env.world_state())
        return plain(action)

    env.step = step
    samples = trainer._collect().samples
    lives = torch.stack([alive(state)[:, :3].mT for state in states], 1)  # agent, time, copy
    shaped = lives.mT if memory == "gru" else lives.flatten(1, 2)
    assert torch.equal(samples["active"], shaped)
    assert 0.3 < lives.float().mean() < 0.97
    possible = samples["action_mask"].gather(-1, samples["action"][..., None])[..., 0]
    assert possible.all()
    assert not samples["action_mask"][samples["active"]].all()
    # whatever stands there in place of samples, the update is the same
    random = torch.Generator().manual_seed(0)
    ends = []
    for noise in (0.0, 3.0):
        other = trainer_of(steps=40, network={"hidden": [8], "memory": memory, "memory_size": 8})
        changed = {
            name: tensor + noise * ~shaped * torch.randn(shaped.shape, generator=random)
            if name in {"log_prob", "value", "advantage", "target"}
            else tensor
            for name, tensor in samples.items()
        }
        other._update(changed)
        ends.append([*other.actor.parameters(), *other.critic.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_training_reads_the_world_s_state_and_resumes_to_the_bit(tmp_path):
    config = TrainConfig.model_validate(TRAINING | {"normalise": {"observations": True}})
    assert train_run(config, tmp_path / "whole")
    done = []
    for stop in (2, None):
        train_run(
            config,
            tmp_path / "parts",
            resume=True,
            progress=lambda frames, _: done.append(frames // (COPIES * 16)),
            stop=lambda stop=stop: done[-1] == stop,
        )
    same_end(tmp_path / "whole", tmp_path / "parts")
    run = open_run(tmp_path / "whole")
    assert (run.quantity("residual") < 1e-4).all()
    assert run.quantity("outcome_rate")["outcome"].values.tolist() == ["win"]
    assert run.quantity("evaluation_outcome_rate").shape == (2, 1)
    trainer = Trainer(config)
    assert trainer.critic.mlp.observation_size == trainer.spec.world_state_size


def test_dead_units_have_samples_if_that_is_asked_for():
    trainer, all_along = trainer_of(), trainer_of(env_args=ARGS | {"train_dead": True})
    assert "active" in trainer._collect().samples
    assert "active" not in all_along._collect().samples


@pytest.mark.slow
@pytest.mark.parametrize("name", map_names())
def test_every_map_makes_spaces_and_steps(name):
    env = make_env(f"smax/{name}", copies=2, args={"max_steps": 3})
    observation = env.reset()
    spec = env.spec
    assert observation.shape == (spec.agents, 2, spec.observation_size)
    assert env.world_state().shape == (2, spec.world_state_size)
    steps = play(env, 9)
    assert sum(int(step.ended.sum()) for step in steps) >= 4
    for step in steps:
        assert step.observation.isfinite().all()
        assert step.final_observation.shape == observation.shape
        assert (step.reward[0] == step.reward).all()
    assert env.action_mask().shape == (spec.agents, 2, spec.action_space.n)


@pytest.mark.slow
@pytest.mark.parametrize("choice", [{"attack_mode": "random"}, {"observation_type": "conic"}])
def test_every_choice_steps(choice):
    env = make(**choice)
    env.reset()
    assert all(step.observation.isfinite().all() for step in play(env, 40))


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_bits_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "gradlab", "train", "--env", "smax/3m", "--copies", "4"]
    command += ["--steps", "16", "--frames", str(64 * 60), "--every", "20", "--method", "fups-id"]
    command += ["--algorithm", "mappo", "--critic-input", "state", "--env-arg", "max_steps=20"]
    subprocess.run([*command, "--out", "whole"], cwd=tmp_path, check=True, capture_output=True)
    with subprocess.Popen(
        [*command, "--out", "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as process:
        records = tmp_path / "killed" / "records.sqlite-wal"
        while process.poll() is None and not (records.exists() and records.stat().st_size > 80_000):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert open_run(tmp_path / "killed").state == "died"
    resume = [sys.executable, "-m", "gradlab", "train", "--resume", "--out", "killed"]
    subprocess.run(resume, cwd=tmp_path, check=True, capture_output=True)
    same_end(tmp_path / "whole", tmp_path / "killed")
    # JaxMARL prints as it is imported; nothing of it is among what is asked for
    asked = [sys.executable, "-m", "gradlab", "evaluate", "whole", "--episodes", "4"]
    found = subprocess.run(
        [*asked, "--format", "json"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert len(json.loads(found.stdout)["outcomes"]["win"]) == 4
    assert not found.stderr


@pytest.mark.slow
def test_hypermarl_learns_to_fight_within_six_minutes(tmp_path):
    """About a minute and a half on a quiet core, most of it training."""
    command = [sys.executable, "-m", "gradlab", "train", "--method", "hypermarl", "--out", "r"]
    command += ["--env", "smax/3m", "--copies", "32", "--steps", "64", "--frames", "120000"]
    command += ["--every", "10", "--effects-every", "20"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=360)
    run = open_run(tmp_path / "r")
    returns, wins = run.quantity("episode_return"), run.quantity("outcome_rate").sel(outcome="win")
    assert returns[-10:].mean() > 2 * returns[0]
    assert wins[-10:].mean() > wins[:10].mean() + 0.03
    residual = run.quantity("residual")
    assert set(residual["network"].values) == {"actor", "critic"}
    assert (residual < 1e-4).all()
    assert "transference" in run.quantities
    page = [sys.executable, "-m", "gradlab", "dashboard", "r", "--html", "r.html"]
    subprocess.run(page, cwd=tmp_path, check=True, capture_output=True)
    assert "smax/3m" in (tmp_path / "r.html").read_text()
