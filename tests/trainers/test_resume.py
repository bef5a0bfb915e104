import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gradlab.checks import UsageError
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.vector_env import Discrete
from trainers.train import train_run

CASES = {
    "game": {"method": "fups-id", "env": "specialisation-temporal", "agents": 3},
    "hypermarl": {"method": "hypermarl", "env": "specialisation", "agents": 3},
    "vmas": {"method": "nops", "env": "vmas/navigation", "agents": 2},
    "parts": {
        "actor_method": "hypermarl",
        "critic_method": "fups-id-nostate",
        "env": "vmas/navigation",
        "agents": 2,
        "network": {"match": "hypermarl-linear", "log_std": "agent", "hidden": [8]},
        "hypernetwork": {"embedding": "random", "shared_trunk": True, "hidden": [8]},
    },
    "options": {
        "method": "hypermarl",
        "algorithm": "mappo",
        "env": "vmas/navigation",
        "env_args": {"max_steps": 12},
        "agents": 2,
        "reward": "team",
        "normalise": {"observations": True, "rewards": True},
        "ppo": {"anneal_learning_rate": True, "anneal_entropy": True, "target_kl": 0.003},
    },
}
SMALL = {"copies": 8, "steps": 8, "frames": 8 * 8 * 6, "every": 2, "effects_every": 2}


def train(folder, settings, *, stop_after=math.inf):
    """Train until a number of updates is done, or to the end; returns the final tensors."""
    done = []
    train_run(
        TrainConfig.model_validate(SMALL | settings),
        folder,
        resume=True,
        progress=lambda frames, _: done.append(frames // 64),
        stop=lambda: done[-1] == stop_after,
        tell=pytest.fail,
    )
    checkpoint, _ = newest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint.tensors


def same_records(one, other):
    for name in one.quantities:
        if name != "seconds":
            a, b = one.quantity(name), other.quantity(name)
            assert a["update"].values.tolist() == b["update"].values.tolist()
            np.testing.assert_array_equal(a.values, b.values)


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_run_ends_as_the_uninterrupted_one(tmp_path, case):
    whole = train(tmp_path / "whole", CASES[case])
    train(tmp_path / "parts", CASES[case], stop_after=3)
    resumed = train(tmp_path / "parts", CASES[case])
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    same_records(open_run(tmp_path / "whole"), open_run(tmp_path / "parts"))


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_killed_run_resumes_to_the_same_bits(tmp_path, delay):
    command = [sys.executable, "-m", "gradlab", "train", "--frames", "12800", "--agents", "2"]
    command += ["--method", "fups-id", "--copies", "16", "--steps", "16", "--every", "10"]
    subprocess.run([*command, "--out", "whole"], cwd=tmp_path, check=True, capture_output=True)
    with subprocess.Popen(
        [*command, "--out", "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as process:
        # past the tables and run.json, which are there before the first update
        records = tmp_path / "killed" / "records.sqlite-wal"
        while process.poll() is None and not (records.exists() and records.stat().st_size > 80_000):
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
    assert open_run(tmp_path / "killed").state == "stopped"
    resume = [sys.executable, "-m", "gradlab", "train", "--resume", "--out", "killed"]
    subprocess.run(resume, cwd=tmp_path, check=True, capture_output=True)
    one, other = open_run(tmp_path / "whole"), open_run(tmp_path / "killed")
    assert other.state == "done"
    same_records(one, other)
    files = [max((run.path / "checkpoints").glob("*.safetensors")) for run in (one, other)]
    weights = [load_file(file) for file in files]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_interrupt_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "gradlab", "train", "--frames", "10000000", "--out", "r"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / "r" / "records.sqlite-wal").exists():
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "gradlab train --resume --out r" in error
    assert "Traceback" not in error
    assert open_run(tmp_path / "r").state == "stopped"
    assert newest_checkpoint(tmp_path / "r")[0] is not None


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    train(tmp_path / "r", CASES["game"], stop_after=2)
    train(tmp_path / "r", CASES["game"], stop_after=4)
    files = sorted((tmp_path / "r" / "checkpoints").glob("*.safetensors"))
    assert [int(file.stem) for file in files] == [1, 3] or len(files) == 2
    content = files[-1].read_bytes()
    files[-1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    checkpoint, problems = newest_checkpoint(tmp_path / "r")
    assert checkpoint is not None
    assert checkpoint.update == int(files[0].stem)
    assert "is damaged" in problems[0]


def test_second_trainer_in_one_folder_is_refused(tmp_path):
    with RunWriter(tmp_path / "r"), pytest.raises(UsageError, match="another process"):
        RunWriter(tmp_path / "r", resume=True)


@pytest.mark.parametrize("scenario", ["navigation", "dispersion", "balance", "flocking"])
def test_vmas_state_is_all_that_the_future_depends_on(scenario):
    random = torch.Generator().manual_seed(0)

    def make(seed):
        return make_env(f"vmas/{scenario}", copies=3, seed=seed, args={"max_steps": 7})

    def action(env):
        space, shape = env.spec.action_space, (env.spec.agents, env.copies)
        assert not isinstance(space, Discrete)
        unit = torch.rand(*shape, len(space.low), generator=random)
        return space.low + (space.high - space.low) * unit

    env, other = make(0), make(5)
    env.reset()
    for _ in range(5):
        env.step(action(env))
    other.reset()
    other.load_state(*env.state())
    for _ in range(10):
        following = action(env)
        one, two = env.step(following), other.step(following)
        assert torch.equal(one.observation, two.observation)
        assert torch.equal(one.reward, two.reward)
        assert torch.equal(one.truncated, two.truncated)
