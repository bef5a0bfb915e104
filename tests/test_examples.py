import runpy
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import gradlab

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    return runpy.run_path(str(EXAMPLES / name))


def test_plain_pytorch_finds_who_wants_the_opposite(tmp_path):
    path = load("plain_pytorch.py")["main"](tmp_path / "run", updates=11)
    run = gradlab.open_run(path)
    assert run.state == "done"
    place = {"network": "actor", "space": "psi", "layer": "all"}
    cosine = run.quantity("cosine_debiased", where=place)
    assert cosine["update"].values.tolist() == [0, 5, 10]
    assert np.array_equal(np.sign(cosine[0]), [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])


def test_notebook_runs_and_shows_the_run_and_its_plots():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)  # outputs are stripped
    nbclient.NotebookClient(notebook, timeout=120).execute()
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    assert any("<table>" in data.get("text/html", "") and "own loop" in str(data) for data in shown)
    figures = [
        data["application/vnd.plotly.v1+json"]
        for data in shown
        if len(data) and any("plotly" in kind for kind in data)
    ]
    assert len(figures) == 2
    assert all(figure["data"] for figure in figures)


def test_single_file_ppo_on_pettingzoo_has_three_more_lines(tmp_path):
    pytest.importorskip("mpe2")
    source = (EXAMPLES / "cleanrl_ppo_pettingzoo.py").read_text()
    added = [line for line in source.splitlines() if line.endswith(": gradlab")]
    assert len(added) == 3
    probed = load("cleanrl_ppo_pettingzoo.py")["main"](tmp_path / "run", updates=3, every=2)
    run = gradlab.open_run(tmp_path / "run")
    assert run.updates("cosine") == [0, 2]
    assert run.quantity("samples")[0].values.tolist() == [[8 * 25] * 3]
    assert run.quantity("residual").max() < 1e-9
    assert (run.state, run.config["copies"]) == ("done", 8)
    without = "\n".join(line for line in source.splitlines() if line not in added)
    names = {"__name__": "without"}
    exec(without, names)
    plain = names["main"](None, updates=3, every=2)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, probed.state_dict()[name]), name


def test_removing_conflict_is_compared_with_leaving_it(tmp_path, capsys):
    pytest.importorskip("torchjd")
    main = load("remove_conflict.py")["main"]
    rewards = main("pcgrad", seeds=1, updates=2, out=tmp_path)
    assert [*rewards] == ["fups", "fups+pcgrad", "hypermarl", "hypermarl+pcgrad"]
    said = capsys.readouterr().out
    assert "reward per step" in said.splitlines()[0]
    for method in ("fups", "hypermarl"):
        change = rewards[f"{method}+pcgrad"][0] - rewards[method][0]
        assert f"{method}: pcgrad changed the reward per step by {change:+.3f}" in said
    opposed = gradlab.open_run(tmp_path / "fups+pcgrad-0").quantity("opposed_agents")
    assert opposed.sizes == {"update": 2, "network": 2, "direction": 2}


@pytest.mark.parametrize(
    ("model", "method"),
    [("mlp", "fups"), pytest.param("hypermarl", "hypermarl", marks=pytest.mark.slow)],
)
def test_benchmarl_experiment_is_watched_by_one_line(model, method, tmp_path):
    pytest.importorskip("benchmarl")
    main = load("benchmarl_navigation.py")["main"]
    path = main(tmp_path / "new", model, iterations=3, copies=4, steps=10, every=2)
    run = gradlab.open_run(path)
    assert (run.state, run.method, run.info["agents"]) == ("done", method, 4)
    assert run.updates("cosine_debiased") == [0, 2]
    assert run.quantity("residual").max() < 1e-9


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_torchrl_training_is_watched_and_unchanged(shared, tmp_path, monkeypatch):
    pytest.importorskip("torchrl")
    main = load("torchrl_ppo.py")["main"]
    states = []
    step = torch.optim.Adam.step

    def noted(optimiser, *rest):
        step(optimiser, *rest)
        states[-1] = [p.detach().clone() for p in optimiser.param_groups[0]["params"]]

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    for probe in (main.__globals__["LossProbe"], MagicMock()):
        states.append([])
        monkeypatch.setitem(main.__globals__, "LossProbe", probe)
        main(tmp_path / "run", updates=3, copies=8, steps=10, shared=shared, every=1)
    for watched, plain in zip(*states, strict=True):
        assert torch.equal(watched, plain)
    run = gradlab.open_run(tmp_path / "run")
    assert (run.state, run.method) == ("done", "fups" if shared else "nops")
    assert run.updates("cosine_debiased") == run.updates("episode_return") == [0, 1, 2]
    assert run.quantity("samples")[0].values.tolist() == [[80] * 4] * 2
