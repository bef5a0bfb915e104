import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from resuming import same_end
from selection import slow_but

from gradlab.checks import Failed, UsageError
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.checkpoints import FOLDER, Checkpoint, newest_checkpoint, write_checkpoint
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.vector_env import Discrete
from trainers.envs.vmas import scenario_files
from trainers.train import train_run

CASES = {
    "game": {"method": "fups-id", "env": "specialisation-temporal", "agents": 3},
    "hypermarl": {"method": "hypermarl", "env": "specialisation", "agents": 3},
    "vmas": {"method": "nops", "env": "vmas/navigation", "agents": 2},
    "padded": {
        "method": "hypermarl",
        "algorithm": "mappo",
        "env": "vmas/simple_world_comm",
        "env_args": {"max_steps": 12, "continuous_actions": False},
        "pad": True,
        "hypernetwork": {"hidden": [8]},
    },
    "parts": {
        "actor_method": "hypermarl",
        "critic_method": "fups-id-nostate",
        "env": "vmas/navigation",
        "agents": 2,
        "network": {"match": "hypermarl-linear", "log_std": "agent", "hidden": [8]},
        "hypernetwork": {"embedding": "random", "shared_trunk": True, "hidden": [8]},
    },
    "off-policy": {
        "method": "hypermarl",
        "algorithm": "matd3",
        "env": "vmas/navigation",
        "env_args": {"max_steps": 12},
        "agents": 2,
        "normalise": {"observations": True, "rewards": True},
        "matd3": {"warmup_frames": 100, "replay_frames": 200, "batch_size": 16},
        "hypernetwork": {"hidden": [8]},
    },
    "off-policy, numbered": {
        "method": "nops",
        "algorithm": "matd3",
        "env": "specialisation-temporal",
        "agents": 3,
        "matd3": {"warmup_frames": 100, "replay_frames": 200, "batch_size": 16},
    },
    "sequential": {
        "algorithm": "happo",
        "env": "specialisation-temporal",
        "agents": 3,
        "normalise": {"observations": True, "rewards": True},
        "ppo": {"epochs": 2, "minibatches": 2, "anneal_learning_rate": True, "target_kl": 0.001},
    },
    "masked": {
        "method": "kaleidoscope",
        "algorithm": "matd3",
        "env": "vmas/navigation",
        "agents": 2,
        "matd3": {"warmup_frames": 100, "replay_frames": 200, "batch_size": 16},
        "kaleidoscope": {"window": 5, "reset_frames": 64, "critic_reset_frames": 64},
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


def unexpected(sentence):
    assert " is padded: " in sentence


def train(folder, settings, *, stop_after=math.inf, tell=unexpected):
    """Train until a number of updates is done, or to the end."""
    done = []
    train_run(
        TrainConfig.model_validate(SMALL | settings),
        folder,
        resume=True,
        progress=lambda frames, _: done.append(frames // 64),
        stop=lambda: done[-1] == stop_after,
        tell=tell,
    )


@pytest.mark.parametrize("case", slow_but(CASES, "game", "vmas", "off-policy", "sequential"))
def test_stopped_and_resumed_run_ends_as_the_uninterrupted_one(tmp_path, case):
    train(tmp_path / "whole", CASES[case])
    train(tmp_path / "parts", CASES[case], stop_after=3)
    train(tmp_path / "parts", CASES[case])
    same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow  # test_kills.py kills at drawn calls
def test_killed_run_resumes_to_the_same_bits_from_the_command_line(tmp_path):
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
        os.kill(process.pid, signal.SIGKILL)
    assert open_run(tmp_path / "killed").state == "died"
    resume = [sys.executable, "-m", "gradlab", "train", "--resume", "--out", "killed"]
    subprocess.run(resume, cwd=tmp_path, check=True, capture_output=True)
    assert open_run(tmp_path / "killed").state == "done"
    same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="ctrl-c"),
        pytest.param(signal.SIGTERM, id="terminate", marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_ends_the_update_saves_and_says_how_to_go_on(tmp_path, number):
    command = [sys.executable, "-m", "gradlab", "train", "--frames", "10000000", "--out", "r"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / "r" / "records.sqlite-wal").exists():
            time.sleep(0.05)
        time.sleep(1)
        with pytest.raises(UsageError, match="is being written by another process"):
            train_run(TrainConfig(frames=10_000_000), tmp_path / "r", resume=True)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "gradlab: stopped and saved. To go on: gradlab train --resume --out r\n"
    run = open_run(tmp_path / "r")
    assert run.state == "stopped"
    checkpoint, problems = newest_checkpoint(tmp_path / "r")
    assert checkpoint is not None
    assert not problems
    assert checkpoint.update == run.quantity("frames")["update"].values[-1]


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << int(place * 1000) % 8
    file.write_bytes(bytes(content))


def cut_in_half(file):
    os.truncate(file, file.stat().st_size // 2)


def put_the_older_in_its_place(file):
    file.write_bytes(min(file.parent.glob(f"*{file.suffix}")).read_bytes())


DAMAGE = {
    "tensors cut off": (".safetensors", cut_in_half),
    "tensors empty": (".safetensors", lambda file: os.truncate(file, 0)),
    "tensors missing": (".safetensors", Path.unlink),
    "tensors of another": (".safetensors", put_the_older_in_its_place),
    "head cut off": (".json", cut_in_half),
    "head empty": (".json", lambda file: os.truncate(file, 0)),
    "head missing": (".json", Path.unlink),
    "head of another": (".json", put_the_older_in_its_place),
    "head is a list": (".json", lambda file: file.write_text("[]")),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder, CASES["game"])
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A training that was stopped twice, with a checkpoint of each time."""
    folder = tmp_path_factory.mktemp("half")
    train(folder, CASES["game"], stop_after=2)
    saved = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    train(folder, CASES["game"], stop_after=4)
    for path in (folder / "checkpoints").iterdir():  # whatever was saved between the two
        if int(path.stem) == 2:
            path.unlink()
    for path, content in saved.items():
        if int(path.stem) == 1:
            path.write_bytes(content)
    return folder


@pytest.mark.parametrize("damage", slow_but(DAMAGE, "tensors cut off", "head of another"))
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, whole, half, damage):
    shutil.copytree(half, tmp_path / "r")
    stem = tmp_path / "r" / "checkpoints" / f"{3:09d}"
    kind, damaged = DAMAGE[damage]
    damaged(stem.with_suffix(kind))
    checkpoint, _ = newest_checkpoint(tmp_path / "r")
    assert checkpoint is not None
    assert checkpoint.update == 1
    told = []
    train(tmp_path / "r", CASES["game"], tell=told.append, stop_after=3)
    (sentence,) = told
    assert sentence.startswith(f"checkpoint {stem} is damaged (")
    assert sentence.endswith("): passed over; going on after update 1")
    assert len(sentence.splitlines()) == 1
    assert open_run(tmp_path / "r").quantity("frames")["update"].values.tolist() == [0, 1, 2]
    left = {path.stem for path in (tmp_path / "r" / "checkpoints").iterdir()}
    assert left == {f"{update:09d}" for update in (1, 2)}
    train(tmp_path / "r", CASES["game"])
    same_end(whole, tmp_path / "r")


def test_every_flipped_bit_of_a_checkpoint_is_noticed(half):
    stem = f"{3:09d}"
    files = [half / "checkpoints" / f"{stem}.{kind}" for kind in ("json", "safetensors")]
    intact = newest_checkpoint(half)[0]
    assert intact is not None
    for place in np.random.default_rng(0).random(100):
        for file in files:
            content = file.read_bytes()
            flip(file, place)
            found, problems = newest_checkpoint(half)
            file.write_bytes(content)
            assert found is not None
            if found.update == 3:  # only the schema's own number says nothing of the content
                assert found.values == intact.values
            else:
                assert (found.update, len(problems)) == (1, 1)


def test_without_a_whole_checkpoint_it_begins_anew_and_says_so(tmp_path, whole, half):
    shutil.copytree(half, tmp_path / "r")
    for file in (tmp_path / "r" / "checkpoints").glob("*.safetensors"):
        os.truncate(file, 10)
    told = []
    train(tmp_path / "r", CASES["game"], tell=told.append)
    assert len(told) == 2
    assert all(sentence.endswith("going on from the beginning") for sentence in told)
    same_end(whole, tmp_path / "r")


def test_refused_resuming_leaves_the_run_as_it_was(tmp_path, half):
    shutil.copytree(half, tmp_path / "r")
    before = (tmp_path / "r" / "run.json").read_bytes()
    fewer = TrainConfig.model_validate(SMALL | CASES["game"] | {"frames": 64})
    with pytest.raises(UsageError, match=r"`frames` must be at least the 256 that .* has done"):
        train_run(fewer, tmp_path / "r", resume=True)
    assert (tmp_path / "r" / "run.json").read_bytes() == before
    assert len(open_run(tmp_path / "r").quantity("frames")) == 4


def test_second_trainer_in_one_folder_is_refused(tmp_path):
    with RunWriter(tmp_path / "r"), pytest.raises(UsageError, match="another process"):
        RunWriter(tmp_path / "r", resume=True)


FAST = ("navigation", "dispersion", "flocking", "simple_reference", "simple_tag")


@pytest.mark.filterwarnings("ignore:Force limits not specified")
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in scenario_files()
    ],
)
def test_vmas_state_is_all_that_the_future_depends_on(scenario):
    random = torch.Generator().manual_seed(0)

    def make(seed):
        return make_env(f"vmas/{scenario}", copies=3, seed=seed, args={"max_steps": 7})

    def action(env):
        space, shape = env.spec.action_space, (env.spec.agents, env.copies)
        assert not isinstance(space, Discrete)
        unit = torch.rand(*shape, space.size, generator=random)
        low, high = (end[:, None] if end.dim() == 2 else end for end in (space.low, space.high))
        return low + (high - low) * unit

    env, other = make(0), make(5)
    for played, steps in ((env, 10), (other, 5)):  # agents' goals may change when all start anew
        played.reset()
        for _ in range(steps):
            played.step(action(played))
    other.load_state(*env.state())
    for _ in range(17):
        following = action(env)
        one, two = env.step(following), other.step(following)
        assert torch.equal(one.observation, two.observation)
        assert torch.equal(one.reward, two.reward)
        assert torch.equal(one.truncated, two.truncated)
        assert torch.equal(one.terminated, two.terminated)


def test_what_would_not_be_read_again_is_not_written(tmp_path):
    much = Checkpoint(update=0, tensors={}, values={"state": "x" * 10**7})
    with pytest.raises(Failed, match="at most 10,000,000 are read"):
        write_checkpoint(tmp_path, much)
    assert not list((tmp_path / FOLDER).iterdir())
