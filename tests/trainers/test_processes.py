"""A training by several processes is the one by a single process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from joining import train_together
from resuming import same_end

from gradlab.checks import UsageError
from gradlab.run import open_run
from gradlab.run_writer import is_run
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.loop import Trainer
from trainers.processes import ALONE, Group, Share, joined
from trainers.train import train_run

SAME = 1e-5
SMALL = (
    *("--copies", "16", "--steps", "10", "--every", "1", "--effects-every", "2"),
    *("--network.hidden", "16", "--hypernetwork.hidden", "16", "--diagnostics", "full"),
    *("--ppo.epochs", "2", "--ppo.minibatches", "3", "--threads", "1"),
)
NORMALISED = ("--normalise.observations", "true", "--normalise.rewards", "true")


class Numbered(Group):
    """One of several processes, which are not there."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def torchrun(tmp_path, *options, processes=2, **further):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "gradlab", "train", *options]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    settings = {"cwd": tmp_path, "text": True, "env": environment}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings, **further
    )


def trained(tmp_path, name, *options, processes=2):
    """Train by several processes, to the end."""
    process = torchrun(tmp_path, *options, "--out", name, processes=processes)
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    assert out.count("Run: ") == 1
    return tmp_path / name


def alone(tmp_path, name, run):
    """Train with the settings of a run, by this process."""
    config = TrainConfig.model_validate(open_run(run).config)
    assert train_run(config, tmp_path / name)
    return tmp_path / name


# Made of float32 gradients that all but cancel, or 0 but for their rounding.
NEAR_ROUNDING = {"variance_jacobian", "factorisation_gap", "gradient_diversity"}


def assert_same(run, other):
    """Of each network's weights, and of each thing that is recorded, all differ by at most `SAME`
    of the largest."""
    ours, theirs = (newest_checkpoint(folder)[0] for folder in (run, other))
    for network in ("actor.", "critic."):
        found, expected = (
            torch.cat([part.flatten() for _, part in sorted(each.under(network).items())]).numpy()
            for each in (theirs, ours)
        )
        assert len(expected)
        _assert_close(network, found, expected)
    ours, theirs = open_run(run), open_run(other)
    assert ours.quantities == theirs.quantities
    for name in set(ours.metrics) - {"seconds", "residual"} - NEAR_ROUNDING:
        _assert_close(name, theirs.metrics[name].values, ours.metrics[name].values)
    assert float(theirs.metrics["residual"].max()) < 1e-12


def _assert_close(name, found, expected):
    assert np.array_equal(np.isnan(found), np.isnan(expected)), name
    found, expected = np.nan_to_num(found), np.nan_to_num(expected)
    apart = np.abs(found - expected).max(initial=0)
    assert apart <= SAME * np.abs(expected).max(initial=0), (name, apart)


def test_two_processes_train_as_one_does(tmp_path):
    settings = {
        "env": "specialisation-temporal",
        "env_args": {"horizon": 7},
        "agents": 3,
        "copies": 16,
        "steps": 10,
        "frames": 320,
        "every": 1,
        "effects_every": 2,
        "network": {"hidden": [16]},
        "hypernetwork": {"hidden": [16]},
        "ppo": {"epochs": 2, "minibatches": 3},
        "normalise": {"observations": True, "rewards": True},
        "diagnostics": "full",
    }
    run = tmp_path / "two"
    train_together(settings, run)
    assert_same(alone(tmp_path, "one", run), run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--env", "specialisation-temporal", "--env-arg", "horizon=7", *NORMALISED),
        ("--env", "vmas/navigation", "--algorithm", "mappo", "--method", "fups-id"),
        ("--env", "vmas/balance", "--method", "hypermarl-linear", *NORMALISED),
        ("--env", "specialisation", "--algorithm", "happo", "--method", "nops"),
        ("--env", "specialisation", "--method", "hypermarl-coupled"),
        ("--env", "specialisation-temporal", "--aggregate", "pcgrad", "--method", "fups"),
        ("--env", "specialisation-temporal", "--algorithm", "a2c", "--method", "nops"),
        ("--env", "specialisation-temporal", "--network.memory", "gru", *NORMALISED),
        ("--env", "specialisation-temporal", "--method", "kaleidoscope"),
        ("--env", "pettingzoo/mpe2.simple_spread_v3", "--method", "fups-id"),
        (
            *("--env", "mamujoco/halfcheetah-2x3", "--algorithm", "mappo"),
            *("--critic-input", "state", *NORMALISED),
        ),
        ("--env", "smax/3m", "--network.memory", "gru", "--pad", "true"),
    ],
    ids=lambda options: "-".join(o.removeprefix("--") for o in options if "." not in o[:12]),
)
def test_processes_train_as_one_does_in_every_way(tmp_path, options):
    run = trained(tmp_path, "two", *options, *SMALL, "--frames", "320")
    assert_same(alone(tmp_path, "one", run), run)


@pytest.mark.slow
def test_four_processes_train_as_one_does(tmp_path):
    options = ("--env", "specialisation", "--frames", "320", "--ppo.minibatches", "80")
    run = trained(tmp_path, "four", *options, *SMALL[:-4], processes=4)
    assert_same(alone(tmp_path, "one", run), run)


@pytest.mark.slow
def test_killed_process_ends_all_and_the_run_goes_on_to_the_same_bits(tmp_path):
    options = ("--env", "vmas/balance", *SMALL, *NORMALISED, "--frames", "3200")
    whole = trained(tmp_path, "whole", *options)
    process = torchrun(tmp_path, *options, "--out", "killed")
    killed = tmp_path / "killed"
    until(lambda: is_run(killed) and newest_checkpoint(killed)[0] is not None)
    os.kill(worker(process.pid, rank=1), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = (line for line in err.splitlines() if line.startswith("gradlab:"))
    assert line.startswith("gradlab: training failed: process 0 of 2 has lost the others")
    assert "torchrun --standalone --nproc-per-node 2 -m gradlab train --resume" in line
    assert open_run(killed).state == "failed"

    process = torchrun(tmp_path, "--resume", "--out", "killed", processes=4)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("gradlab: error: ") == 1
    assert "is of a training by 2 processes" in err

    trained(tmp_path, "killed", "--resume")
    same_end(whole, killed)


@pytest.mark.slow
def test_stopped_processes_save_together_and_go_on_to_the_same_bits(tmp_path):
    options = ("--env", "specialisation-temporal", *SMALL, "--frames", "4800")
    whole = trained(tmp_path, "whole", *options)
    process = torchrun(tmp_path, *options, "--out", "stopped")
    stopped = tmp_path / "stopped"
    until(lambda: is_run(stopped) and newest_checkpoint(stopped)[0] is not None)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("gradlab: stopped and saved. To go on: torchrun ") == 1
    assert open_run(stopped).state == "stopped"
    trained(tmp_path, "stopped", "--resume")
    same_end(whole, stopped)


@pytest.mark.slow
def test_failure_in_one_process_is_told_once_and_the_last_good_state_saved(tmp_path):
    options = (
        "--env",
        "failing_game:make",
        "--env-arg",
        "steps=25",
        "--pad",
        "true",
        *SMALL,
        "--frames",
        "800",
    )
    (tmp_path / "failing_game.py").write_text(FAILING)
    process = torchrun(tmp_path, *options, "--out", "run")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = (line for line in err.splitlines() if line.startswith("gradlab: training failed"))
    assert "update 2: process 1 of 2: reward is nan (agent 0, step 5" in line
    assert "Saved is the state after update 1" in line
    assert newest_checkpoint(tmp_path / "run")[0].update == 1


FAILING = """
import os
from parallel_game import ParallelGame

class Game(ParallelGame):
    played = 0

    def step(self, actions):
        self.played += 1
        seen, reward, *rest = super().step(actions)
        if os.environ["RANK"] == "1" and self.played == self.steps + 1:  # once
            reward = dict.fromkeys(reward, float("nan"))
        return seen, reward, *rest

def make(steps):
    return Game(steps=steps)
"""


@pytest.mark.slow
def test_bad_usage_is_told_once(tmp_path):
    process = torchrun(tmp_path, "--copies", "7")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("gradlab: error: ") == 1
    assert "`copies` must be a multiple of 2 with 2 processes: each has as many." in err


def until(holds):
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never came to that")


def worker(launcher, *, rank):
    """Find the process that torchrun has started under a number."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (found,) = (
        int(child)
        for child in children
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{child}/environ').read_text()}"
    )
    return found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"copies": 9}, "`copies` must be a multiple of 2 with 2 processes: each has as many. Got"),
        ({"algorithm": "matd3"}, "`algorithm` must be one of ippo, mappo, happo, a2c with 2"),
        ({"method": "seps"}, "seps looks at what agents of all copies saw. Got method='seps'"),
        (
            {"env": "bps/15-3-5"},
            "bps/15-3-5 can't be shared out over several processes: its copies",
        ),
        (
            {"env": "vmas/wind_flocking"},
            "vmas/wind_flocking can't be shared out over several processes: its",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cant_be_shared_out_is_refused(settings, message):
    with pytest.raises(UsageError) as refused:
        Trainer(TrainConfig(**settings), Numbered(1, 2))
    assert message in str(refused.value)


@pytest.mark.parametrize("steps", [1, 5], ids=["segments", "steps"])
def test_shares_are_parts_of_the_whole(steps):
    of, size = 6, 3
    samples = torch.arange(2 * steps * of).view(2, steps * of)
    minibatch = torch.randperm(steps * of, generator=torch.Generator().manual_seed(0))[: of // 2]
    seen = torch.full_like(minibatch, -1)
    for rank in range(size):
        share = Share(group=Numbered(rank, size), of=of)
        own = share.part(samples)
        places, numbers = share.places(minibatch)
        seen[places] = own[0, numbers]
        assert (own[0] % of // share.copies == rank).all()
        noise = share.drawn(lambda shape: torch.arange(shape.numel()).view(shape), (2, 2, 3))
        assert torch.equal(noise, torch.arange(2 * of * 3).view(2, of, 3)[:, share.own])
    assert torch.equal(seen, samples[0, minibatch])


def test_process_that_torchrun_has_not_started_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with joined() as group:
        assert group is ALONE
