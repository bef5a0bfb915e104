"""Processes that train together without torchrun, which is slow to start."""

import multiprocessing

from torch import distributed

from trainers.config import TrainConfig
from trainers.processes import Processes
from trainers.train import train_run


def train_together(settings, out, *, processes=2):
    """Train by several new processes.

    Args:
        settings: What `TrainConfig` takes.
        out: The run folder.
        processes: How many.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["joining", "torch._dynamo"])
    store = out.with_suffix(".store")
    members = [
        context.Process(target=train_as_one_of_them, args=(rank, processes, store, settings, out))
        for rank in range(processes)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert [member.exitcode for member in members] == [0] * processes


def train_as_one_of_them(rank, processes, store, settings, out):
    """What each process does."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
    )
    train_run(TrainConfig.model_validate(settings), out, group=Processes())
    distributed.destroy_process_group()
