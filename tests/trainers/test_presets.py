import re
from pathlib import Path

import pytest
import yaml
from selection import slow_but

from gradlab.checks import UsageError
from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs import FAMILIES, environment_names
from trainers.generators import METHODS
from trainers.presets import load_preset, preset_names, with_preset
from trainers.train import train_run

ROOT = Path(__file__).parents[2]
NAMES = preset_names()
GAMES = [name for name in NAMES if name.startswith(("specialisation", "synchronisation"))]
TINY = {
    "frames": 2 * 16,
    "copies": 2,
    "steps": 8,
    "diagnostics": "off",
    "ppo": {"epochs": 1, "minibatches": 2},  # of recurrent networks no more than copies
    "evaluation": {"episodes": 2},
}


def config(name, **given):
    return TrainConfig.model_validate(with_preset({"preset": name, **given}))


def test_there_is_a_preset_for_each_scenario_of_the_paper_and_each_game():
    assert len(set(NAMES) - set(GAMES)) == 22
    assert len(GAMES) == 4
    environments = {config(name).env for name in NAMES}
    assert {f"bps/{i}" for i in (1, 2, 3, 4)} < environments
    assert {env.partition("/")[0] for env in environments} - set(GAMES) == {
        "vmas",
        "mamujoco",
        "smax",
        "bps",
    }


@pytest.mark.parametrize("algorithm", ["ippo", "mappo", "matd3"])
@pytest.mark.parametrize("name", NAMES)
def test_preset_is_valid_for_every_method(name, algorithm):
    preset = load_preset(name)
    for method in METHODS:
        found = TrainConfig.model_validate(preset.under({"method": method, "algorithm": algorithm}))
        assert (found.method, found.algorithm) == (method, algorithm)
        assert found.methods["actor"] == method
        assert found.methods["critic"] in METHODS


@pytest.mark.parametrize("name", NAMES)
def test_preset_names_only_what_there_is(name):
    preset = load_preset(name)
    assert preset.about
    assert preset.algorithms
    for case in preset.cases:
        assert case.when.keys() <= TrainConfig.model_fields.keys()
        # what a condition looks at must not hang on another case
        assert not case.settings.keys() & {key for c in preset.cases for key in c.when}
        TrainConfig.model_validate(case.settings)
        pattern = str(case.when.get("method", "*")).replace("*", ".*")
        assert any(re.fullmatch(pattern, method) for method in METHODS)


@pytest.mark.parametrize("file", sorted((ROOT / "trainers" / "presets").glob("*.yaml")))
def test_every_setting_of_a_file_has_its_source_beside_it_or_above(file):
    text = file.read_text()
    assert yaml.safe_load(text).keys() <= {
        "base",
        "about",
        "algorithms",
        "differs",
        "settings",
        "cases",
    }
    if file.name.startswith("_"):
        settings = yaml.safe_load(text)["settings"]
        for section in ("ppo", "a2c", "network", "hypernetwork", "seps", "evaluation"):
            for name in settings.get(section, {}):
                assert re.search(rf"^ +{name}: .*# \w|^ +{name}: .*# \[", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("dispersion", {}, {"hypernetwork.embedding_size": 4, "frames": 20_000_000}),
        ("dispersion", {}, {"copies": 16, "steps": 128, "ppo.minibatches": 2, "ppo.clip": 0.2}),
        ("dispersion", {}, {"evaluation.episodes": 32, "evaluation.seed": 42}),
        ("dispersion", {"algorithm": "mappo"}, {"hypernetwork.embedding_size": 8}),
        ("dispersion", {}, {"network.activation": "relu", "network.hidden": (64, 64)}),
        ("navigation-4ag-different", {}, {"agents": 4, "env_args.agents_with_same_goal": 1}),
        ("navigation-2ag-different", {"method": "dico"}, {"dico.snd": 1.2}),
        ("navigation-8ag-same", {"method": "dico"}, {"dico.snd": 0.0}),
        ("navigation-8ag-half", {"method": "dico"}, {"dico.snd": None}),
        ("navigation-8ag-half", {}, {"agents": 8, "env_args.agents_with_same_goal": 4}),
        ("navigation-2ag-same", {}, {"agents": 2, "env_args.agents_with_same_goal": 2}),
        ("navigation-4ag-same", {}, {"network.hidden": (256, 256), "network.activation": "tanh"}),
        ("navigation-4ag-same", {"algorithm": "mappo"}, {"hypernetwork.embedding_size": 8}),
        ("mamujoco-humanoid-17x1", {}, {"agents": 17, "steps": 100, "ppo.clip": 0.1}),
        ("mamujoco-humanoid-17x1", {}, {"ppo.anneal_learning_rate": True, "critic_method": "fups"}),
        ("mamujoco-walker2d-2x3", {}, {"ppo.learning_rate": 1e-3, "ppo.minibatches": 2}),
        ("mamujoco-halfcheetah-2x3", {}, {"ppo.epochs": 15, "ppo.entropy_coefficient": 0.01}),
        ("mamujoco-ant-4x2", {}, {"ppo.epochs": 5, "steps": 200, "ppo.clip": 0.1}),
        ("mamujoco-ant-4x2", {}, {"env_args.agent_obsk": None, "env_args.standardise": True}),
        ("mamujoco-ant-4x2", {}, {"critic_input": "state"}),
        ("mamujoco-ant-4x2", {"algorithm": "ippo"}, {"critic_input": "observations"}),
        ("mamujoco-ant-4x2", {"algorithm": "happo"}, {"critic_input": "state", "method": "nops"}),
        (
            "mamujoco-humanoid-17x1",
            {"algorithm": "happo"},
            {"steps": 200, "ppo.clip": 0.1, "ppo.anneal_learning_rate": True, "reward": "team"},
        ),
        ("mamujoco-walker2d-2x3", {"algorithm": "happo"}, {"ppo.clip": 0.05, "steps": 200}),
        ("mamujoco-halfcheetah-2x3", {"algorithm": "happo"}, {"ppo.epochs": 15}),
        ("swimmer-10x2", {}, {"agents": 10}),
        ("swimmer-10x2", {"algorithm": "matd3"}, {"matd3.n_step": 10, "copies": 10, "steps": 50}),
        (
            "mamujoco-walker2d-2x3",
            {"algorithm": "matd3", "method": "kaleidoscope"},
            {"matd3.n_step": 20, "matd3.policy_delay": 8, "critic_method": "kaleidoscope"},
        ),
        (
            "mamujoco-halfcheetah-2x3",
            {"algorithm": "matd3", "method": "fups-id"},
            {"matd3.n_step": 10, "critic_method": "fups", "network.hidden": (256, 256)},
        ),
        ("smax-2s3z", {}, {"ppo.learning_rate": 4e-3, "hypernetwork.hidden": (32,)}),
        ("smax-3s5z", {"algorithm": "mappo"}, {"ppo.learning_rate": 3e-4, "ppo.clip": 0.2}),
        (
            "smax-3s5z",
            {"algorithm": "mappo", "method": "fups-id"},
            {"ppo.learning_rate": 2e-3, "ppo.entropy_coefficient": 0.0},
        ),
        ("smax-smacv2_10_units", {"method": "fups"}, {"ppo.learning_rate": 1e-3}),
        ("smax-smacv2_10_units", {}, {"ppo.learning_rate": 5e-3, "hypernetwork.hidden": (64,)}),
        (
            "smax-smacv2_20_units",
            {"algorithm": "mappo", "method": "hypermarl-coupled"},
            {"ppo.learning_rate": 3e-4, "hypernetwork.embedding_size": 4},
        ),
        ("bps-1", {}, {"agents": 15, "copies": 8, "steps": 5, "a2c.learning_rate": 3e-4}),
        ("bps-2", {}, {"algorithm": "a2c", "a2c.gae_lambda": 1.0, "network.activation": "relu"}),
        ("bps-4", {}, {"agents": 30, "frames": 20_000_000}),
        ("bps-3", {"method": "seps"}, {"seps.pretraining_frames": 200_000, "seps.groups": None}),
        ("specialisation", {"agents": "16"}, {"hypernetwork.embedding_size": 4}),
        ("specialisation", {"agents": 16, "method": "nops"}, {"network.hidden": (4,)}),
        ("synchronisation-temporal", {"method": "nops"}, {"network.hidden": (16,)}),
    ],
)
def test_values_are_those_of_the_paper(name, given, expected):
    found = config(name, **given).model_dump()
    for path, value in expected.items():
        part = found
        for key in path.split("."):
            part = part[key]
        assert part == value, path


def test_file_is_above_the_preset_and_the_command_line_above_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "preset: dispersion\nalgorithm: mappo\nsteps: 8\nppo: {epochs: 1, minibatches: 4}\n"
    )
    options = ["--config", "c.yaml", "--frames", "16", "--copies", "2", "--ppo.minibatches", "1"]
    assert main(["train", *options, "--diagnostics", "off", "--out", "r"]) == 0
    found = open_run("r").config
    assert found["preset"] == "dispersion"
    assert (found["steps"], found["copies"], found["frames"]) == (8, 2, 16)
    assert (found["ppo"]["epochs"], found["ppo"]["minibatches"]) == (1, 1)
    assert found["env"] == "vmas/dispersion"
    assert found["hypernetwork"]["embedding_size"] == 8  # the case of mappo, said by the file


HERE = [name for name in NAMES if config(name).env in environment_names()]
# Maps take seconds to compile, and hypernetworks of one family of presets are much alike.
QUICK = [
    *((name, "fups-id") for name in HERE if not name.startswith("smax")),
    *((name, "hypermarl") for name in ("bps-1", "mamujoco-ant-4x2", "navigation-4ag-half")),
    ("specialisation", "hypermarl"),
]


@pytest.mark.parametrize(
    ("name", "method"),
    slow_but([(name, method) for name in HERE for method in ("fups-id", "hypermarl")], *QUICK),
)
def test_preset_that_runs_here_trains(tmp_path, name, method):
    assert train_run(config(name, method=method, **TINY), tmp_path / "r")
    run = open_run(tmp_path / "r")
    assert (run.state, run.config["preset"]) == ("done", name)
    assert run.quantity("policy_loss").notnull().all()
    assert run.quantity("frames").values.tolist() == [16, 32]


def test_run_from_a_preset_resumes_with_or_without_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--copies", "2", "--steps", "4", "--diagnostics", "off", "--out", "r"]
    assert main(["train", "--preset", "specialisation", "--frames", "16", *small]) == 0
    assert main(["train", "--resume", "--out", "r", "--frames", "32"]) == 0
    again = ["train", "--resume", "--out", "r", "--preset", "specialisation", "--frames", "48"]
    assert main(again) == 0
    assert open_run("r").quantity("frames").values.tolist() == list(range(8, 49, 8))
    assert "Not as in the paper: REINFORCE is not in gradlab" in capsys.readouterr().out
    other = ["train", "--resume", "--out", "r", "--preset", "dispersion", "--frames", "64"]
    assert main(other) == 2
    assert "trained with preset='specialisation', not 'dispersion'" in capsys.readouterr().err


def test_preset_whose_environment_is_not_there_is_refused_as_that_environment(capsys, monkeypatch):
    monkeypatch.delitem(FAMILIES, "mamujoco")
    name = "mamujoco-ant-4x2"
    assert main(["train", "--env", config(name).env]) == 2
    expected = capsys.readouterr()
    assert main(["train", "--preset", name]) == 2
    found = capsys.readouterr()
    assert found == expected
    assert f"Unknown environment '{config(name).env}'" in found.err
    assert not found.out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dispersn", "Unknown preset 'dispersn'. Did you mean 'dispersion'?"),
        ("_navigation", "Unknown preset '_navigation'"),
        (3, "`preset` must be the name of a preset"),
    ],
)
def test_name_that_is_none_is_refused(name, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        with_preset({"preset": name})


def test_list_prints_every_preset_and_the_page_has_the_same_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "--preset", "list"]) == 0
    printed = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    assert [row[0] for row in printed] == NAMES
    runs = {row[0]: row[-1] for row in printed}
    assert (runs["dispersion"], runs["smax-2s3z"]) == ("yes", "yes")
    page = (ROOT / "docs" / "presets.md").read_text()
    documented = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("| `")
    ]
    assert documented == [row[:-1] for row in printed]
    for name in NAMES:
        for sentence in load_preset(name).differs:
            assert sentence in " ".join(page.split())
