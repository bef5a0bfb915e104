import subprocess
import sys

import pytest

WRONG = {
    "method": (["train", "--method", "hypermal"], "Did you mean 'hypermarl'?"),
    "environment": (["train", "--env", "specialization"], "Did you mean 'specialisation'?"),
    "agents": (["train", "--agents", "0"], "`agents` must be at least 1"),
    "argument": (["train", "--env-arg", "action=3"], "Did you mean 'actions'?"),
    "setting": (["train", "--set", "ppo.epoch=3"], "Unknown setting 'ppo.epoch'"),
    "run": (["conflict", "nowhere"], "nowhere does not exist"),
}


def gradlab(*arguments, cwd):
    command = [sys.executable, "-m", "gradlab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_status_2(tmp_path, case):
    arguments, message = WRONG[case]
    result = gradlab(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


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
