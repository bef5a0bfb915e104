import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from analyses.aggregate import across_seeds, difference_of, resample
from analyses.studies import STUDIES, Study, run_study
from analyses.studies.adaptability import report as report_adaptability
from analyses.studies.adaptability import row_of as row_of_adaptability
from analyses.studies.chart import Cloud, scatter
from analyses.studies.decoupling import DECOUPLING
from analyses.studies.embeddings import EMBEDDINGS, PAIRS, arrange, goals_of
from analyses.studies.mechanism import (
    ALIKE,
    APART,
    COSINES,
    LEAST,
    MOST,
    SURGERIES,
    set_to,
    trend,
)
from analyses.studies.mechanism import report as report_mechanism
from analyses.studies.mechanism import row_of as row_of_mechanism
from analyses.studies.published import as_published
from analyses.studies.relabelling import gaps
from analyses.studies.seeds import FEWEST, difference, estimate, over_training
from analyses.studies.size import trained_parameters
from analyses.studies.specialisation import LEARNED, METHODS, SPECIALISATION, levels
from analyses.studies.variance import VARIANCE
from analyses.studies.verdict import Estimate, judge
from gradlab.checks import Failed, UsageError
from gradlab.cli import run as main
from gradlab.quantity import Quantity
from gradlab.registry import Registry
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from gradlab.versions import versions
from trainers.agent_policy import load_policy
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.matrix_games import GAMES, NAMES, chance_return
from trainers.loop import Trainer
from trainers.presets import with_preset
from trainers.settings import make_config
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
    study = small(SPECIALISATION, env=["specialisation"], agents=[2, 0], seed=[0, 1])
    study = dataclasses.replace(
        study,
        budgets={
            "quick": study.budgets["quick"]
            | {"grid": study.budgets["quick"]["grid"] | {"method": ["fups"]}}
        },
    )

    def train_all_but_one(sweep):
        left = sweep.states.pop("2ag-seed1")
        train(sweep)
        sweep.states["2ag-seed1"] = left

    text = run_study(study, "quick", tmp_path, train=train_all_but_one).read_text()
    assert "**3 of 4 runs are missing:**" in text
    assert "- 2ag-seed1: waiting\n" in text
    assert "- 0ag-seed1: failed `agents` must be at least 1. Got agents=0." in text
    assert "- agents=2: 1 of 2 seeds (0)\n- agents=0: 0 of 2 seeds (none)\n" in text
    text = run_study(study, "quick", tmp_path, train=train).read_text()
    assert text.endswith("all of its own:\n\n- agents=0: 0 of 2 seeds (none)\n")
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


def test_list_names_questions_and_the_reports_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report = Path("runs", "studies", "variance-standard", "report", "variance.md")
    report.parent.mkdir(parents=True)
    report.write_text("# What came of it\n")
    assert main(["study", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(STUDIES) + 1
    (place,) = (n for n, line in enumerate(lines) if line.startswith("variance: Does HyperMARL"))
    assert lines[place].endswith("Budgets: quick, standard, full.")
    assert lines[place + 1] == f"  report: {report}"


@pytest.mark.parametrize("name", ["bias", "specialisation"])
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_folder_that_cant_be_made_is_one_line_and_status_2(
    tmp_path, monkeypatch, capsys, name, out
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr("analyses.studies.bias.draw", None)  # nothing is drawn for nothing
    assert main(["study", name, "--out", out]) == 2
    found = capsys.readouterr().err
    assert found == (
        f"gradlab: error: {out}/report can't be made: Not a directory. Choose another --out.\n"
    )


def test_report_names_its_own_versions_and_those_of_its_runs(tmp_path):
    seeds = {"method": ["fups"], "seed": [0, 1]}
    study = small(SPECIALISATION, env=["specialisation"], agents=[2], **seeds)

    def made_with():
        line = run_study(study, "quick", tmp_path, train=train).read_text().splitlines()[2]
        return line.removeprefix("Printed by `gradlab study specialisation --budget quick` ")

    own = ", ".join(f"{name} {version}" for name, version in sorted(versions().items()))
    assert made_with() == f"with {own}; its runs were made with {own}."
    first, second = (open_run(tmp_path / "runs" / f"seed{seed}").path for seed in (0, 1))
    said = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps(said | {"versions": {"torch": "1.0"}}))
    silent = {key: value for key, value in said.items() if key != "versions"} | {"seed": 1}
    silent["config"] = silent["config"] | {"seed": 1}
    (second / "run.json").write_text(json.dumps(silent))
    some = "1 of its 2 runs were made with torch 1.0, the others do not say."
    assert made_with() == f"with {own}; {some}"
    silent["config"] = silent["config"] | {"seed": 0}
    (first / "run.json").write_text(json.dumps(silent | {"seed": 0}))
    none = "its runs do not say with which versions they were made."
    assert made_with() == f"with {own}; {none}"


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


def test_published_rewards_stand_beside_those_of_the_same_runs():
    rows = [
        {"game": "specialisation-temporal", "agents": agents, "method": method, "seed": seed}
        | {"reward": reward + seed / 1000}
        for agents, method, reward in (
            (2, "nops", 0.9),
            (16, "hypermarl", 0.5),
            (4, "fups-id-nostate", 0.598),
            (4, "hypermarl-linear", 0.9),  # not published
            (3, "nops", 0.9),
            (4, "nops", 0.741),  # as 0.74 may be, if it is rounded
        )
        for seed in range(5)
    ]
    section = as_published(pd.DataFrame(rows), levels)
    shown = section.shown.set_index(["agents", "method"])
    assert len(shown) == 4
    assert shown.loc[(2, "nops"), ["where", "published", "chance", "all the same"]].tolist() == [
        "Table 1",
        "0.88",
        "0.750",
        "0.500",
    ]
    gaps = shown["here less published"]
    assert gaps[2, "nops"].startswith("+0.022 (")
    assert gaps[2, "nops"].endswith(", higher")
    assert gaps[4, "nops"].endswith(")")
    assert gaps[16, "hypermarl"].endswith(", lower")
    assert gaps[4, "fups-id-nostate"].endswith(")")  # its interval holds 0
    assert shown["published"][16, "hypermarl"] == "0.568 (0.555 to 0.583)"
    table = section.tables["specialisation-published"].set_index(["agents", "method"])
    assert table["less value"][2, "nops"] == pytest.approx(0.022)
    one_shot = pd.DataFrame(rows).assign(game="specialisation")
    assert as_published(one_shot, levels).shown is None


@pytest.mark.parametrize("agents", [2, 4, 8, 16])
def test_full_budget_of_the_games_is_the_paper_s_settings(agents):
    document = SPECIALISATION.budgets["full"]
    grid = document["grid"]
    assert grid["preset"] == list(NAMES)
    assert (grid["agents"], len(grid["seed"])) == ([2, 4, 8, 16], 30)
    one = document | {"grid": grid | {"agents": [agents], "seed": [0]}}
    for run in plan_runs(one):
        config = run.config
        own = config.method == "nops"
        assert config.network.hidden == (64 // agents if own else 64,)
        assert config.hypernetwork.embedding_size == 64 // agents
        preset = with_preset({"preset": config.env, "agents": agents, "method": config.method})
        assert config.frames == preset["frames"]
        assert config.ppo.gae_lambda == 1.0


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
    assert np.isnan(list(estimate([]).numbers().values())).all()
    gap = difference([value + 5 for value in values], values)
    assert gap.value == 5.0
    assert gap.low < 5.0 < gap.high
    assert np.isnan(difference(values, values[:2]).low)
    assert np.isnan(list(difference(values, []).numbers().values())).all()


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


def test_interval_among_several_numbers_is_a_wider_quantile_of_the_same_resamples():
    found = estimate(np.random.default_rng(0).normal(size=20).tolist())
    assert found.among(1) == (found.low, found.high)
    assert np.quantile(found.drawn, (0.025, 0.975)) == pytest.approx((found.low, found.high))
    assert found.among(10) == pytest.approx(np.quantile(found.drawn, (0.0025, 0.9975)))
    assert found.among(10)[0] < found.low
    moved = found.less(3.0)
    assert moved.among(10) == pytest.approx([end - 3 for end in found.among(10)])
    assert Estimate(0.0, -1.0, 1.0).among(10) == (-1.0, 1.0)  # there is nothing to widen it by


def test_one_of_several_equal_methods_seldom_speaks_against_a_claim():
    random, several, trials = np.random.default_rng(0), 6, 100
    groups = random.normal(size=(2, 10, trials * several))  # group, seed, number
    found = resample(list(groups), difference_of)
    gaps = [
        Estimate(*(float(array[n]) for array in found.interval), found.drawn[n])
        for n in range(trials * several)
    ]
    firsts = range(0, len(gaps), several)
    claims = [{str(n): gaps[first + n] for n in range(several)} for first in firsts]
    against = [judge("more", claim, above=0).outcome == "not supported" for claim in claims]
    alone = [any(gap.high < 0 for gap in claim.values()) for claim in claims]
    # at most 5 %, within three standard errors
    assert np.mean(against) <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5
    assert np.mean(alone) > 0.05 > np.mean(against)
    values = random.normal(size=10)
    opposite = claims[0] | {"opposite": difference(values.tolist(), (values + 5).tolist())}
    assert judge("more", opposite, above=0).outcome == "not supported"


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


def finished(folder, settings, *updates):
    """A run of 4 agents that recorded these quantities, without any training."""
    config = make_config(settings)
    with RunWriter(folder) as writer:
        writer.describe(
            method=config.scheme,
            methods=config.methods,
            environment=config.env,
            agents=4,
            seed=config.seed,
            config=config.model_dump(mode="json"),
            state="done",
        )
        for update, quantities in enumerate(updates):
            writer.write(update, quantities)
    return open_run(folder)


def scalar(value):
    return Quantity.scalar(value, "1", "")


def of_actor(own, others, **axes):
    """A matrix of agents, of the actor and of further axes of one label each."""
    matrix = np.full((4, 4), float(others))
    np.fill_diagonal(matrix, own)
    agents = {"agent": [0, 1, 2, 3], "agent_other": [0, 1, 2, 3]}
    coords = {"network": ["actor"], **axes, **agents}
    dims = tuple(coords)
    values = matrix.reshape([1] * (len(dims) - 2) + [4, 4])
    return Quantity(values=values, dims=dims, coords=coords)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (
            {
                "method": "hypermarl-linear",
                "hypernetwork": {"embedding": "equiangular", "cosine": 0.75},
            },
            set_to(0.75),
        ),
        ({"method": "fups-id"}, "fups-id"),
        ({"method": "fups-id", "aggregate": "upgrad"}, "fups-id+upgrad"),
    ],
)
def test_mechanism_study_reads_what_steps_do_to_others(tmp_path, settings, name):
    whole, psi = {"layer": ["all"]}, {"space": ["psi"]}

    def update(reward, passed, own):
        return {
            "reward_per_step": scalar(reward),
            "coupling": of_actor(1, 0.75, **whole),
            "transference": of_actor(own, passed),
            "cosine_debiased": Quantity(
                values=np.concatenate(
                    [
                        of_actor(1, 0.2, **psi, **whole).values,
                        of_actor(1, np.nan, **psi, **whole).values,
                    ],
                    axis=1,
                ),
                dims=("network", "space", "layer", "agent", "agent_other"),
                coords=of_actor(1, 0, **whole).coords | {"space": ["psi", "theta"]},
            ),
            "conflict_rate": Quantity(
                values=np.full((1, 2, 1), 0.5),
                dims=("network", "space", "layer"),
                coords={"network": ["actor"], "space": ["psi", "theta"], **whole},
            ),
        }

    settings = settings | {"critic_method": "nops", "env": APART, "seed": 3}
    run = finished(tmp_path / "r", settings, update(0.2, 0.6, -3.0), update(0.6, 0.0, -1.0))
    row = row_of_mechanism(run)
    assert (row["game"], row["sharing"], row["seed"]) == (APART, name, 3)
    assert row["reward"] == pytest.approx(0.6)
    assert row["reward over training"] == pytest.approx(0.4)
    assert row["measured coupling"] == pytest.approx(0.75)
    assert row["change of own loss"] == pytest.approx(-2.0)
    assert row["change of others' losses"] == pytest.approx(0.3)
    assert row["cosine of g"] == pytest.approx(0.2)
    assert np.isnan(row["cosine of Z"])
    assert row["conflict rate of g"] == 0.5


def test_mechanism_study_follows_coupling_and_surgery():
    rows = []

    def add(game, sharing, seed, reward, others=0.0):
        known = {"reward": reward, "reward over training": reward - 0.1}
        known |= {"change of own loss": -0.1, "change of others' losses": others}
        unread = dict.fromkeys(
            ("measured coupling", "cosine of Z", "cosine of g", "conflict rate of g"), 0.0
        )
        rows.append({"game": game, "sharing": sharing, "seed": seed} | known | unread)

    for seed in range(5):
        noise = 0.01 * seed
        for cosine in COSINES:
            # at 1 agents of the first game can't differ, which is not about their gradients
            apart = 0.9 - 0.5 * cosine if cosine <= MOST else 2.0
            # 0 at coupling 0 is no finding: it would be the greatest harm, and the greatest good
            harm, good = (0.4 * cosine - 1, 1 - 0.7 * cosine) if cosine else (0.0, 0.0)
            add(APART, set_to(cosine), seed, apart - noise, harm)
            add(ALIKE, set_to(cosine), seed, 0.4 + 0.5 * cosine, good)
        for name, reward in (("fups-id", 0.7), ("fups-id+pcgrad", 0.9), ("fups-id+upgrad", 0.6)):
            add(APART, name, seed, reward + noise)
    found = pd.DataFrame(rows)
    findings = report_mechanism(found)
    outcomes = {verdict.claim: verdict.outcome for verdict in findings.verdicts}
    supported = [claim for claim, outcome in outcomes.items() if outcome == "supported"]
    assert len(supported) == 7
    lost = f"{APART}: conflict taken away by upgrad, fups-id earns more"
    assert outcomes[lost] == "not supported"
    assert set(outcomes) - {*supported, lost} == {  # nothing was trained with them there
        f"{ALIKE}: conflict taken away by {name}, fups-id earns more" for name in SURGERIES
    }
    exact = trend(found, "reward", APART, most=MOST)
    assert (exact.value, exact.low, exact.high) == pytest.approx((-1, -1, -1))
    assert trend(found, "reward", APART).value > -0.9
    changes = "change of others' losses"
    assert trend(found, changes, APART, least=LEAST, most=MOST).value == pytest.approx(1)
    assert trend(found, changes, ALIKE, least=LEAST).value == pytest.approx(-1)
    assert trend(found, changes, ALIKE).value > -0.5
    ElementTree.fromstring(findings.figures["mechanism"])


def test_goals_are_those_of_the_scenario():
    for env_args in EMBEDDINGS.budgets["quick"]["grid"]["env_args"]:
        config = make_config(with_preset({"preset": "navigation-4ag-half", "env_args": env_args}))
        env = make_env(config.env, copies=3, agents=4, args=config.env_args)
        env.reset()
        places = torch.stack([agent.goal.state.pos for agent in env._env.agents])
        goals = goals_of(config.env_args)
        for i, k in product(range(4), repeat=2):
            assert torch.equal(places[i], places[k]) == (goals[i] == goals[k])


def test_embeddings_study_reads_where_agents_ended(tmp_path):
    pairs = {"agents_with_same_goal": 2, "split_goals": True}
    study = small(EMBEDDINGS, env_args=[pairs], seed=[0])
    study.budgets["quick"]["settings"].update(every=2, effects_every=2)
    report = run_study(study, "quick", tmp_path, train=train)
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    run = open_run(folder)
    found = arrange(run)
    assert found.goals == PAIRS
    rows = run.embeddings["actor"].to_numpy()[-1]
    policies = [
        torch.cat([p.flatten() for p in load_policy(run, agent=agent).parameters()])
        for agent in range(4)
    ]
    for i, k in product(range(4), repeat=2):
        apart = found.distances["embeddings"][i, k]
        assert apart == pytest.approx(np.linalg.norm(rows[i] - rows[k]))
        apart = found.distances["weights"][i, k]
        assert apart == pytest.approx((policies[i] - policies[k]).norm().item(), rel=1e-4)
    table = pd.read_csv(report.parent / "embeddings-runs.csv")
    gap = gaps(found.distances["embeddings"], PAIRS)[0]
    assert table["gap in embeddings"][0] == pytest.approx(gap)
    text = report.read_text()
    assert "all 3 arrangements within 1 seeds" in text
    for name in ("distance", "pca", "tsne"):
        ElementTree.parse(report.parent / f"embeddings-{name}.svg")


def test_scatter_plots_show_every_point_on_one_scale():
    cloud = Cloud(
        title="a < b",
        across="x",
        up="y",
        points=[(0.0, 0.0), (3.0, 0.0), (0.0, 1.0), (np.nan, 0.0)],
        marks=["p", "q", "r", "s"],
        groups=["one", "two", "two", "one"],
    )
    root = ElementTree.fromstring(scatter([cloud, cloud]))
    texts = {}
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        if "x" in text.attrib:
            texts.setdefault(text.text, (float(text.get("x")), float(text.get("y"))))
    assert "s" not in texts
    across = texts["q"][0] - texts["p"][0]
    up = texts["p"][1] - texts["r"][1]
    assert across == pytest.approx(3 * up, abs=0.2)
    assert across > 100


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"method": "dico"}, "dico"), ({"algorithm": "happo", "method": "nops"}, "happo")],
)
def test_adaptability_study_reads_the_end_of_a_run(tmp_path, settings, name):
    settings = with_preset({"preset": "navigation-4ag-half", "seed": 2, **settings})
    updates = [{"reward_per_step": scalar(x), "snd": scalar(3 * x)} for x in (0.1, 0.2)]
    row = row_of_adaptability(finished(tmp_path / "r", settings, *updates))
    assert row == pytest.approx({
        "environment": "navigation-4ag-half",
        "method": name,
        "seed": 2,
        "reward": 0.2,
        "SND": 0.6,
    })


def test_adaptability_study_compares_with_the_best_and_across_goals():
    same, different = "navigation-4ag-same", "navigation-4ag-different"
    known = {  # reward and SND with one goal, and with a goal each
        "fups-id": ((1.0, 0.1), (0.5, 0.1)),
        "nops": ((0.8, 0.7), (1.0, 0.6)),
        "hypermarl": ((0.95, 0.1), (0.99, 0.5)),
    }
    rows = [
        {
            "environment": preset,
            "method": method,
            "seed": seed,
            "reward": reward + 0.001 * seed,
            "SND": snd,
        }
        for method, numbers in known.items()
        for preset, (reward, snd) in zip((same, different), numbers, strict=True)
        for seed in range(5)
    ]
    findings = report_adaptability(pd.DataFrame(rows))
    outcomes = {verdict.claim: verdict.outcome for verdict in findings.verdicts}
    earns = "earns at least 90% of what the best method does"
    acts = "agents act more differently"

    def told(*parts):
        (outcome,) = (o for claim, o in outcomes.items() if all(part in claim for part in parts))
        return outcome

    assert told("hypermarl earns more than fups-id") == "supported"
    assert told("hypermarl earns more than nops") == "supported"
    assert told("hypermarl-linear earns more than nops") == "undecided"  # no runs
    assert told("hypermarl ", earns) == "supported"
    assert told("fups-id", earns) == told("nops", earns) == "not supported"
    assert told("hypermarl's", acts) == "supported"
    assert told("nops's", acts) == "not supported"
    assert told("fups-id's", acts) == "undecided"
    ElementTree.fromstring(findings.figures["adaptability"])


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
