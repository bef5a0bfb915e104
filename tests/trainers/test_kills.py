"""A training that is killed, at whatever moment, ends as one that was not."""

import multiprocessing
import random
import signal

import pytest
from resuming import ANYWHERE, WRITING, same_end, train_until_killed

from gradlab.run import open_run
from gradlab.run_writer import is_run

CASES = {
    "game": {
        "method": "hypermarl",
        "env": "specialisation-temporal",
        "env_args": {"horizon": 7},
        "agents": 3,
        "frames": 4 * 8 * 20,
    },
    "navigation": {
        "method": "fups-id",
        "algorithm": "mappo",
        "env": "vmas/navigation",
        "env_args": {"max_steps": 12},
        "agents": 2,
        "normalise": {"observations": True, "rewards": True},
        "frames": 4 * 8 * 12,
    },
}
SMALL = {
    "copies": 4,
    "steps": 8,
    "every": 3,
    "effects_every": 6,
    "network": {"hidden": [8]},
    "hypernetwork": {"hidden": [8]},
    "ppo": {"epochs": 1, "minibatches": 2},
}


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported, and share nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resuming", "vmas", "torch._dynamo"])
    return context


def live(processes, settings, out, fatal, files):
    """One life of a training; the number of calls in it, None if it was killed."""
    counted = out.with_suffix(".calls")
    counted.unlink(missing_ok=True)
    process = processes.Process(
        target=train_until_killed, args=(settings, out, fatal, files, counted)
    )
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if fatal else 0)
    return None if fatal else int(counted.read_text())


def killed_again_and_again(processes, tmp_path, case, *, files, kills, seed, longer=1):
    settings = SMALL | CASES[case]
    settings["frames"] *= longer
    calls = live(processes, settings, tmp_path / "whole", 0, files)
    # not even all lives together come to the end before the last one
    moments = random.Random(seed)
    updates = []
    for _ in range(kills):
        fatal = moments.randint(1, calls // kills)
        live(processes, settings, tmp_path / "killed", fatal, files)
        if is_run(tmp_path / "killed"):
            run = open_run(tmp_path / "killed")
            assert run.state in {"died", "unknown"}  # unknown: not even run.json is there
            updates.append(len(run.quantity("frames")) if "frames" in run.quantities else 0)
    live(processes, settings, tmp_path / "killed", 0, files)
    same_end(tmp_path / "whole", tmp_path / "killed")
    return updates


@pytest.mark.parametrize(
    ("case", "files", "longer"),
    # longer, as what a life begins with makes so many calls anywhere
    [("game", WRITING, 1), pytest.param("navigation", ANYWHERE, 6, marks=pytest.mark.slow)],
    ids=["game-writing", "navigation-anywhere"],
)
def test_run_killed_several_times_ends_to_the_same_bits(processes, tmp_path, case, files, longer):
    settings = {"files": files, "kills": 10, "seed": 3, "longer": longer}
    updates = killed_again_and_again(processes, tmp_path, case, **settings)
    assert len(set(updates)) > 1, updates  # it was not always killed at the beginning


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("files", [ANYWHERE, WRITING], ids=["anywhere", "writing"])
@pytest.mark.parametrize("case", CASES)
def test_run_killed_many_times_ends_to_the_same_bits(processes, tmp_path, case, files, seed):
    killed_again_and_again(processes, tmp_path, case, files=files, kills=17, seed=seed, longer=4)
