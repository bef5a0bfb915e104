"""The command `gradlab evaluate`, its files and its films."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from analyses.listing import list_runs
from dashboards.page import write_page
from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.train import train_run

SMALL = {
    "agents": 3,
    "copies": 4,
    "steps": 4,
    "frames": 4 * 4 * 3,
    "diagnostics": "off",
    "method": "fups-id",
    "evaluation": {"every": 2, "episodes": 4, "seed": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    settings = SMALL | {"env": "vmas/navigation", "env_args": {"max_steps": 15}}
    train_run(TrainConfig.model_validate(settings), folder / "r")
    train_run(TrainConfig.model_validate(SMALL | {"env": "specialisation"}), folder / "game")
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A copy of the runs to work in."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(run):
    """All files but those that SQLite makes for reading."""
    files = (path for path in run.rglob("*") if path.is_file() and "sqlite-" not in path.name)
    return {path: path.read_bytes() for path in files}


def refused(capsys, *arguments, status=2):
    assert main(["evaluate", *arguments]) == status
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def test_table_gives_what_the_training_recorded(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["evaluate", "r"]) == 0
    text = capsys.readouterr().out
    run = open_run(here / "r")
    mean = float(run.quantity("evaluation_return")[-1])
    low, high = (float(run.quantity(f"evaluation_return_{end}")[-1]) for end in ("low", "high"))
    assert f"{mean:.4g} ± {(high - low) / 2:.2g}" in text
    for mean in run.quantity("evaluation_agent_return")[-1].values:
        assert f"{mean:.4g} ±" in text
    assert {"pos_rew", "final_rew", "agent_collisions"} <= set(text.replace("┃", " ").split())
    assert "After update 2 (3 of 3 are done, 48 frames; the run is done)" in text
    assert "Whole episodes: 4, deterministic, seed 5, 15 steps" in text


def test_json_is_the_document_that_is_kept_and_nothing_else_changes(here, capsys):
    before = contents(here / "r")
    options = ["--episodes", "3", "--deterministic", "false", "--seed", "1", "--format", "json"]
    assert main(["evaluate", "r", "--update", "2", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = here / "r" / "evaluations" / "000000002-sampled-3-seed1.json"
    assert printed == {"run": "r", **json.loads(kept.read_text())}
    assert np.shape(printed["returns"]) == (3, 3)
    after = contents(here / "r")
    assert after.pop(kept)
    assert after == before
    config = TrainConfig.model_validate(open_run(here / "r").config | {"frames": 4 * 4 * 5})
    assert train_run(config, here / "r", resume=True)


def test_run_that_can_not_be_written_to_is_printed_all_the_same(here, capsys):
    (here / "r" / "evaluations").write_text("in the way")
    assert main(["evaluate", "r", "--episodes", "1"]) == 1
    captured = capsys.readouterr()
    assert "r can't be written to" in captured.err
    assert "mean of all" in captured.out


def test_evaluations_are_listed_where_there_are_any(here):
    rows = list_runs(here).set_index("run")
    for name in ("r", "game"):
        last = float(open_run(here / name).quantity("evaluation_return")[-1])
        assert rows.loc[str(here / name), "evaluated"] == last
    write_page([open_run(here / "r")], here / "page.html")
    last = float(open_run(here / "r").quantity("evaluation_return")[-1])
    page = (here / "page.html").read_text()
    assert ">evaluation return</th>" in page
    assert f">{last:.4g}</td>" in page


@pytest.mark.usefixtures("here")
def test_animation_shows_the_agents_move(capsys):
    assert main(["evaluate", "r", "--episodes", "1", "--animate", "film.gif"]) == 0
    assert "Animation: film.gif, 15 frames" in capsys.readouterr().out
    with Image.open("film.gif") as film:
        assert film.n_frames > 10
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert frames[0].shape == (700, 700, 3)
    for one, other in itertools.pairwise(frames):
        assert (one != other).any()
    colours = {tuple(colour) for colour in frames[0].reshape(-1, 3)}
    blue, orange, green = (56, 125, 184), (255, 128, 0), (77, 176, 77)  # those of the goals
    for goal in (blue, orange, green):
        assert min(np.abs(np.subtract(goal, colour)).max() for colour in colours) < 8


@pytest.mark.skipif(
    importlib.util.find_spec("imageio_ffmpeg") is None, reason="the extra `video` is not installed"
)
@pytest.mark.usefixtures("here")
def test_mp4_has_the_frames():
    import imageio_ffmpeg

    assert main(["evaluate", "r", "--episodes", "1", "--animate", "film.mp4"]) == 0
    frames, _ = imageio_ffmpeg.count_frames_and_secs("film.mp4")
    assert frames == 15


@pytest.mark.slow
def test_without_opengl_the_table_is_printed_and_the_packages_are_named(here):
    code = (
        "import sys, pyglet\n"
        "def missing(*names, **options): raise ImportError('Library \"EGL\" not found.')\n"
        "pyglet.lib.load_library = missing\n"
        "from gradlab.cli import run\n"
        "sys.exit(run(['evaluate', 'r', '--animate', 'film.gif']))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "mean of all" in result.stdout
    assert "vmas/navigation can't be drawn here" in result.stderr
    assert "apt-get install libegl1 libgl1 libglu1-mesa libgl1-mesa-dri" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (here / "film.gif").exists()
    assert list((here / "r" / "evaluations").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "holds no run"),
        (["r", "--episodes", "0"], "`episodes` must be at least 1. Got episodes=0."),
        (["r", "--episodes", "few"], "invalid int value: 'few'"),
        (["r", "--seed", "-1"], "`seed` must be at least 0"),
        (["r", "--update", "7"], "keeps no checkpoint of update 7. Those it keeps: 0, 2."),
        (["r", "--update", "newest"], "argument --update: must be a number or last. Got 'newest'"),
        (["r", "--deterministic", "maybe"], "invalid choice: 'maybe'"),
        (["r", "--animate", "film.png"], "`animate` must end in .gif or .mp4"),
        (["r", "--animate", "no/film.gif"], "no is not a folder"),
        (["game", "--animate", "film.gif"], "specialisation has no rendering"),
        (["r", "--episode", "3"], "Did you mean '--episodes'?"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(here, capsys, arguments, message):
    assert message in refused(capsys, *arguments)
    assert not (here / "film.gif").exists()
    assert not list(here.glob("*/evaluations"))


@pytest.mark.skipif(
    importlib.util.find_spec("imageio_ffmpeg") is not None, reason="imageio-ffmpeg is installed"
)
@pytest.mark.usefixtures("here")
def test_mp4_without_its_writer_says_what_to_install(capsys):
    error = refused(capsys, "r", "--animate", "film.mp4")
    assert "pip install imageio-ffmpeg" in error


def test_damaged_checkpoints_are_passed_over_or_named(here, capsys):
    newest = here / "r" / "checkpoints" / "000000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    error = refused(capsys, "r", "--update", "2")
    assert "000000002 is damaged" in error
    assert main(["evaluate", "r"]) == 0
    captured = capsys.readouterr()
    assert "000000002 is damaged" in captured.err
    assert "After update 0 (1 of 3 are done" in captured.out
    shutil.rmtree(newest.parent)
    assert "gradlab train --resume --out r" in refused(capsys, "r")


def test_run_without_settings_or_with_unknown_ones_is_one_line(here, capsys):
    file = here / "r" / "run.json"
    info = json.loads(file.read_text())
    info["config"]["ppo"]["newer"] = 1
    file.write_text(json.dumps(info))
    assert "r/run.json: `ppo.newer`" in refused(capsys, "r")
    file.unlink()
    assert "has lost its settings (run.json)" in refused(capsys, "r")
