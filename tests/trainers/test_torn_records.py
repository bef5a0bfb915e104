"""A run whose records were cut off, or written while the clock went astray, goes on to the bit."""

import os
import shutil
import time

import pytest
from filelock import FileLock
from resuming import same_end

from gradlab.checks import UsageError
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.checkpoints import Saver, newest_checkpoint
from trainers.config import TrainConfig
from trainers.train import train_run

CONFIG = TrainConfig.model_validate({
    "env": "specialisation-temporal",
    "method": "fups-id",
    "agents": 2,
    "copies": 4,
    "steps": 4,
    "every": 2,
    "diagnostics": "light",
    "network": {"hidden": [8]},
    "ppo": {"epochs": 1},
    "frames": 16 * 12,
})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "r"
    train_run(CONFIG, folder)
    return folder


def cut_off(folder, updates, saved):
    """A copy of a run as it stands while it is trained, with checkpoints of chosen updates."""
    done = []

    def stop():
        done.append(len(done))
        if len(done) == updates:
            shutil.copytree(folder / "live", folder / "r")
        return len(done) == updates

    with pytest.MonkeyPatch.context() as patched:
        save = Saver.save

        def save_chosen(saver, run, state, *, at_once=False):
            if at_once or state().update in saved:
                save(saver, run, state, at_once=True)

        patched.setattr(Saver, "save", save_chosen)
        train_run(CONFIG, folder / "live", stop=stop)
    return folder / "r"


@pytest.mark.parametrize("share", [0.5, 0.75, 0.98])
def test_torn_log_is_read_up_to_the_tear_and_made_again(tmp_path, whole, share):
    out = cut_off(tmp_path, 9, saved={0})
    log = out / "records.sqlite-wal"
    os.truncate(log, int(share * log.stat().st_size))
    (out / "records.sqlite-shm").unlink()  # memory, which a power cut leaves nothing of
    run = open_run(out)
    assert run.state == "died"
    kept = run.updates("frames") if "frames" in run.quantities else []
    assert kept == list(range(len(kept)))
    assert len(kept) < 9
    told = []
    train_run(CONFIG, out, resume=True, tell=told.append)
    assert not told  # what the checkpoint relies on was synced before it
    same_end(whole, out)


def test_checkpoint_after_the_last_record_yields_to_the_one_before(tmp_path, whole):
    out = cut_off(tmp_path, 9, saved={3, 8})
    with RunWriter(out, resume=True) as writer:
        writer.discard_after(5)
    told = []
    train_run(CONFIG, out, resume=True, tell=told.append)
    assert told == ["records of updates 6 to 8 are lost and made again; going on after update 3"]
    same_end(whole, out)


def test_records_that_no_checkpoint_leads_to_are_said_to_be_lost(tmp_path, whole):
    out = cut_off(tmp_path, 9, saved={8})
    with RunWriter(out, resume=True) as writer:
        writer.discard_after(5)
    told = []
    train_run(CONFIG, out, resume=True, tell=told.append)
    assert told == ["records of updates 6 to 8 are lost; going on after update 8"]
    assert open_run(out).updates("frames") == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    (state, _), (expected, _) = newest_checkpoint(out), newest_checkpoint(whole)
    assert all(state.tensors[name].equal(t) for name, t in expected.tensors.items())


def test_clock_that_goes_back_changes_nothing(tmp_path, whole, monkeypatch):
    hours = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9) * next(hours))
    out, updates = tmp_path / "r", []
    train_run(CONFIG, out, progress=lambda *_: updates.append(1), stop=lambda: len(updates) > 5)
    future = time.time() + 1e8
    for file in (file for file in out.rglob("*") if file.is_file()):
        os.utime(file, (future, future))
    run = open_run(out)
    before = run.version()
    train_run(CONFIG, out, resume=True)
    assert run.version() != before  # who follows the run sees what was written since
    same_end(whole, out)


def test_run_that_came_while_the_lock_was_waited_for_is_not_written_into(tmp_path, monkeypatch):
    acquire = FileLock.acquire

    def late(lock, *arguments, **settings):
        """Another trainer has been and gone in the meantime."""
        monkeypatch.undo()
        with RunWriter(tmp_path / "r") as other:
            other.describe(state="done")
        return acquire(lock, *arguments, **settings)

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(UsageError, match="already holds a run; nothing was overwritten"):
        RunWriter(tmp_path / "r")
    with RunWriter(tmp_path / "r", resume=True):  # and the lock was let go of
        pass
