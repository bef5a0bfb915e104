import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from analyses.aggregate import across_seeds
from analyses.studies import STUDIES, Study, run_study
from analyses.studies.decoupling import DECOUPLING
from analyses.studies.seeds import FEWEST, difference, estimate, over_training
from analyses.studies.specialisation import LEARNED, METHODS, SPECIALISATION, levels
from analyses.studies.variance import VARIANCE, trained_parameters
from analyses.studies.verdict import Estimate, judge
from gradlab.checks import Failed, UsageError
from gradlab.cli import run as main
from gradlab.registry import Registry
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs.matrix_games import GAMES, NAMES, chance_return
from trainers.loop import Trainer
from trainers.sweeps import Engine, plan_runs, run_sweep
from trainers.sweeps.task import train_task
from trainers.train import train_run, train_settings

TINY = {
    "frames": 256,
    "copies": 8,
    "steps": 8,
    "every": 2,
    "effects_every": 100,
    "network": {"hidden": [8]},
    "hypernetwork": {"hidden": [4]},
    "ppo": {"epochs": 1, "minibatches": 1},
}


class InThisProcess(Engine):
    """An engine that needs no process of its own."""

    slots = 1

    def start(self, task):
        self.task = task

    def ended(self, seconds):  # noqa: ARG002
        yield self.task.name, train_task(self.task)

    def stop(self):
        pass

    def close(self):
        pass


def train(sweep):
    run_sweep(sweep, InThisProcess())


def small(study, **where):
    """A study's quick budget with tiny runs, of some settings' values only."""
    document = dict(study.budgets["quick"])
    document["settings"] = document["settings"] | TINY
    if "grid" in document:
        document["grid"] = document["grid"] | where
    else:
        document["runs"] = [
            run for run in document["runs"] if all(run[k] in v for k, v in where.items())
        ]
    return dataclasses.replace(study, budgets={"quick": document})


def test_study_trains_what_is_missing_and_reports(tmp_path):
    methods = ["fups", "fups-id", "nops"]
    one = {"env": ["specialisation"], "agents": [2], "seed": [0]}
    study = small(SPECIALISATION, method=methods, **one)
    report = run_study(study, "quick", tmp_path, train=train)
    text = report.read_text()
    assert report == tmp_path / "report" / "specialisation.md"
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert runs == sorted(methods)
    (row,) = (line for line in text.splitlines() if line.startswith("| specialisation | 2 | rew"))
    cells = row.strip("| ").split(" | ")
    assert cells[3:5] == [f"{chance_return(2, 2):.3f}", "0.500"]
    # four updates: the last tenth is the last one; a single seed has no interval
    last = open_run(tmp_path / "runs" / "nops").quantity("reward_per_step").to_numpy()[-1]
    assert cells[5 + methods.index("nops")] == f"{last:.3f}"
    assert "**undecided**: specialisation: fups, which can't tell agents apart" in text
    assert "## Design and cost" in text
    assert f"{len(methods)} runs, seeds 0; {256 * len(methods):,} frames" in text
    (design,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert [run.name for run in plan_runs(yaml.safe_load(design))] == methods
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (report.parent / name).exists()
    for name in ("specialisation-reward.svg", "specialisation-conflict.svg"):
        ElementTree.parse(report.parent / name)
    table = pd.read_csv(report.parent / "specialisation-runs.csv")
    assert table.set_index("method")["reward"]["nops"] == pytest.approx(last)
    # again: nothing is trained a second time, and the report is the same but for times
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("run.json")}
    assert len(before) == len(methods)
    assert run_study(study, "quick", tmp_path, train=train).read_text() == text
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_report_is_of_the_runs_that_are_done_and_says_what_is_missing(tmp_path):
    study = small(SPECIALISATION, env=["specialisation"], agents=[2, 0], seed=[0])
    study = dataclasses.replace(
        study,
        budgets={
            "quick": study.budgets["quick"]
            | {"grid": study.budgets["quick"]["grid"] | {"method": ["fups"]}}
        },
    )
    text = run_study(study, "quick", tmp_path, train=train).read_text()
    assert "**1 of 2 runs are missing**, so that seeds are not equal between methods" in text
    assert "- 0ag: failed `agents` must be at least 1. Got agents=0." in text
    nothing = dataclasses.replace(
        study,
        budgets={"quick": {"settings": TINY, "grid": {"agents": [0]}}},
    )
    with pytest.raises(Failed, match="no run of the study is done"):
        run_study(nothing, "quick", tmp_path / "nothing", train=train)


def test_command_prints_the_report_and_ends_with_1_if_a_run_failed(tmp_path, monkeypatch, capsys):
    one = {"env": ["specialisation"], "method": ["fups"], "seed": [0]}
    studies = {
        name: small(SPECIALISATION, agents=agents, **one)
        for name, agents in (("good", [2]), ("half", [2, 0]))
    }
    monkeypatch.setattr("analyses.studies.STUDIES", Registry("study", studies))
    monkeypatch.setattr("trainers.sweeps.make_engine", lambda *_, **__: InThisProcess())
    for name, status in (("good", 0), ("half", 1)):
        out = tmp_path / name
        assert main(["study", name, "--out", str(out)]) == status
        found = capsys.readouterr()
        assert f"Report: {out / 'report' / 'specialisation.md'}" in found.out
        assert "which can't tell agents apart" in " ".join(found.out.split())
        assert ("1 of 2 runs failed, the other 1 are done" in found.err) == bool(status)


def test_runs_with_other_settings_are_refused_before_any_training(tmp_path):
    study = small(SPECIALISATION, env=["specialisation"], agents=[2], seed=[0])
    settings = plan_runs(study.budgets["quick"])[METHODS.index("nops")].config
    folder = tmp_path / "runs" / "nops"
    other = settings.model_dump(mode="json")
    other["ppo"]["learning_rate"] = 1e-9
    train_settings(other, folder)
    before = (folder / "run.json").read_bytes()
    for state in ("done", "stopped"):
        file = folder / "run.json"
        file.write_text(json.dumps(json.loads(before) | {"state": state}))
        with pytest.raises(
            UsageError, match=r"was trained with ppo\.learning_rate=1e-09, not 0\.0005"
        ):
            run_study(study, "quick", tmp_path, train=train)
        assert open_run(folder).config["ppo"]["learning_rate"] == 1e-9
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]


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
    with pytest.raises(UsageError, match="be one of quick, standard, full"):
        run_study(SPECIALISATION, "huge", tmp_path, train=train)
    assert main(["study", "specialization"]) == 2
    assert "Did you mean 'specialisation'?" in capsys.readouterr().err
    assert main(["study", "list"]) == 0
    assert "specialisation: Which sharing schemes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "budget", ["quick", *(pytest.param(b, marks=pytest.mark.slow) for b in ("standard", "full"))]
)
@pytest.mark.parametrize("name", [n for n, s in STUDIES.items() if isinstance(s, Study)])
def test_every_budget_is_a_sweep_of_equal_seeds(name, budget):
    study = STUDIES[name]
    assert list(study.budgets) == ["quick", "standard", "full"]
    seeds = {}
    for run in plan_runs(study.budgets[budget]):
        key = run.config.model_copy(update={"seed": 0}).model_dump_json()
        seeds.setdefault(key, []).append(run.config.seed)
    assert len({tuple(found) for found in seeds.values()}) == 1
    assert all(len(found) >= FEWEST for found in seeds.values())


@pytest.mark.parametrize("game", NAMES)
@pytest.mark.parametrize("agents", [2, 4])
def test_levels_are_what_play_without_learning_earns(game, agents):
    reward = GAMES[game.removesuffix("-temporal")]
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(agents, (agents, 100_000), generator=random)
    chance, same = levels(game, agents)
    assert reward(drawn, agents).mean().item() == pytest.approx(chance, abs=0.005)
    assert reward(torch.zeros(agents, 1, dtype=torch.int64), agents).mean().item() == same
    if game.startswith("specialisation"):
        assert chance == pytest.approx(chance_return(agents, agents))


def test_estimates_take_enough_seeds_and_resample_seeds():
    values = [0.0, 1.0, 2.0, 3.0, 10.0]
    found = estimate(values)
    mean, low, high = across_seeds(np.array(values)[:, None])
    assert found == Estimate(float(mean[0]), float(low[0]), float(high[0]))
    assert found.value == 2.0  # without the lowest and the highest
    few = estimate(values[: FEWEST - 1])
    assert few.value == 1.5
    assert np.isnan([few.low, few.high]).all()
    assert np.isnan(estimate([])).all()
    gap = difference([value + 5 for value in values], values)
    assert gap.value == 5.0
    assert gap.low < 5.0 < gap.high
    assert np.isnan(difference(values, values[:2]).low)
    assert np.isnan(difference(values, [])).all()


@pytest.mark.parametrize(
    ("intervals", "outcome"),
    [
        ([(0.1, 0.3), (0.2, 0.4)], "supported"),
        ([(0.1, 0.3), (-0.1, 0.4)], "undecided"),
        ([(0.1, 0.3), (-0.2, -0.1)], "not supported"),
        ([(0.1, 0.3), (np.nan, np.nan)], "undecided"),
        ([(np.nan, np.nan), (-0.2, -0.1)], "not supported"),
        ([(0.0, 0.0)], "undecided"),
        ([], "undecided"),
    ],
)
def test_verdict_follows_from_intervals(intervals, outcome):
    numbers = {str(n): Estimate(np.mean(x), *x) for n, x in enumerate(intervals)}
    assert judge("more than nothing", numbers, above=0).outcome == outcome
    turned = {n: Estimate(-x.value, -x.high, -x.low) for n, x in numbers.items()}
    assert judge("less than nothing", turned, below=0).outcome == outcome


def test_variance_study_counts_the_parameters_that_the_measure_is_over(tmp_path):
    study = small(VARIANCE, preset=["dispersion"], method=["fups-id", "hypermarl"], seed=[0])
    report = run_study(study, "quick", tmp_path, train=train)
    rows = pd.read_csv(report.parent / "variance-runs.csv").set_index("method")
    for method in ("fups-id", "hypermarl"):
        run = open_run(tmp_path / "runs" / method)
        trainer = Trainer(TrainConfig.model_validate(run.config))
        size = sum(p.numel() for p in trainer.actor.parameters() if p.requires_grad)
        assert rows["trained parameters"][method] == trained_parameters(run) == size
        measured = run.quantity("coordinate_variance").sel(network="actor").mean().item()
        assert rows["coordinate variance"][method] == pytest.approx(measured)
        assert over_training(run, "coordinate_variance") == pytest.approx(measured)
        where = {"network": "actor", "space": "theta", "layer": "all"}
        signal, noise = (
            run.quantity(name).sel(where).mean().item()
            for name in ("squared_norm_debiased", "variance_mean")
        )
        assert rows["signal to noise of Z"][method] == pytest.approx(signal / noise)
    text = report.read_text()
    assert text.count("**undecided**") == 8  # a single seed decides nothing
    assert "](variance.svg)" in text


def test_decoupling_study_tells_generators_apart_by_their_gap(tmp_path):
    study = small(DECOUPLING, seed=[0])
    report = run_study(study, "quick", tmp_path, train=train)
    rows = pd.read_csv(report.parent / "decoupling-runs.csv").set_index("method")
    assert (
        rows["factorisation gap"]["hypermarl"]
        < 1e-3
        < rows["factorisation gap"]["hypermarl-coupled"]
    )
    assert rows["share of J's noise"]["hypermarl"] == 0
    assert rows["share of J's noise"]["hypermarl-coupled"] > 0


def test_reports_in_the_documentation_are_of_studies_that_there_are():
    for page in (Path(__file__).parents[2] / "docs" / "studies").glob("*.md"):
        study = STUDIES[page.stem]
        text = page.read_text()
        assert text.startswith(f"# {study.question}\n")
        (budget,) = re.findall(rf"gradlab study {page.stem} --budget (\w+)`", text)
        if isinstance(study, Study):
            (design,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
            names = [run.name for run in plan_runs(yaml.safe_load(design))]
            assert names == [run.name for run in plan_runs(study.budgets[budget])]


@pytest.mark.slow
def test_specialisation_claims_of_the_stateless_game_are_supported(tmp_path):
    methods = ["fups", "nops", "hypermarl-linear"]
    study = small(SPECIALISATION, env=["specialisation"], method=methods)
    usual = {"frames": 60_000, "diagnostics": "full", "every": 15}
    study = dataclasses.replace(
        study, budgets={"quick": study.budgets["quick"] | {"settings": usual}}
    )
    report = run_study(study, "quick", tmp_path, train=train)
    text = report.read_text()
    assert "**supported**: specialisation: fups, which can't tell agents apart" in text
    # not all others were trained
    assert f"**undecided**: specialisation: all other methods reach {LEARNED:.0%}" in text
    rewards = pd.read_csv(report.parent / "specialisation-runs.csv").groupby("method")["reward"]
    assert rewards.count().to_dict() == dict.fromkeys(methods, 5)
    assert rewards.min()[methods[1:]].min() > LEARNED
    for folder in (tmp_path / "runs").glob("*/"):
        assert float(open_run(folder).quantity("residual").max()) < 1e-4
