"""What claims to be huge takes no memory: whole processes whose memory is limited."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import hostile
import numpy as np
import pytest

from gradlab.quantity import Quantity
from gradlab.run_writer import RunWriter

ROOT = Path(__file__).parents[1]
MIB = 400
HUGE = 10**12


def in_process(commands, mib=MIB):
    """Statuses and lines on stderr of commands in a process that may take so much more memory."""
    child = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "limited.py"), str(mib)],
        input=json.dumps([list(map(str, words)) for words in commands]),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


def record(folder, labels=(0, 1), info=None):
    """A run with a diagnosis of two agents, or of as many as are labelled."""
    pair = {"network": ["actor"], "space": ["psi", "theta"], "layer": ["all"]}
    pair |= {"agent": [0, 1], "agent_other": [0, 1]}
    cosine = Quantity(values=np.ones((1, 2, 1, 2, 2)), dims=tuple(pair), coords=pair)
    rows = Quantity(
        values=np.ones((len(labels), 1)),
        dims=("agent", "feature"),
        coords={"agent": labels, "feature": [0]},
    )
    with RunWriter(folder) as writer:
        known = {"method": "fups", "environment": "e", "agents": 2, "state": "done"}
        writer.describe(**known | (info or {}))
        writer.write(0, {"cosine": cosine, "embedding_actor": rows, "own": Quantity.scalar(1)})
    return folder


def sparse(file, size, start=b""):
    """A file of a size that no disk has; what it takes up is what it starts with."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        opened.write(start)
        opened.truncate(size)


def claims(folder, sql, *values):
    with closing(sqlite3.connect(folder / "records.sqlite", isolation_level=None)) as database:
        database.execute(sql, values)


def labels_that_multiply(folder):
    axes = {f"a{n}": list(range(1000)) for n in range(10)}
    claims(
        record(folder),
        "UPDATE quantity SET dims = ?, coordinates = ? WHERE name = 'own'",
        *(json.dumps(list(axes)), json.dumps(axes)),
    )


def labels_without_end(folder):
    claims(
        record(folder),
        "UPDATE quantity SET coordinates = '{\"agent\": [' || replace(hex(zeroblob(50000000)), "
        "'0', '{},') || '0]}' WHERE name = 'embedding_actor'",
    )


def many_agents(folder):
    record(folder, labels=range(100_000), info={"agents": 10**9})


def sparse_description(folder):
    sparse(record(folder) / "run.json", HUGE, b"{")


def sparse_checkpoint(folder):
    record(folder)
    head = json.dumps({"a": {"dtype": "F64", "shape": [HUGE], "data_offsets": [0, 8 * HUGE]}})
    start = struct.pack("<Q", len(head)) + head.encode()
    sparse(folder / "checkpoints" / "000000000.safetensors", len(start) + 8 * HUGE, start)
    sparse(folder / "checkpoints" / "000000000.json", HUGE, b"{")


def sparse_evaluation(folder):
    sparse(record(folder) / "evaluations" / "0.json", HUGE, b"{")


FOLDERS = {
    f.__name__.replace("_", " "): f
    for f in (
        labels_that_multiply,
        labels_without_end,
        many_agents,
        sparse_description,
        sparse_checkpoint,
        sparse_evaluation,
    )
}


@pytest.mark.slow
def test_what_claims_to_be_huge_is_read_or_refused_in_bounded_memory(tmp_path):
    settings = tmp_path / "bomb.yaml"
    settings.write_text(hostile.BOMB)
    commands = [["train", "--config", settings, "--out", tmp_path / "new"], ["sweep", settings]]
    for name, make in FOLDERS.items():
        make(tmp_path / name)
        commands += [
            ["conflict", tmp_path / name],
            ["conflict", tmp_path / name, "--quantity", "cosine", "--format", "csv"],
            ["export", tmp_path / name, "--to", "csv", tmp_path / f"{name}.csv"],
            ["dashboard", tmp_path / name, "--html", tmp_path / f"{name}.html"],
            ["train", "--resume", "--out", tmp_path / name],
        ]
    commands.append(["runs", tmp_path])
    for words, (status, said) in zip(commands, in_process(commands), strict=True):
        assert status in {0, 2}, (words, said)
        assert len(said) >= (status == 2), (words, said)
        # What can't be read, and why nothing can be done: no traceback.
        assert all(line.startswith("gradlab: ") for line in said), (words, said)
        assert "Memory" not in "".join(said)


@pytest.mark.slow
def test_a_process_that_takes_more_is_noticed(tmp_path):
    record(tmp_path / "r")
    with pytest.raises(AssertionError):
        in_process([["dashboard", tmp_path / "r", "--html", tmp_path / "p.html"]] * 2, mib=1)
