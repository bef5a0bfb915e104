"""A training whose disk fills up loses the update in flight, says so, and goes on once it can."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest
from resuming import same_end

from gradlab.checks import TrainingFailed
from gradlab.cli import run as command_line
from gradlab.run import open_run
from trainers.checkpoints import newest_checkpoint, write_checkpoint
from trainers.config import TrainConfig
from trainers.train import train_run

CONFIG = TrainConfig.model_validate({
    "env": "specialisation-temporal",
    "method": "fups-id",
    "agents": 2,
    "copies": 4,
    "steps": 4,
    "every": 1,
    "network": {"hidden": [8]},
    "ppo": {"epochs": 1},
    "frames": 16 * 40,
})
SIZES = range(16, 1100, 40)
"""Kilobytes: from too few for the tables to nearly enough for all."""


@contextmanager
def disk(folder, kilobytes):
    """A file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        yield folder / "r"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_run(CONFIG, folder / "r")
    return folder / "r"


@pytest.mark.parametrize(
    "kilobytes",
    [kb if kb in {16, 416} else pytest.param(kb, marks=pytest.mark.slow) for kb in SIZES],
)
def test_full_disk_is_one_line_and_what_was_recorded_stays(tmp_path, whole, capsys, kilobytes):
    with disk(tmp_path / "disk", kilobytes) as out:
        with pytest.raises(
            TrainingFailed, match=r"No space left|\(\d+,?\d* bytes are free\)"
        ) as failure:
            train_run(CONFIG, out)
        text = str(failure.value)
        assert f"gradlab train --resume --out {out}" in text
        assert len(text.splitlines()) == 1
        run = open_run(out)
        checkpoint, problems = newest_checkpoint(out)
        assert not problems
        recorded = run.updates("frames") if "frames" in run.quantities else []
        assert recorded == list(range(len(recorded)))
        assert (checkpoint.update if checkpoint else -1) <= len(recorded) - 1
        if kilobytes > 400:
            assert len(recorded) > 5
            assert run.state in {"died", "failed"}
            assert command_line(["conflict", str(out)]) == 0
            assert command_line(["dashboard", str(out), "--html", str(tmp_path / "page.html")]) == 0
            assert f"│ {recorded[-1]}" in capsys.readouterr().out
        subprocess.run(["mount", "-o", "remount,size=9m", str(out.parent)], check=True)
        told = []
        train_run(CONFIG, out, resume=True, tell=told.append)
        assert not told
        same_end(whole, out)


def test_disk_that_is_full_at_once_is_status_1_and_settings_are_given_again(tmp_path, capsys):
    given = ["--env", "specialisation", "--frames", "64", "--copies", "4", "--steps", "8"]
    with disk(tmp_path / "disk", 16) as out:
        assert command_line(["train", *given, "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"gradlab: training failed: {out}/")
        assert len(error.splitlines()) == 1
        subprocess.run(["mount", "-o", "remount,size=64m", str(out.parent)], check=True)
        assert command_line(["train", "--resume", "--out", str(out)]) == 2
        assert "Give them again, with --resume" in capsys.readouterr().err
        assert command_line(["train", *given, "--resume", "--out", str(out)]) == 0
        assert open_run(out).config["env"] == "specialisation"


def test_checkpoint_that_cannot_be_written_leaves_those_before(tmp_path, monkeypatch):
    def refuse(run, checkpoint):
        if checkpoint.update > 3:
            raise OSError(5, "Input/output error")
        write_checkpoint(run, checkpoint)

    monkeypatch.setattr("trainers.checkpoints.write_checkpoint", refuse)
    with pytest.raises(TrainingFailed, match=r"checkpoints can't be written: Input/output error\."):
        train_run(CONFIG, tmp_path / "r")
    assert open_run(tmp_path / "r").state == "failed"
    checkpoint, problems = newest_checkpoint(tmp_path / "r")
    assert checkpoint is not None
    assert checkpoint.update <= 3
    assert not problems
    monkeypatch.undo()
    train_run(CONFIG, tmp_path / "r", resume=True)
    assert open_run(tmp_path / "r").state == "done"
