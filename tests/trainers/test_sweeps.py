"""Sweeps: what is planned, what is trained, and what becomes of a run that dies or fails."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from resuming import same_end

from gradlab.checks import UsageError
from gradlab.cli import run as main
from gradlab.run import open_run, open_runs
from trainers.checkpoints import FOLDER, newest_update
from trainers.envs import FAMILIES
from trainers.sweeps import (
    Engine,
    LocalEngine,
    State,
    find_sweep,
    local,
    make_engine,
    plan_runs,
    read_sweep,
    run_sweep,
)
from trainers.sweeps.run import DEATHS, INDEX
from trainers.sweeps.task import OUTPUT, Task, train_task
from trainers.train import train_settings

TINY = {
    "env": "specialisation",
    "agents": 2,
    "frames": 256,
    "copies": 8,
    "steps": 8,
    "diagnostics": "off",
    "network": {"hidden": [8]},
    "ppo": {"epochs": 1, "minibatches": 1},
}


def names(document):
    return [run.name for run in plan_runs(document)]


def test_grid_is_every_combination_named_by_what_differs():
    document = {
        "settings": {"agents": 3, "ppo": {"epochs": 2}},
        "grid": {
            "seed": [0, 7],
            "env_args.horizon": [5],
            "ppo.learning_rate": [1e-3, "5e-4"],
            "method": ["fups", "nops"],
        },
        "runs": [{"method": "fups-id", "agents": 4, "network": {"hidden": [8, 8]}}],
    }
    found = plan_runs(document)
    assert len(found) == 9
    assert found[0].name == "3ag-fups-env_args.horizon=5-ppo.learning_rate=0.001-seed0"
    assert found[3].name == "3ag-nops-env_args.horizon=5-ppo.learning_rate=5e-4-seed0"
    assert found[3].config.ppo.learning_rate == 5e-4
    assert found[3].config.ppo.epochs == 2
    assert found[3].config.env_args == {"horizon": 5}
    assert found[8].name == "4ag-fups-id-network.hidden=8x8"
    assert found[8].config.ppo.epochs == 2
    assert found[8].differing == {"agents": 4, "method": "fups-id", "network.hidden": [8, 8]}


def test_names_do_not_depend_on_the_order_of_writing():
    one = {"grid": {"method": ["nops"], "seed": [0, 1], "frames": [64, 128]}}
    other = {"grid": {"frames": [128, 64], "seed": [1, 0], "method": ["nops"]}}
    assert sorted(names(one)) == sorted(names(other))
    assert names({"runs": [{"method": "nops"}]}) == ["nops"]
    long = {"grid": {"env_args": [{"x": "a" * 300}, {"x": "b" * 300}]}}
    assert all(len(name) < 200 for name in names(long))
    alike = names({"grid": {"env_args": [{"x": "a/b"}, {"x": "a?b"}]}})
    assert len(set(alike)) == 2


def test_presets_lie_beneath_and_their_cases_hold_for_each_run():
    found = plan_runs({
        "settings": {"frames": 1000},
        "grid": {"preset": ["specialisation", "synchronisation"], "method": ["fups", "nops"]},
    })
    assert [run.config.env for run in found[::2]] == ["specialisation", "synchronisation"]
    assert [run.config.network.hidden for run in found[:2]] == [(64,), (16,)]
    assert {run.config.frames for run in found} == {1000}


BAD = {
    "setting": ("grid: {seed: [0]}\nsettings:\n  ppo: {epoch: 1}", "line 3, column 9: Unknown set"),
    "near": (
        "grid:\n  metod: [fups]",
        "line 2, column 3: Unknown setting 'metod'. Did you mean 'm",
    ),
    "value": ("grid:\n  seed: [0, one]", "line 2, column 3: `seed`: Input should be a valid integ"),
    "method": ("runs:\n- method: nops\n- method: nop", "line 3, column 3: Unknown method 'nop'"),
    "env": ("settings: {env: specialization}\ngrid: {seed: [0]}", "line 1, column 12: Unknown env"),
    "preset": ("grid:\n  preset: [dispersoin]", "line 2, column 3: Unknown preset"),
    "part": (
        "gird:\n  seed: [0]",
        "line 1, column 1: Unknown part of a sweep 'gird'. Did you mean",
    ),
    "section": ("settings:\n  ppo: 3\ngrid: {seed: [0]}", "line 2, column 3: `ppo`: Input should"),
    "scalar": ("grid:\n  seed: 0", "line 2, column 3: `seed` must be a list of at least one value"),
    "no_value": ("grid:\n  seed: []", "line 2, column 3: `seed` must be a list of at least one v"),
    "no_run": ("settings: {seed: 0}", "a sweep must have a `grid` with lists of values, or `runs`"),
    "nothing": ("", "must hold settings, grid, runs by name. Got NoneType"),
    "list": ("- 1", "must hold settings, grid, runs by name. Got list"),
    "same": ("grid: {seed: [0, 0]}", "line 1, column 1: this run is in the sweep twice: seed=0 (t"),
    "same_by_default": (
        "grid: {seed: [0, 1]}\nruns:\n- {seed: 2}\n- {method: hypermarl}",
        "line 4, column 3: this run is in the sweep twice: method=hypermarl (the grid and run 2 of",
    ),
    "key_twice": ("grid:\n  seed: [0]\n  seed: [1]", "line 3, column 3: 'seed' is given twice"),
    "dotted_twice": (
        "settings: {ppo.epochs: 1, ppo: {epochs: 2}}\ngrid: {seed: [0]}",
        "line 1, column 27: `ppo.epochs` is given twice",
    ),
    "scenario": (
        "grid:\n  env: [specialisation, vmas/navigatoin]",
        "line 2, column 3: Unknown environment 'vmas/navigatoin'. Did you mean 'vmas/navigation'?",
    ),
    "group": ("grid:\n  env: [bps/5]", "line 2, column 3: Unknown environment 'bps/5'."),
    "robot": ("grid:\n  env: [mamujoco/ants-4x2]", "line 2, column 3: Unknown MAMuJoCo robot"),
    "segments": (
        "grid:\n  env: [mamujoco/manyagent_ant-1x1]",
        "line 2, column 3: Unknown partition of manyagent_ant '1x1'",
    ),
    "number": (
        "grid:\n  seed: [0]\n  3: [0]",
        "line 3, column 3: a setting's name must be text. Got 3",
    ),
    "number_twice": ("grid:\n  3: [0]\n  0x3: [0]", "line 3, column 3: '0x3' is given twice"),
    "run": ("runs: [1]", "line 1, column 8: run 1 must hold settings by name. Got 1"),
    "yaml": ("grid: {seed: [0", "is not YAML: while parsing"),
    "itself": ("grid: &a {seed: [*a]}", "holds an anchor that stands for itself"),
    "many": (
        f"grid: {{seed: &a {list(range(1000))}, frames: *a, copies: *a}}",
        "line 1, column 1: `grid` must have at most 100,000 combinations. Got 1,000,000,000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    text, message = BAD[case]
    (tmp_path / "s.yaml").write_text(text)
    assert main(["sweep", "s.yaml"]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("gradlab: error: s.yaml")
    assert message in found.err
    assert found.err.count("\n") == 1
    assert not found.out
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "`jobs` must be at least 1"),
        (["--engine", "slurm"], "Unknown engine 'slurm'. Known: local, ray"),
        (["--address", "host:1"], "Add --engine ray"),
        (["--out", "s.yaml"], "s.yaml is a file; a sweep needs a folder"),
        (["--out", "s.yaml/r"], "s.yaml/r can't be made: Not a directory. Choose another --out."),
    ],
)
def test_bad_options_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text("grid: {seed: [0]}")
    assert main(["sweep", "s.yaml", *options]) == 2
    assert message in capsys.readouterr().err


def test_environments_that_no_list_tells_are_left_to_their_training():
    for env in ("pettingzoo/no.module", "my.module:make", "mamujoco/manyagent_swimmer-4x3"):
        assert plan_runs({"grid": {"env": [env]}})[0].config.env == env


def test_names_of_a_family_that_is_not_installed_are_let_through(monkeypatch):
    missing = FAMILIES["smax"]._replace(names=list)
    monkeypatch.setitem(FAMILIES, "smax", missing)
    assert plan_runs({"grid": {"env": ["smax/no_map"]}})


def test_run_killed_in_a_sweep_ends_to_the_same_bits_and_one_that_fails_holds_nothing_up(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("trainers.sweeps.run._LOOK", 0.01)  # to be there before it has ended
    long = TINY | {"frames": 64 * 200}
    document = {
        "settings": long,
        "grid": {"method": ["fups-id"], "seed": [0]},
        # a scenario argument that is not one is found when the run begins
        "runs": [{"env_args": {"colour": 3}}, {"method": "nops", "frames": 256}],
    }
    out = tmp_path / "sweep"
    sweep = find_sweep(plan_runs(document), out)
    first, fails, short = sweep.runs
    told, killed = [], []

    def watch(found):
        states = {name: state.kind for name, state in found.states.items()}
        if not told or told[-1] != states:
            told.append(states)
        if states[first] == "running" and not killed and newest_update(found.folders[first]) > 3:
            (process,) = (p for p in multiprocessing.active_children() if p.name == first)
            killed.append(newest_update(found.folders[first]))
            os.kill(process.pid, signal.SIGKILL)

    run_sweep(sweep, LocalEngine(slots=2), watch=watch)
    assert killed
    assert killed[0] < 199
    assert [state.kind for state in sweep.states.values()] == ["done", "failed", "done"]
    assert "Unknown argument" in sweep.states[fails].cause
    assert "\n" not in sweep.states[fails].cause
    assert {"waiting", "running", "done"} <= {states[first] for states in told}
    train_settings({**long, "method": "fups-id", "seed": 0}, tmp_path / "whole")
    same_end(tmp_path / "whole", out / first)
    index = json.loads((out / INDEX).read_text())
    assert [row["state"] for row in index["runs"]] == ["done", "failed", "done"]
    written = {"method": "fups-id", "seed": 0, "frames": long["frames"]}
    assert index["runs"][0]["settings"] == written
    assert sorted(run.name for run in open_runs(out)) == sorted([first, short])
    assert sorted(sweep.open()) == sorted([first, short])
    # again, by the command: what is done is kept, what failed fails again
    before = (out / first / "run.json").stat().st_mtime_ns
    (tmp_path / "s.yaml").write_text(json.dumps(document))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(out)]) == 1
    found = capsys.readouterr()
    assert "1 of 3 runs failed, the other 2 are done" in found.err
    assert f"failed: {fails}: Unknown argument" in found.err
    assert (out / first / "run.json").stat().st_mtime_ns == before
    # a grid that has grown: what was trained under another name is not trained again
    document["grid"]["seed"] = [0, 1]
    grown = find_sweep(plan_runs(document), out)
    assert [state.kind for state in grown.states.values()].count("kept") == 2
    document["settings"] = long | {"ppo": {"epochs": 2, "minibatches": 1}}
    with pytest.raises(UsageError, match=r"was trained with ppo\.epochs=1, not 2"):
        find_sweep(plan_runs(document | {"grid": {"method": ["fups-id"], "seed": [0]}}), out)


class Dying(Engine):
    """An engine whose trainings die, after so many updates each time."""

    slots = 1

    def __init__(self, updates):
        self.updates, self.lives, self.closed = list(updates), 0, False

    def start(self, task):
        self.task = task

    def ended(self, seconds):  # noqa: ARG002
        self.lives += 1
        if not self.updates:
            yield self.task.name, State(kind="done")
            return
        folder = self.task.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.updates.pop(0):09d}.json").touch()
        yield self.task.name, State(kind="died", cause="killed")

    def stop(self):
        raise AssertionError

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("updates", "kind", "lives"),
    [
        (range(20), "done", 21),  # as long as it comes further
        ([5] * 10, "failed", DEATHS),
        ([5, 5, 6, 6, 6], "failed", 2 + DEATHS),
    ],
    ids=["further", "stuck", "stuck_later"],
)
def test_run_that_dies_is_tried_again_while_it_comes_further(tmp_path, updates, kind, lives):
    sweep, engine = find_sweep(plan_runs({"runs": [TINY]}), tmp_path), Dying(updates)
    run_sweep(sweep, engine)
    (state,) = sweep.states.values()
    assert (state.kind, engine.lives, engine.closed) == (kind, lives, True)
    assert state.cause == ("" if kind == "done" else "killed, 3 times without coming further")


@pytest.mark.slow
def test_sweep_that_is_stopped_goes_on_where_it_was(tmp_path):
    document = {"settings": TINY | {"frames": 64 * 10_000}, "grid": {"seed": [0, 1]}}
    sweep = find_sweep(plan_runs(document), tmp_path)
    first, second = sweep.runs
    reached = []

    def stop():
        reached.append(newest_update(sweep.folders[first]))
        return reached[-1] >= 0

    run_sweep(sweep, LocalEngine(slots=1), stop=stop)
    assert [state.kind for state in sweep.states.values()] == ["stopped", "waiting"]
    assert open_run(tmp_path / first).state == "stopped"
    assert newest_update(tmp_path / first) < 9_999
    assert not (tmp_path / second).exists()
    again = find_sweep(plan_runs(document), tmp_path)
    assert [state.kind for state in again.states.values()] == ["waiting", "waiting"]


def test_unexpected_error_of_a_run_is_its_cause_and_stands_whole_beside_it(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ArithmeticError("no such\nluck")

    monkeypatch.setattr("trainers.sweeps.task.train_run", fail)
    state = train_task(Task(name="r", settings=TINY, folder=tmp_path / "r", threads=1))
    assert state.kind == "failed"
    assert state.cause == f"ArithmeticError: no such luck; see {tmp_path / 'r' / OUTPUT}"
    assert "Traceback" in (tmp_path / "r" / OUTPUT).read_text()


def test_nothing_is_written_through_a_link_in_a_runs_folder(tmp_path):
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    folder.mkdir()
    (folder / OUTPUT).symlink_to(theirs)
    task = Task(name="r", settings={}, folder=folder, threads=1)
    state = train_task(task)
    assert state.kind == "failed"
    assert "is a link to elsewhere" in state.cause
    receiver, sender = multiprocessing.Pipe(duplex=False)
    local._train(task, sender)
    assert receiver.recv() == state
    assert not theirs.exists()


def test_list_trains_nothing(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(json.dumps({"settings": TINY, "grid": {"seed": [0, 1]}}))
    out = tmp_path / "runs"
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(out), "--list"]) == 0
    assert "seed1" in capsys.readouterr().out
    assert not out.exists()


def test_positions_lead_to_what_is_meant(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("settings:\n  ppo:\n    epochs: 3\ngrid: {seed: [0]}\n")
    document, place = read_sweep(file)
    assert document == {"settings": {"ppo": {"epochs": 3}}, "grid": {"seed": [0]}}
    assert place(("settings", "ppo", "epochs")) == f"{file}, line 3, column 5: "
    assert place(("settings", "ppo", "clip")) == f"{file}, line 2, column 3: "


def test_example_of_the_page_is_the_grid_that_it_says():
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    found = names(yaml.safe_load(text))
    assert len(found) == 2 * 3 * 2 * 2 * 3 + 1
    assert "vmas-dispersion-2ag-fups-id-ppo.learning_rate=0.001-seed0" in found


def test_runs_of_folders_are_each_opened_once(tmp_path):
    for name in ("b/two", "a", "b/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text('{"schema": 1}')
    found = open_runs(tmp_path / "b", tmp_path)
    assert [run.name for run in found] == ["one", "two", "a"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is an empty folder"):
        open_runs(tmp_path / "empty")


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_command_that_is_ended_leaves_no_training_behind(tmp_path, number):
    (tmp_path / "trainers.py").write_text("raise AssertionError('not the package')")
    document = {"settings": TINY | {"frames": 64 * 1_000_000}, "grid": {"seed": [0, 1]}}
    (tmp_path / "s.yaml").write_text(json.dumps(document))
    command = subprocess.Popen(
        [sys.executable, "-m", "gradlab", "sweep", "s.yaml", "--jobs", "2"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    folders = [tmp_path / "runs" / "s" / f"seed{seed}" for seed in (0, 1)]
    wait_until(lambda: all(newest_update(folder) >= 0 for folder in folders))
    command.send_signal(number)
    _, said = command.communicate(timeout=60)
    assert command.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGINT:
        assert "stopped and saved; 0 of 2 runs are done" in said
    wait_until(lambda: all(open_run(folder).state == "stopped" for folder in folders))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster can be reached at 127.0.0.1:1: "),
        (":x", "`address` must be HOST:PORT. Got address=':x'"),
        ("127.0.0.1:99999999999999999999", "no Ray cluster can be reached at 127.0.0.1:9"),
    ],
)
def test_unreachable_cluster_is_one_line_and_nothing_is_trained(
    tmp_path, monkeypatch, capsys, address, message
):
    monkeypatch.chdir(tmp_path)
    # told before Ray is loaded, so that this also holds where it is not installed
    monkeypatch.setattr("trainers.sweeps.ray_engine.require", lambda *_, **__: None)
    (tmp_path / "s.yaml").write_text("grid: {seed: [0]}")
    assert main(["sweep", "s.yaml", "--engine", "ray", "--address", address]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


# Where another test has loaded JAX, Ray's starting of processes is warned about.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.slow
def test_ray_trains_the_same_and_tries_a_killed_task_again(tmp_path):
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("ray")
    settings = TINY | {"frames": 64 * 500}
    document = {"settings": settings, "grid": {"seed": [0, 1]}, "runs": [{"env_args": {"x": 3}}]}
    sweep = find_sweep(plan_runs(document), tmp_path / "sweep")
    first, second, fails = sweep.runs
    killed = []

    def watch(found):
        if not killed and newest_update(found.folders[first]) > 3:
            lock = str(found.folders[first].resolve())
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if any(f.path.startswith(lock) for f in process.open_files()):
                        killed.append(process.pid)
                        process.kill()

    run_sweep(sweep, make_engine("ray", jobs=2), watch=watch)
    assert killed
    assert [state.kind for state in sweep.states.values()] == ["done", "done", "failed"]
    assert "Unknown argument" in sweep.states[fails].cause
    for seed, name in enumerate([first, second]):
        train_settings(settings | {"seed": seed}, tmp_path / name)
        same_end(tmp_path / name, sweep.folders[name])
