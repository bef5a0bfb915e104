"""Environments of the user's own: that of the docs, and what goes wrong with others."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import example
from leaving_game import LeavingGame
from pettingzoo.test import parallel_api_test
from resuming import same_end

from gradlab.checks import UsageError
from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.envs import make_env

OPTIONS = ["--copies", "4", "--steps", "20", "--diagnostics", "off"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with no module of a test before in the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]
    importlib.invalidate_caches()


def test_example_of_the_page_is_short_and_passes_the_test_of_pettingzoo(folder):
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) < 45
    (folder / "posts.py").write_text(example())
    env = make_env("posts:Posts", copies=2, agents=5, args={"steps": 7})
    assert env.spec.agents == 5
    parallel_api_test(env._envs[0], num_cycles=50)


def test_own_environment_trains_resumes_and_is_evaluated_from_its_folder(folder, capsys):
    for own in ("mine", "analyses", "dashboards"):  # two that are called like gradlab's
        (folder / own).mkdir()
        (folder / own / "__init__.py").touch()
    (folder / "mine" / "posts.py").write_text(example())
    train = ["train", "--env", "mine.posts:Posts", *OPTIONS, "--env-arg", "length=6"]
    train += ["--diagnostics", "light"]
    # the console script's path does not hold the current directory
    code = "import sys; from gradlab.__main__ import main; sys.path.remove(''); main()"
    command = [sys.executable, "-c", code, *train, "--frames", "160", "--out", "parts"]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    assert main(["train", "--resume", "--frames", "320", "--out", "parts"]) == 0
    assert main([*train, "--frames", "320", "--out", "whole"]) == 0
    same_end(folder / "whole", folder / "parts")
    run = open_run(folder / "whole")
    assert run.info["environment"] == "mine.posts:Posts"
    assert run.info["agent_names"] == [f"walker_{i}" for i in range(4)]
    capsys.readouterr()
    assert main(["evaluate", "parts", "--episodes", "2", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 2


def test_function_with_copies_makes_a_vector_environment(folder):
    tests = str(Path(__file__).parent)
    (folder / "vector.py").write_text(
        f"import sys\nsys.path.append({tests!r})\n"
        "from leaving_game import LeavingGame\n"
        "def make_env(copies, seed, garbage=0.0):\n"
        "    return LeavingGame(copies, seed=seed, garbage=garbage)\n"
    )
    env = make_env("vector:make_env", copies=3, seed=7, args={"garbage": 2.5})
    assert type(env).__name__ == LeavingGame.__name__
    assert (env.copies, env.random.initial_seed(), env.garbage) == (3, 7, 2.5)
    env.reset()
    assert main(["train", "--env", "vector:make_env", *OPTIONS, "--frames", "80"]) == 0
    with pytest.raises(UsageError, match=r"`agents` must be 3 in vector:make_env\. Got agents=2"):
        make_env("vector:make_env", copies=3, agents=2)


BAD = {
    "nothing:make_env": ("", "there is no module nothing in {here} or among what is installed"),
    "pack.inner:make_env": ("", "there is no module pack in "),
    "bad:": ("", "must be named module:function, e.g. my_package.my_module:make_env"),
    "a b:make_env": ("", "must be named module:function"),
    "bad:make_env": ("def make_end(): pass", "Did you mean 'make_end'? Known: make_end."),
    "bad:number": ("number = 3", "Unknown function of bad 'number'"),
    "bad:broken": ("import no_such_thing", "importing bad raised ModuleNotFoundError: No module"),
    "bad:syntax": ("def (", "importing bad raised SyntaxError: "),
    "bad:raises": (
        "def raises():\n    raise KeyError('x')",
        "making it raised KeyError: 'x' (bad.py, line 2)",
    ),
    "bad:other": ("def other(): return 3", "Got a int, which has no possible_agents, observ"),
    "bad:vector": ("def vector(copies): return []", "must return a trainers.envs.vector_env.Vec"),
    "bad:exits": ("def exits(): pass\nexits.__signature__ = 3", "reading its signature raised Typ"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_goes_wrong_is_one_line_without_a_traceback(folder, capsys, name):
    source, message = BAD[name]
    (folder / "bad.py").write_text(source)
    assert main(["train", "--env", name, "--out", "r"]) == 2
    found = capsys.readouterr()
    assert not found.out
    assert len(found.err.splitlines()) == 1
    assert message.format(here=folder) in found.err
    assert not (folder / "r").exists()


def test_arguments_that_the_function_does_not_take_are_refused(folder):
    (folder / "posts.py").write_text(example())
    with pytest.raises(UsageError, match=r"Unknown argument of posts:Posts 'lenght'. Did you mean"):
        make_env("posts:Posts", copies=1, args={"lenght": 3})


def test_error_in_a_step_ends_the_training_with_its_place(folder, capsys):
    counts, breaks = "self.time += 1\n", "self.time += 1 + 0 // (7 - self.time)\n"
    assert counts in example()
    (folder / "posts.py").write_text(example().replace(counts, breaks))
    assert main(["train", "--env", "posts:Posts", *OPTIONS, "--frames", "320", "--out", "r"]) == 1
    told, line = capsys.readouterr().err.splitlines()
    assert "posts:Posts has no state to save; on resuming, the episodes under way" in told
    assert re.search(r"step of copy 0 raised ZeroDivisionError: .* \(posts.py, line \d+\)", line)
