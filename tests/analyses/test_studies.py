import dataclasses
import json

import pytest

from analyses.studies import STUDIES, run_study
from analyses.studies.specialisation import METHODS
from gradlab.checks import UsageError
from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs.matrix_games import chance_return
from trainers.train import train_run, train_settings


def small(study):
    runs = {
        name: {**settings, "frames": 512, "copies": 8, "steps": 8, "every": 4}
        for name, settings in study.budgets["quick"].items()
        if "-2ag-" in name
    }
    return dataclasses.replace(study, budgets={"quick": runs})


def test_study_trains_what_is_missing_and_reports(tmp_path):
    study = small(STUDIES["specialisation"])
    told = []
    text = run_study(study, "quick", tmp_path, progress=lambda *n: told.append(n))
    assert told[0] == (0, len(METHODS))
    assert told[-1] == (len(METHODS), len(METHODS))
    assert (tmp_path / "report.md").read_text() == text
    row = next(line for line in text.splitlines() if line.startswith("| 2 | return |"))
    assert f"| {chance_return(2, 2):.3f} |" in row
    assert "| 2 | mean cosine of g |" in text
    assert "not supported**: nops reaches 97%" in text
    # again: nothing is trained a second time; what was cut off is
    file = tmp_path / "nops-2ag-seed0" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "stopped"}))
    told.clear()
    assert run_study(study, "quick", tmp_path, progress=lambda *n: told.append(n)) == text
    assert told == [(len(METHODS) - 1, len(METHODS)), (len(METHODS), len(METHODS))]
    assert open_run(tmp_path / "nops-2ag-seed0").state == "done"


def test_runs_with_other_settings_are_refused_before_any_training(tmp_path):
    study = small(STUDIES["specialisation"])
    settings = study.budgets["quick"]["nops-2ag-seed0"]
    folder = tmp_path / "nops-2ag-seed0"
    train_settings({**settings, "ppo": {"learning_rate": 1e-9}}, folder)
    before = (folder / "run.json").read_bytes()
    for state in ("done", "stopped"):
        file = folder / "run.json"
        file.write_text(json.dumps(json.loads(before) | {"state": state}))
        with pytest.raises(
            UsageError, match=r"was trained with ppo\.learning_rate=1e-09, not 0\.0005"
        ):
            run_study(study, "quick", tmp_path)
        assert open_run(folder).config["ppo"]["learning_rate"] == 1e-9
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_settings_of_a_run_are_kept_on_resuming(tmp_path):
    settings = {"env": "specialisation", "frames": 512, "copies": 8, "steps": 8}
    train_run(TrainConfig.model_validate(settings), tmp_path / "r", stop=lambda: True)
    with pytest.raises(UsageError, match="was trained with seed=0, not 1"):
        train_settings({**settings, "seed": 1}, tmp_path / "r")
    assert open_run(tmp_path / "r").config["seed"] == 0
    (tmp_path / "r" / "run.json").unlink()
    with pytest.raises(UsageError, match="has lost its settings"):
        train_settings(settings, tmp_path / "r")


def test_unknown_budget_and_study_are_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match="be one of quick, standard"):
        run_study(STUDIES["specialisation"], "huge", tmp_path)
    assert main(["study", "specialization"]) == 2
    assert "Did you mean 'specialisation'?" in capsys.readouterr().err
    assert main(["study", "list"]) == 0
    assert "specialisation: Which sharing schemes" in capsys.readouterr().out


@pytest.mark.slow
def test_specialisation_verdicts_hold_over_five_seeds(tmp_path):
    text = run_study(STUDIES["specialisation"], "standard", tmp_path)
    assert text.count("**supported**") == len(METHODS)
    for folder in tmp_path.glob("*/"):
        run = open_run(folder)
        assert float(run.quantity("residual").max()) < 1e-4


@pytest.mark.slow
def test_study_of_the_games_tabulates_every_game_and_size(tmp_path):
    study = STUDIES["games"]
    assert len(study.budgets["standard"]) == 4 * 4 * 5 * 5
    runs = {
        name: {**settings, "frames": 256, "copies": 8, "steps": 8}
        for name, settings in study.budgets["quick"].items()
    }
    text = run_study(dataclasses.replace(study, budgets={"quick": runs}), "quick", tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| s")]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| specialisation", "2"],
        ["| synchronisation", "2"],
    ]
    assert "not supported**: specialisation: all others reach 97% of the optimum" in text
    run = open_run(tmp_path / "specialisation-2ag-fups-seed0")
    last = run.quantity("reward_per_step").to_numpy()[-1]
    assert f" | 0.750 | {last:.3f} | " in rows[0]  # chance, and the first method
