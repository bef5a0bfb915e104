import json
import struct
import time

import numpy as np
import pytest
import torch
from torch import nn

import gradlab
from gradlab.cli import run as command

pytest.importorskip("wandb")


def loss(policy, sample):
    return policy(sample["x"]).square().sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("WANDB_MODE", "offline")
        path = tmp_path_factory.mktemp("wandb") / "run"
        torch.manual_seed(0)
        with gradlab.Probe(
            nn.Linear(3, 2), loss, agents=2, every=1, out=path, sinks=["wandb"]
        ) as probe:
            for step in range(3):
                x = torch.randn(2, 32, 3)
                probe({"x": x}, copy=torch.arange(32) % 16, scalars={"episode_return": step + 0.5})
    return path


def messages(data):
    """The messages of a log in LevelDB's format: blocks of 32 KiB, messages cut where they end."""
    place, whole = 7, b""  # after the tool's own header
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # padding at a block's end
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in {1, 4}:  # whole, or the last part
            yield whole
            whole = b""


def stored(folder):
    """What an offline run's file holds, in the tool's own messages: history rows, config, exit."""
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 60
    while True:  # the tool's own process writes the end a little after `finish`
        rows, config, ended = _read(file)
        if ended is not None or time.monotonic() > until:
            return rows, config, ended
        time.sleep(0.1)


def _read(file):
    from wandb.proto import wandb_internal_pb2

    rows, config, ended = [], {}, None
    for data in messages(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
        if record.HasField("run"):
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            config["run_id"] = record.run.run_id
        if record.HasField("exit"):
            ended = record.exit.exit_code
    return rows, config, ended


def check(path, folder):
    rows, config, ended = stored(path)
    run = gradlab.open_run(folder)
    returns = {
        row["update"]: row["return/episode_return"]
        for row in rows
        if "return/episode_return" in row
    }
    assert returns == {0: 0.5, 1: 1.5, 2: 2.5}
    where = {"network": "actor", "space": "psi", "layer": "all"}
    cosine = run.quantity("cosine", where=where)[:, 0, 1]
    read = [row["cosine/actor/psi/0-1"] for row in rows if "cosine/actor/psi/0-1" in row]
    np.testing.assert_allclose(read, cosine, rtol=1e-12)
    pictures = [row for row in rows if "matrix/cosine/actor/psi" in row]
    assert [row["update"] for row in pictures] == [0, 2]
    assert [row["update"] for row in rows if "embedding/actor" in row] == [0, 2]
    assert config["run_id"] == run.info["id"]
    assert config["diagnostics"] == "full"
    assert ended == 0


def test_offline_file_holds_numbers_pictures_embeddings_and_settings(folder):
    check(folder, folder)


def test_a_finished_run_is_replayed_alike(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert command(["export", str(folder), "--to", "wandb", str(tmp_path)]) == 0
    check(tmp_path, folder)
