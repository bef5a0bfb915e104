import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from analyses.listing import list_runs
from gradlab.cli import run as main
from gradlab.quantity import Quantity
from gradlab.run import open_run
from gradlab.run_writer import RunWriter

WRONG = {
    "method": (["train", "--method", "hypermal"], "Did you mean 'hypermarl'?"),
    "environment": (["train", "--env", "specialization"], "Did you mean 'specialisation'?"),
    "scenario": (["train", "--env", "vmas/navigatoin"], "Did you mean 'navigation'?"),
    "agents": (["train", "--agents", "0"], "`agents`"),
    "agents_not_a_number": (["train", "--agents", "many"], "Got agents='many'"),
    "argument": (["train", "--env-arg", "action=3"], "Did you mean 'actions'?"),
    "argument_form": (["train", "--env-arg", "actions"], "must read NAME=VALUE"),
    "option": (["train", "--ppo.epoch", "3"], "Did you mean '--ppo.epochs'?"),
    "too_many": (["runs", "a", "b"], "'b' is one argument too many"),
    "file": (["train", "--config", "none.yaml"], "none.yaml can't be read"),
    "diagnostics": (["train", "--diagnostics", "some"], "Got diagnostics='some'"),
    "actor_method": (["train", "--actor-method", "fups-ids"], "Did you mean 'fups-id'?"),
    "critic_method": (["train", "--critic-method", "nop"], "Did you mean 'nops'?"),
    "match": (["train", "--network.match", "fupps"], "Did you mean 'fups'?"),
    "match_nothing": (
        ["train", "--network.match", "fups", "--network.hidden"],
        "`network.hidden` must name a layer whose width can be chosen",
    ),
    "log_std": (["train", "--network.log-std", "each"], "Got network.log_std='each'"),
    "embedding": (
        ["train", "--hypernetwork.embedding", "onehot"],
        "Got hypernetwork.embedding='onehot'",
    ),
    "cosine": (["train", "--hypernetwork.cosine", "1.1"], "Got hypernetwork.cosine='1.1'"),
    "describe": (["train", "--describe", "--method", "nop"], "Did you mean 'nops'?"),
    "describe_run": (["train", "--describe", "--resume", "--out", "x"], "Leave out --resume"),
    "preset": (["train", "--preset", "dispersoin"], "Did you mean 'dispersion'?"),
    "algorithm": (["train", "--algorithm", "mapo"], "Got algorithm='mapo'"),
    "minibatches": (["train", "--ppo.minibatches", "4096"], "must be at most 2048: a rollout has"),
    "resume": (["train", "--resume"], "Add --out DIR"),
    "resume_nothing": (["train", "--resume", "--out", "x"], "x does not exist"),
    "run": (["conflict", "nowhere"], "nowhere does not exist"),
    "page": (["dashboard", "nowhere", "--html", "p.html"], "nowhere does not exist"),
    "folder": (["runs", "nowhere"], "nowhere is not a folder"),
    "no_runs": (["runs", "."], ". holds no run, at no depth"),
    "command": (["trian"], "invalid choice: 'trian'"),
}


def gradlab(*arguments, cwd):
    command = [sys.executable, "-m", "gradlab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def refused(capsys, arguments, message):
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert len(found.err.strip().splitlines()) == 1
    assert not found.out  # nor an empty progress bar


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *WRONG[case])
    assert not (tmp_path / "runs").exists()


def test_bad_input_from_the_shell_has_no_traceback(tmp_path):
    result = gradlab("train", "--method", "hypermal", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("gradlab: error: Unknown method 'hypermal'.")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow  # the commands themselves are run by the README's test
def test_train_conflict_and_dashboard_work_beside_a_folder_called_trainers(tmp_path):
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "__init__.py").write_text("raise RuntimeError('not this one')")
    small = ["--frames", "2048", "--agents", "3", "--out", "r"]
    result = gradlab("train", *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "conflict_rate_g" in result.stdout
    assert gradlab("conflict", "r", "--format", "csv", cwd=tmp_path).returncode == 0
    assert gradlab("dashboard", "r", "--html", "page.html", cwd=tmp_path).returncode == 0
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
    assert "hypermarl" in gradlab("runs", ".", cwd=tmp_path).stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    small = [
        "--frames",
        "2048",
        "--agents",
        "3",
        "--every",
        "1",
        "--effects-every",
        "1",
        "--steps",
        "16",
        "--out",
        "r",
    ]
    result = gradlab("train", *small, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "r"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conflict", "r", "--layer", "layer7"], "Did you mean 'layer1'?"),
        (["conflict", "r", "--network", "actr"], "Did you mean 'actor'?"),
        (["conflict", "r", "--quantity", "cosin"], "Did you mean 'cosine'?"),
        (["conflict", "r", "--quantity", "cosine", "--space", "phi"], "Did you mean 'psi'?"),
        (["dashboard", "r", "--html", "missing/folder/p.html"], "can't be written"),
        (["train", "--out", "r"], "add --resume"),
        (["train", "--out", "r", "--resume"], "has all 2,048 frames"),
        (
            ["train", "--out", "r", "--resume", "--frames", "1024"],
            "`frames` must be at least the 2,048 that r has done. Got frames=1024",
        ),
        (["train", "--out", "r", "--resume", "--method", "fups"], "method='hypermarl', not 'fups'"),
        (
            ["train", "--out", "r", "--resume", "--ppo.epochs", "5"],
            "trained with ppo.epochs=4, not 5. ",
        ),
        (["train", "--out", "r", "--resume", "--ppo.epochs", "4"], "has all 2,048 frames"),
    ],
)
def test_bad_input_about_a_run_is_one_line_and_loses_nothing(
    run, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(run.parent)
    before = contents(run)
    refused(capsys, arguments, message)
    assert contents(run) == before


def contents(folder):
    run = open_run(folder)
    records = {name: run.quantity(name).values.tobytes() for name in run.quantities}
    files = [path for path in folder.rglob("*") if path.is_file() and "sqlite" not in path.name]
    return records | {path.name: path.read_bytes() for path in files}


def test_resume_with_more_frames_trains_on(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    result = gradlab("train", "--resume", "--frames", "6144", "--out", "r", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    frames = open_run(tmp_path / "r").quantity("frames").values.tolist()
    assert frames == [1024 * updates for updates in range(1, 7)]


def test_settings_come_from_file_and_options_win(tmp_path):
    (tmp_path / "c.yaml").write_text("method: nops\nframes: 512\nppo: {epochs: 2}\n")
    options = ["--copies", "4", "--steps", "8", "--ppo.minibatches", "2", "--network.hidden", "8"]
    options += ["--frames", "64", "--diagnostics", "off"]
    result = gradlab("train", "--config", "c.yaml", *options, "--out", "r", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = open_run(tmp_path / "r").config
    assert config["method"] == "nops"
    assert (config["frames"], config["diagnostics"]) == (64, "off")
    assert config["ppo"]["epochs"] == config["ppo"]["minibatches"] == 2
    assert config["network"]["hidden"] == [8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methd: nops", "Did you mean 'method'?"),
        ("ppo: {epoch: 1}", "Did you mean 'ppo.epochs'?"),
        ("ppo: [", "is not YAML"),
        ("- 1", "must hold settings by name"),
    ],
)
def test_bad_settings_file_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    refused(capsys, ["train", "--config", str(tmp_path / "c.yaml")], message)


def test_conflict_prints_the_recorded_quantity(run):
    result = gradlab("conflict", "r", "--quantity", "cosine", "--format", "csv", cwd=run.parent)
    table = pd.read_csv(io.StringIO(result.stdout))
    recorded = open_run(run).quantity("cosine").isel(update=-1)
    recorded = recorded.sel(network="actor", layer="all", space="psi")
    assert list(table.columns) == ["run", "update", "agent", "agent_other", "cosine"]
    np.testing.assert_allclose(table["cosine"], recorded.values.ravel(), rtol=1e-9)


@pytest.mark.parametrize(
    ("quantity", "axes"),
    [
        ("transference", ["agent", "agent_other"]),
        ("snd", []),
        ("mantel", ["compared_with", "correlation"]),
    ],
)
def test_conflict_prints_what_interference_comes_to(run, capsys, quantity, axes):
    assert main(["conflict", str(run), "--quantity", quantity, "--format", "csv"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    recorded = open_run(run).quantity(quantity).isel(update=-1)
    recorded = recorded.sel(network="actor") if "network" in recorded.dims else recorded
    assert list(table.columns) == ["run", "update", *axes, quantity]
    np.testing.assert_allclose(table[quantity], recorded.values.ravel(), rtol=1e-9)


def test_damaged_run_shows_what_is_whole(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    file = tmp_path / "r" / "records.sqlite"
    file.write_bytes(file.read_bytes()[:-5000])
    (tmp_path / "r" / "records.sqlite-wal").unlink(missing_ok=True)
    (row,) = list_runs(tmp_path).itertuples()
    assert "records.sqlite is damaged" in row.state
    assert main(["runs", str(tmp_path)]) == 0
    assert "hypermarl" in capsys.readouterr().out


def test_help_loads_no_torch():
    code = (
        "import sys; from gradlab.__main__ import main; sys.argv = ['gradlab', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'vmas', 'plotly', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "words", [["runs"], ["conflict"], ["dashboard", "--html", "page.html"]], ids=lambda w: w[0]
)
def test_what_reads_runs_loads_no_torch(tmp_path, words):
    with RunWriter(tmp_path / "r") as writer:
        writer.describe(method="fups", environment="e", agents=2, seed=0, state="done", config={})
        axes = {"network": ["actor"], "space": ["psi", "theta"], "layer": ["all"]}
        axes |= {"agent": [0, 1], "agent_other": [0, 1]}
        ones = Quantity(values=np.ones((1, 2, 1, 2, 2)), dims=tuple(axes), coords=axes, unit="1")
        rows = Quantity(
            values=np.eye(2, dtype="f4"),
            dims=("agent", "feature"),
            coords={"agent": [0, 1], "feature": [0, 1]},
            unit="1",
        )
        writer.write(0, {"cosine": ones, "verdict": ones, "embedding_actor": rows})
    code = (
        "import sys; from gradlab.cli import run\n"
        "assert run(sys.argv[1:]) == 0\n"
        "import dashboards.live.serve\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, words[0], "r", *words[1:]]
    settings = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}}
    done = subprocess.run(command, check=False, capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr


def test_library_loads_none_of_the_other_packages():
    code = (
        "import sys, gradlab\n"
        "gradlab.decompose; gradlab.open_run; gradlab.variance; gradlab.Probe\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "others = {'trainers', 'analyses', 'dashboards', 'vmas', 'plotly', 'dash', 'torchrl'}\n"
        "assert not others & loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_are_not_hidden_by_modules_of_their_name_and_no_simulator_is_loaded():
    code = (
        "import sys, trainers.loop, trainers.envs, analyses.conflict, gradlab\n"
        "assert all(callable(getattr(gradlab, name)) for name in gradlab.__all__)\n"
        "assert 'smax/3m' in trainers.envs.environment_names()\n"
        "assert not {'jax', 'jaxmarl', 'vmas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
