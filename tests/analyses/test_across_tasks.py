import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from analyses.studies.across_tasks import across_tasks
from analyses.studies.chart import Line, Numbers, Panel, chart
from analyses.studies.verdict import Estimate
from gradlab.quantity import Quantity
from gradlab.run import open_run
from gradlab.run_writer import RunWriter

SVG = {"s": "http://www.w3.org/2000/svg"}


def write(path, method, environment, seed, reward):
    """A run whose reward rises in a straight line from 0 to what it is at the end."""
    with RunWriter(path) as writer:
        writer.describe(method=method, environment=environment, agents=2, seed=seed, config={})
        for update in range(5):
            numbers = {"frames": 1000.0 * update, "reward_per_step": reward * update / 4}
            found = {n: Quantity(values=np.array(v), dims=()) for n, v in numbers.items()}
            writer.write(update, found)
    return open_run(path)


@pytest.fixture
def make(tmp_path):
    def make(rewards):
        """Runs of rewards by method and environment."""
        return [
            write(tmp_path / f"{method}-{environment}-{seed}", method, environment, seed, reward)
            for method, tasks in rewards.items()
            for environment, of in tasks.items()
            for seed, reward in enumerate(of)
        ]

    return make


def test_section_compares_methods_over_tasks_and_says_what_is_unequal_or_left_out(make):
    runs = make({
        "fups-id": {"x": [0.0, 0.1, 0.2, 0.3, 0.4], "y": [5.0, 6.0, 7.0, 8.0, 9.0], "z": [1.0]},
        "nops": {"x": [0.3, 0.5, 0.6, 0.7, 0.9, 1.0], "y": [7.0, 8.0, 9.0, 9.0, 10.0]},
        "fups": {"x": [0.0, 0.0, 0.0, 0.1], "y": [0.0, 1.0, 1.0, np.nan]},
    })
    section = across_tasks("s", runs)
    table = section.tables["s-aggregates"].set_index(["measure", "method"])
    x, y = [np.array([0.3, 0.5, 0.6, 0.7, 0.9, 1.0]), np.array([0.7, 0.8, 0.9, 0.9, 1.0])]
    assert table["value"]["median", "nops"] == pytest.approx((x.mean() + y.mean()) / 2)
    assert table["value"]["optimality gap", "nops"] == pytest.approx(1 - (x.mean() + y.mean()) / 2)
    # of 30 pairs on x, of 25 on y; half of those that tie
    won = [
        np.sign(np.subtract.outer(a, b)).mean() / 2 + 0.5
        for a, b in (
            (x, np.array([0.0, 0.1, 0.2, 0.3, 0.4])),
            (y, np.array([0.5, 0.6, 0.7, 0.8, 0.9])),
        )
    ]
    improvement = table.loc[("improvement over fups-id", "nops")]
    assert improvement["value"] == pytest.approx(np.mean(won))
    assert improvement["low"] < improvement["value"] < improvement["high"]
    few = table.loc[("IQM", "fups")]
    assert np.isnan([few["low"], few["high"]]).all()  # of three and four seeds
    assert ("improvement over fups-id", "fups-id") not in table.index
    assert section.shown.columns.tolist() == ["measure", "fups-id", "nops", "fups"]
    assert (
        section.shown.set_index("measure")["nops"]["IQM"]
        == Estimate(*table.loc[("IQM", "nops"), ["value", "low", "high"]]).text()
    )
    for words in (
        "Left out is a run of fups on y, 2 agents (seed 3) without any finite reward_per_step.",
        "Left out is z, 2 agents, which not all methods have runs of.",
        "there are 5 to 5 of fups-id, 5 to 6 of nops, 3 to 4 of fups",
        "Scores of 2 tasks (x, 2 agents; y, 2 agents)",
        "lowest and highest score of all runs",
    ):
        assert words in section.about
    curves = section.tables["s-curves"]
    ends = curves[curves["frames"] == 4000].set_index("method")["value"]
    # each run's own straight line, which the scale of the ends turns into one
    assert ends["nops"] == pytest.approx(table["value"]["IQM", "nops"])
    assert (curves.groupby("method")["frames"].count() == 60).all()
    root = ElementTree.fromstring(section.figures["s-tasks"])
    assert {"fups", "fups-id", "nops", "thousand frames"} <= {
        text.text for text in root.findall(".//s:text", SVG)
    }


def test_bounds_of_a_study_stand_in_the_section(make):
    runs = make({"fups": {"x": [0.5] * 5}, "nops": {"x": [1.0] * 5}})
    given = across_tasks("s", runs, bounds={"x, 2 agents": (0.5, 1.5)}, scale="0 is chance")
    value = given.tables["s-aggregates"].set_index(["measure", "method"])["value"]
    assert value["IQM", "fups"] == 0
    assert value["IQM", "nops"] == 0.5
    assert "normalised: 0 is chance." in given.about
    assert "Seeds are not equal" not in given.about
    assert not re.search("improvement over", given.shown.to_string())


def test_nothing_to_compare_is_said(make):
    alike = across_tasks("s", make({"fups": {"x": [0.5, 0.5]}, "nops": {"x": [0.5, 0.5]}}))
    assert alike.shown is None
    assert "Left out is x, 2 agents, where all runs score the same." in alike.about
    assert "Nothing is left to compare." in alike.about


def test_chart_draws_numbers_to_scale_with_bands():
    line = Line(name="a", values=[0.0, 1.0, 0.5], low=[0.0, 0.5, 0.5], high=[0.5, 1.0, np.nan])
    panel = Panel(
        title="t",
        lines=[line],
        ticks=(0.0, 1.0),
        across=Numbers("n", [0.0, 3.0, 4.0], [0.0, 2.0, 4.0]),
    )
    root = ElementTree.fromstring(chart([panel]))
    band, path = root.findall("s:g/s:path", SVG)[2:4]
    points = [[float(x) for x in p.split()] for p in path.get("d")[1:].split(" L")]
    (first, second, last) = (x for x, _ in points)
    assert (second - first) / (last - first) == pytest.approx(0.75, abs=1e-3)
    around = [[float(x) for x in p.split()] for p in band.get("d")[1:-1].split(" L")]
    assert [x for x, _ in around] == [first, second, second, first]  # there, and back above
    assert around[1][1] > around[2][1] == points[1][1]
    labels = [text.text for text in root.findall("s:g/s:text", SVG)]
    assert labels == ["t", "0", "1", "0", "2", "4", "n"]


def test_tables_are_those_of_a_single_task_too(make):
    section = across_tasks("s", make({"fups-id": {"x": [0.0, 0.5]}, "nops": {"x": [1.0, 0.5]}}))
    assert "Scores of 1 task (x, 2 agents)" in section.about
    assert isinstance(section.shown, pd.DataFrame)
    assert section.shown.set_index("measure")["nops"]["improvement over fups-id"] == "0.875"
