"""Panels over all tasks and seeds, of made-up runs whose agents' number makes the task."""

import json

import numpy as np
import pandas as pd
import pytest

from analyses import performance
from dashboards.overview_tab import last_tenth, returns
from dashboards.view import View

PANELS = ("performance-profile", "performance-aggregates", "performance-improvement")


@pytest.fixture(scope="module")
def write(write_run, tmp_path_factory):
    def write(seeds):
        """Runs of methods, as many for each number of agents as said."""
        folder = tmp_path_factory.mktemp("performance")
        return [
            write_run(
                folder / f"{method}-{agents}-{seed}",
                agents=agents,
                updates=6,
                method=method,
                diagnostics=False,
                embeddings="none",
                seed=100 * len(method) + 10 * agents + seed,
            )
            for method, tasks in seeds.items()
            for agents, number in tasks.items()
            for seed in range(number)
        ]

    return write


@pytest.fixture(scope="module")
def view(write):
    return View(write({"fups": {2: 3, 3: 2}, "hypermarl": {2: 2, 3: 3, 4: 2}, "nops": {2: 1}}))


def normalised(view):
    """Scores of the methods and tasks that have two runs in all."""
    found = pd.DataFrame(
        [
            (of.run.method, str(of.run.info["agents"]), number, last_tenth(returns(of)[2]))
            for number, of in enumerate(view.runs.values())
        ],
        columns=["method", "task", "seed", "score"],
    )
    found = found[(found["method"] != "nops") & (found["task"] != "4")]
    ends = found.groupby("task")["score"]
    low, high = ends.transform("min"), ends.transform("max")
    return found.assign(score=(found["score"] - low) / (high - low))


def drawn(view, panel, **changes):
    return view.panels[panel].draw(view.defaults().with_(**changes))


def test_profile_is_that_of_the_runs_that_can_be_compared(view):
    figure = drawn(view, "performance-profile")
    lines = [trace for trace in figure["data"] if "name" in trace]
    assert [line["name"] for line in lines] == ["fups (5)", "hypermarl (5)"]
    expected = performance.performance_profile(normalised(view), lines[0]["x"], resamples=1000)
    for line, method in zip(lines, ("fups", "hypermarl"), strict=True):
        of = expected[expected["method"] == method]
        np.testing.assert_allclose(line["y"], of["value"], atol=1e-3)
        group = [trace for trace in figure["data"] if trace["legendgroup"] == line["name"]]
        np.testing.assert_allclose(group[0]["y"], of["low"], atol=1e-3)
        np.testing.assert_allclose(group[1]["y"], of["high"], atol=1e-3)
    assert figure["layout"]["meta"]["note"] == "10 runs of 2 tasks, 3 left out"


def test_aggregates_and_improvement_are_those_of_the_library(view):
    scores = normalised(view)
    figure = drawn(view, "performance-aggregates")
    marks, texts = figure["data"], figure["layout"]["annotations"]
    assert len(marks) == len(texts) == 6
    for place, measure in enumerate((
        performance.iqm,
        performance.median,
        performance.optimality_gap,
    )):
        table = measure(scores, resamples=1000)
        ours = slice(2 * place, 2 * place + 2)
        for mark, text, row in zip(marks[ours], texts[ours], table.itertuples(), strict=True):
            assert mark["x"] == pytest.approx([row.value], abs=1e-3)
            assert mark["error_x"]["array"] == pytest.approx([row.high - row.value], abs=1e-3)
            assert text["text"] == f"{row.value:.2f} ({row.low:.2f} to {row.high:.2f})"
            assert (text["xref"], text["y"]) == (mark["xaxis"], row.Index)
    for against in ("fups", "hypermarl"):
        (mark,) = drawn(view, "performance-improvement", against=against)["data"]
        (row,) = performance.probability_of_improvement(
            scores, against, resamples=1000
        ).itertuples()
        assert mark["x"] == pytest.approx([row.value], abs=1e-3)
        assert mark["y"] == [f"{row.method} (5)"]
    against = drawn(view, "performance-improvement", against="nops")
    assert "no two runs" in against["layout"]["meta"]["alt"]


@pytest.mark.parametrize(
    "seeds",
    [{"fups": {2: 3}}, {"fups": {2: 3}, "nops": {3: 3}}, {"fups": {2: 1}, "nops": {2: 1}}],
    ids=["one method", "no task in common", "single runs"],
)
def test_what_cannot_be_compared_is_said(write, seeds):
    view = View(write(seeds))
    for name in PANELS:
        assert "needs two methods" in drawn(view, name)["layout"]["meta"]["alt"]


def test_names_from_run_folders_stay_text(write_run, tmp_path):
    names = ["<b>%{x}</b>\ud800", "<i>b</i>"]
    runs = [
        write_run(tmp_path / f"{n}-{seed}", method=name, updates=3, diagnostics=False, seed=seed)
        for n, name in enumerate(names)
        for seed in (0, 1)
    ]
    view = View(runs)
    for name in PANELS:
        text = json.dumps(drawn(view, name, against=names[1])["data"], allow_nan=False)
        assert "<b>" not in text
        assert "<i>" not in text
