"""Trainings that die at a chosen moment, and what must be the same in the end."""

import functools
import itertools
import os
import signal
import sys

import numpy as np
import torch

from gradlab.run import open_run
from trainers.checkpoints import Saver, newest_checkpoint
from trainers.train import train_settings

ANYWHERE = ("/gradlab/", "/trainers/", "/vmas/")
WRITING = ("/trainers/checkpoints.py", "/gradlab/run_writer.py")


def train_until_killed(settings, out, fatal, files, counted):
    """Train; die by SIGKILL right before the `fatal`-th call that is made in some files.

    Every other update is checkpointed.

    Args:
        settings: What `TrainConfig` takes.
        out: The run folder.
        fatal: The number of the call, from 1; 0 for none.
        files: Parts of the files' paths.
        counted: Where to write how many such calls there were, if it gets to the end.
    """
    calls = 0

    @functools.cache
    def counts(path):
        return any(part in path for part in files)

    def count(frame, event, _):
        nonlocal calls
        if event in {"call", "c_call"} and counts(frame.f_code.co_filename):
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    save, updates = Saver.save, itertools.count()

    def save_every_other(saver, run, state, *, at_once=False):
        """Whatever the time, so that how far a life gets does not depend on the machine."""
        if at_once or next(updates) % 2:
            save(saver, run, state, at_once=True)

    Saver.save = save_every_other
    sys.setprofile(count)
    train_settings(settings, out)
    sys.setprofile(None)
    counted.write_text(str(calls))


def same_records(one, other):
    assert one.quantities == other.quantities
    for name in one.quantities:
        if name != "seconds":
            a, b = one.quantity(name), other.quantity(name)
            assert a["update"].values.tolist() == b["update"].values.tolist()
            np.testing.assert_array_equal(a.values, b.values)


def same_end(one, other):
    """Bitwise the same state and records."""
    (state, _), (other_state, _) = newest_checkpoint(one), newest_checkpoint(other)
    assert state.update == other_state.update
    assert state.tensors.keys() == other_state.tensors.keys()
    assert all(torch.equal(t, other_state.tensors[name]) for name, t in state.tensors.items())
    assert state.values == other_state.values
    same_records(open_run(one), open_run(other))
