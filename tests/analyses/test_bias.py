import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from synthetic import products_of

from analyses.studies import STUDIES, run_study
from analyses.studies.bias import AGENTS, COPIES, COSINES, PARAMS, SHARED, SNR, draw, products
from analyses.studies.chart import Line, Panel, chart
from gradlab.cli import run as main


def test_products_equal_loops():
    sums, each = draw(np.random.default_rng(0), -0.3, 64)
    found, expected = products(sums, each), products_of(sums, np.full((AGENTS, 32), 2))
    assert found.count.tolist() == expected.count.tolist()
    for name in ("within", "across", "following"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-10)


@pytest.mark.parametrize("copies", [16, 128])
@pytest.mark.parametrize("cosine", COSINES)
def test_draws_have_the_stated_truth(cosine, copies):
    random = np.random.default_rng(0)
    drawn = np.stack([draw(random, cosine, copies)[0] for _ in range(300)])
    each = copies // drawn.shape[2]
    mean = drawn.mean((0, 2)) / each
    gram = mean @ mean.T  # its own noise: 1 / (SNR * copies * draws) on the diagonal
    truth = cosine + (1 - cosine) * np.eye(AGENTS)
    np.testing.assert_allclose(gram, truth, atol=3 / (SNR * copies * 300) + 0.03)
    noise = (drawn - each * mean[:, None]) / each**0.5  # of single copies
    covariance = np.einsum("niep,nkep->ik", noise, noise) / (300 * drawn.shape[2])
    np.testing.assert_allclose(np.diagonal(covariance), 1 / SNR, rtol=0.02)
    correlation = covariance * SNR
    np.testing.assert_allclose(correlation[~np.eye(AGENTS, dtype=bool)], SHARED, atol=0.02)
    assert noise.shape[-1] == PARAMS


def test_study_reports_what_it_draws(tmp_path):
    study, told = dataclasses.replace(STUDIES["bias"], budgets={"quick": 20}), []
    report = run_study(study, "quick", tmp_path, progress=lambda *n: told.append(n))
    text = report.read_text()
    assert told[0] == (0, len(COSINES) * len(COPIES))
    assert told[-1] == (len(COSINES) * len(COPIES),) * 2
    assert sum(line.startswith(("| -0.3 |", "| 0.0 |")) for line in text.splitlines()) == told[0][1]
    assert "](bias.svg)" in text
    ElementTree.parse(report.parent / "bias.svg")
    assert len(pd.read_csv(report.parent / "bias.csv")) == told[0][1]
    assert "**supported**: noise that agents share gives the naive cosine the wrong sign" in text
    assert run_study(study, "quick", tmp_path).read_text() == text  # seeds are fixed


def test_command_lists_the_study(capsys):
    assert main(["study", "list"]) == 0
    assert "bias: What do naive and debiased cosines say" in capsys.readouterr().out


def test_chart_draws_points_to_scale_and_leaves_out_what_is_unknown():
    panel = Panel(
        title="a < b",
        lines=[Line(name="x", values=[0.0, float("nan"), 1.0])],
        ticks=(0.0, 1.0),
        marks=[0.5],
    )
    root = ElementTree.fromstring(chart([panel], ["1", "2", "3"], "n"))
    space = {"s": "http://www.w3.org/2000/svg"}
    assert "a < b" in [text.text for text in root.findall(".//s:text", space)]
    paths = [path.get("d") for path in root.findall("s:g/s:path", space)]
    low, high, middle = (float(path.split()[1].partition("H")[0]) for path in paths[:3])
    (first, last) = ([float(x) for x in point.split()] for point in paths[3][1:].split(" L"))
    assert first[1] == pytest.approx(low)
    assert last[1] == pytest.approx(high)
    assert middle == pytest.approx((low + high) / 2)
    assert last[0] > first[0]


@pytest.mark.slow
def test_all_claims_hold(tmp_path):
    text = run_study(STUDIES["bias"], "standard", tmp_path).read_text()
    assert "not supported" not in text
    assert text.count("**supported**") == 6
