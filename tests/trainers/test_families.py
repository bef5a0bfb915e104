"""Whole trainings in families of environments: they learn, and their page shows it."""

import pytest
from documented import example

from gradlab.cli import run as main
from gradlab.run import open_run

pytestmark = pytest.mark.slow

TRAININGS = {  # options, and by how much the mean return of the last tenth is above the first
    "bps/1": ("--frames 100000 --copies 32 --steps 50", 30.0),
    "pettingzoo/mpe2.simple_spread_v3": (
        "--frames 80000 --copies 16 --steps 50 --env-arg max_cycles=50 --ppo.learning-rate 0.001",
        10.0,
    ),
    "posts:Posts": ("--frames 30000 --copies 16 --steps 40", 40.0),
}


@pytest.mark.parametrize("env", TRAININGS)
def test_hypermarl_learns_with_full_diagnostics_and_writes_a_page(tmp_path, monkeypatch, env):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "posts.py").write_text(example())
    options, gain = TRAININGS[env]
    run, page = tmp_path / "r", tmp_path / "page.html"
    asked = ["--method", "hypermarl", "--env", env, "--diagnostics", "full", *options.split()]
    assert main(["train", *asked, "--out", str(run)]) == 0
    found = open_run(run)
    returns = found.quantity("episode_return").dropna("update")
    assert float(returns[-len(returns) // 10 :].mean()) > float(returns[0]) + gain
    residual = found.quantity("residual")
    assert set(residual["network"].values) == {"actor", "critic"}
    assert float(residual.max()) < 1e-4
    assert main(["dashboard", str(run), "--html", str(page)]) == 0
    assert env in page.read_text()
