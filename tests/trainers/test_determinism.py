"""The same seed twice: the same bytes, whichever number of threads computes."""

import pytest
import torch
from resuming import same_end

from trainers.config import TrainConfig
from trainers.train import train_run

SETTINGS = {
    "env": "vmas/navigation",
    "agents": 2,
    "copies": 64,
    "steps": 32,
    "frames": 64 * 32 * 2,
    "every": 1,
    "effects_every": 1,
    "ppo": {"epochs": 1, "minibatches": 1},
}
"""Batches so large that torch shares them out between threads."""


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", ["hypermarl", "fups-id", "nops"])
def test_the_same_seed_gives_the_same_bytes_twice(tmp_path, method, threads):
    config = TrainConfig.model_validate(SETTINGS | {"method": method, "threads": threads})
    for name in ("one", "two"):
        train_run(config, tmp_path / name)
    same_end(tmp_path / "one", tmp_path / "two")
    saved = [max((tmp_path / n / "checkpoints").glob("*.safetensors")) for n in ("one", "two")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_another_seed_gives_others(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        small = {"env": "specialisation", "copies": 8, "steps": 8, "frames": 64, "seed": seed}
        train_run(TrainConfig.model_validate(SETTINGS | small), tmp_path / name)
    with pytest.raises(AssertionError):
        same_end(tmp_path / "one", tmp_path / "two")
