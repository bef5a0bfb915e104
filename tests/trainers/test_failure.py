"""Trainings that meet what is not finite stop, keep what was good, and can go on."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from selection import slow_but

from gradlab.checks import TrainingFailed, UsageError
from gradlab.run import open_run
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.envs.matrix_games import MatrixGame
from trainers.loop import Trainer
from trainers.train import train_run
from trainers.update import Updater

SMALL = {
    "env": "specialisation-temporal",
    "agents": 3,
    "copies": 4,
    "steps": 4,
    "frames": 4 * 4 * 8,
    "diagnostics": "off",
    "method": "fups-id",
}
BROKEN = 5
"""The update at which something breaks."""


def train(folder, **settings):
    train_run(TrainConfig.model_validate(SMALL | settings), folder, resume=True)
    checkpoint, _ = newest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def break_environment(monkeypatch, field, number, *, always=False):
    """Let one number of one step not be finite, once."""
    step, calls = MatrixGame.step, []

    def broken(self, action):
        found = step(self, action)
        calls.append(1)
        at = 4 * BROKEN + 2  # the third step of the update
        if len(calls) == at + 1 or (always and len(calls) > at):
            tensor = getattr(found, field).clone()
            tensor[1, 3] = number
            return replace(found, **{field: tensor})
        return found

    monkeypatch.setattr(MatrixGame, "step", broken)


def break_loss(monkeypatch):
    """Let one agent's losses be infinite in the second minibatch of one update, once."""
    step, calls = Updater._step, []

    def broken(self, samples, *further):
        calls.append(1)
        if len(calls) == BROKEN * 16 + 2:
            samples["log_prob"][2] = -torch.inf
        return step(self, samples, *further)

    monkeypatch.setattr(Updater, "_step", broken)


def break_actor(monkeypatch):
    """Let one agent's policy alone overflow, once."""
    collect, calls = Trainer._collect, []

    def broken(self):
        calls.append(1)
        if len(calls) == BROKEN + 1:
            overflow(self, agent=2)
        return collect(self)

    monkeypatch.setattr(Trainer, "_collect", broken)


@torch.no_grad()
def overflow(trainer, agent):
    """Make weights whose sum overflows, though each of them is finite."""
    (weight,) = (
        p for name, p in trainer.actor.named_parameters() if "head" in name and p.dim() > 2
    )
    weight[agent] = torch.finfo(torch.float32).max


CASES = {
    "actor": (break_actor, {"method": "nops"}, "the actor's output is "),
    "reward": (lambda m: break_environment(m, "reward", torch.nan), {}, "reward is nan (agent 1, "),
    "observation": (
        lambda m: break_environment(m, "observation", torch.nan),
        {},
        "observation is nan (agent 1, copy 3",
    ),
    "infinite": (
        lambda m: break_environment(m, "observation", torch.inf),
        {},
        "observation is inf (agent 1, ",
    ),
    "joint": (
        lambda m: break_environment(m, "observation", torch.nan),
        {"algorithm": "mappo"},
        "observation is nan (agent 1, copy 3",
    ),
    "normalised": (
        lambda m: break_environment(m, "observation", -torch.inf),
        {"normalise": {"observations": True, "rewards": True}},
        "observation is -inf (agent 1, copy 3)",
    ),
    "loss": (break_loss, {}, "policy_loss is "),
}


@pytest.mark.parametrize("case", slow_but(CASES, "actor", "observation", "loss"))
def test_training_stops_at_what_is_not_finite_and_goes_on_from_before(tmp_path, monkeypatch, case):
    break_it, settings, message = CASES[case]
    whole = train(tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        break_it(patched)
        with pytest.raises(TrainingFailed) as failure:
            train(tmp_path / "broken", **settings)
    text = str(failure.value)
    assert text.startswith(f"update {BROKEN}: {message}")
    assert f"gradlab train --resume --out {tmp_path / 'broken'}" in text
    assert len(text.splitlines()) == 1
    if case in {"loss", "actor"}:
        assert "(agent 2" in text
    run = open_run(tmp_path / "broken")
    assert run.state == "failed"
    assert run.quantity("frames")["update"].values.tolist() == list(range(BROKEN))
    saved, _ = newest_checkpoint(tmp_path / "broken")
    assert saved is not None
    assert saved.update == BROKEN - 1
    assert all(tensor.isfinite().all() for tensor in saved.tensors.values() if tensor.dim())
    assert open_run(tmp_path / "broken").info["error"].startswith("TrainingFailed: update 5: ")
    resumed = train(tmp_path / "broken", **settings)
    assert "error" not in open_run(tmp_path / "broken").info
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(t, resumed.tensors[name]) for name, t in whole.tensors.items())
    assert open_run(tmp_path / "broken").state == "done"


def test_continuous_actions_of_an_actor_that_overflows_are_not_acted_on():
    settings = SMALL | {"method": "nops", "env": "vmas/navigation"}
    trainer = Trainer(TrainConfig.model_validate(settings))
    overflow(trainer, agent=1)
    with pytest.raises(TrainingFailed, match=r"^the actor's action is \S+ \(agent 1, copy 0, comp"):
        trainer._collect()


def test_state_that_cannot_be_made_again_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        break_environment(patched, "reward", torch.nan, always=True)
        with pytest.raises(TrainingFailed, match=f"update {BROKEN}: reward is nan") as failure:
            train(tmp_path / "r")
    saved, _ = newest_checkpoint(tmp_path / "r")
    assert saved is not None
    assert f"the state after update {saved.update};" in str(failure.value)
    assert train(tmp_path / "r").update == 7


def test_gradient_that_is_not_finite_makes_no_step():
    trainer = Trainer(TrainConfig.model_validate(SMALL | {"method": "nops"}))
    before = [p.detach().clone() for p in trainer.actor.parameters()]
    samples = trainer._collect().samples
    for parameter in trainer.actor.parameters():
        parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(1), torch.nan))
    with pytest.raises(TrainingFailed, match=r"norm of the actor's gradient is nan \(agent 1\)"):
        trainer._update(samples)
    pairs = zip(before, trainer.actor.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_command_line_says_it_in_one_line_with_status_1(tmp_path):
    command = [sys.executable, "-m", "gradlab", "train", "--frames", "64", "--copies", "4"]
    command += ["--steps", "8", "--ppo.learning-rate", "1e30", "--out", "r"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("gradlab: training failed: update 0: ")
    assert "There is no earlier state" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert open_run(tmp_path / "r").state == "failed"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "nops"}, "method='fups-id', not 'nops'"),
        ({"network": {"hidden": [8]}}, r"network.hidden=\[64, 64\], not \[8\]"),
        (
            {"algorithm": "mappo", "ppo": {"epochs": 3}},
            "algorithm='ippo', not 'mappo'; ppo.epochs=4, not 3",
        ),
        ({"env_args": {"horizon": 7}}, "env_args.horizon=None, not 7"),
    ],
)
def test_checkpoint_of_another_training_is_refused_by_name(settings, message):
    checkpoint = Trainer(TrainConfig.model_validate(SMALL)).state()
    other = Trainer(TrainConfig.model_validate(SMALL | settings))
    with pytest.raises(UsageError, match=message):
        other.load_state(checkpoint)


@pytest.mark.parametrize(
    ("agents", "minibatches", "most"), [(3, 17, 16), (1, 9, 8)], ids=["three", "one"]
)
def test_minibatches_must_have_samples(agents, minibatches, most):
    settings = SMALL | {"agents": agents}
    Trainer(TrainConfig.model_validate(settings | {"ppo": {"minibatches": most}}))._next_update()
    with pytest.raises(UsageError, match=f"`ppo.minibatches` must be at most {most}:") as error:
        Trainer(TrainConfig.model_validate(settings | {"ppo": {"minibatches": minibatches}}))
    assert f"Got ppo.minibatches={minibatches}" in str(error.value)
