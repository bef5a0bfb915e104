"""A server that many look at while its run is trained."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reader import Crowd, Reader

from dashboards.live.app import _Desk
from dashboards.live.runs import RunIndex
from gradlab.run import open_run

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
GAME = "--env specialisation --agents 3 --copies 8 --steps 4 --every 1 --diagnostics full"


@pytest.fixture
def live(tmp_path):
    """A training, and the address of its server."""
    gradlab = [sys.executable, "-m", "gradlab"]
    folder = tmp_path / "r"
    frames = ["--frames", str(8 * 4 * 150), "--out", str(folder)]
    trainer = subprocess.Popen([*gradlab, "train", *GAME.split(), *frames], env=ENV)
    while trainer.poll() is None and not (folder / "run.json").exists():
        time.sleep(0.1)
    server = subprocess.Popen(
        [*gradlab, "dashboard", str(folder), "--serve", "--port", "0"],
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    yield trainer, folder, server.stdout.readline().split()[1]
    trainer.kill()
    trainer.wait()
    server.terminate()
    _, said = server.communicate()
    assert not said, said


def test_many_pages_ask_more_seldom(tmp_path, write_run, monkeypatch):
    write_run(tmp_path / "r", updates=2)
    desk = _Desk(RunIndex([tmp_path / "r"]))
    now = 100.0
    monkeypatch.setattr("dashboards.live.app.monotonic", lambda: now)
    pauses = [desk.say(0, "?runs=r", None)["pause"] for _ in range(500)]
    assert pauses[0] == 1000
    assert pauses[:50] == [1000 + 100 * n for n in range(50)]
    assert max(pauses) == pauses[-1] == 10_000
    now = 200.0
    assert desk.say(0, "?runs=r", None)["pause"] == 1000


@pytest.mark.slow
def test_fifty_readers_of_a_live_run_are_all_answered(live):
    trainer, folder, address = live
    with Crowd(address, 50) as crowd:
        assert trainer.wait() == 0
        time.sleep(12)
    last = open_run(folder).newest("frames")
    assert last == 149
    assert all(reader.pages > 3 for reader in crowd.readers)  # they did follow
    assert {reader.look() for reader in crowd.readers} == {last}
    newcomer = Reader(address)
    newcomer.open()
    assert newcomer.look() == last
    for reader in (*crowd.readers, newcomer):
        reader.close()
