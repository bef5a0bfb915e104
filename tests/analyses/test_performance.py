import math
from itertools import product

import numpy as np
import pandas as pd
import pytest

from analyses import performance
from analyses.aggregate import across_seeds, bootstrap, interquartile_mean_of
from gradlab.checks import UsageError

TAUS = (3.0, 5.0, 6.5, 12.0)


def table(seeds, rng, round_to=6):
    """Scores of methods, of as many seeds for each task as said, about which they lie."""
    rows = [
        (method, task, seed, round(rng.normal(loc=size), round_to))
        for method, tasks in seeds.items()
        for task, size in tasks.items()
        for seed in range(size)
    ]
    return pd.DataFrame(rows, columns=["method", "task", "seed", "score"])


def unequal():
    seeds = {"a": {"x": 5, "y": 4, "z": 7}, "b": {"x": 6, "y": 5, "z": 3}}
    return table(seeds, np.random.default_rng(3), round_to=1)  # with ties


def slow_scores(scores, method):
    found = {}
    for row in scores.itertuples():
        if row.method == method:
            found.setdefault(row.task, []).append(row.score)
    return list(found.values())


def slow_iqm(tasks):
    """Every run as often as makes tasks weigh the same, and then a trimmed mean of shares."""
    weighted = sorted((v, 1 / len(runs)) for runs in tasks for v in runs)
    number, total = len(weighted), sum(weight for _, weight in weighted)
    low = (number // 4) / number * total
    kept = mass = upto = 0.0
    for value, weight in weighted:
        share = max(0.0, min(upto + weight, total - low) - max(upto, low))
        upto += weight
        kept += share * value
        mass += share
    return kept / mass


def slow_mean(tasks):
    return sum(sum(runs) / len(runs) for runs in tasks) / len(tasks)


def slow_median(tasks):
    means = sorted(sum(runs) / len(runs) for runs in tasks)
    half = len(means) // 2
    return means[half] if len(means) % 2 else (means[half - 1] + means[half]) / 2


def slow_gap(tasks, target):
    return slow_mean([[target - min(v, target) for v in runs] for runs in tasks])


def slow_improvement(tasks, others):
    shares = []
    for ours, theirs in zip(tasks, others, strict=True):
        wins = [(x > y) + (x == y) / 2 for x, y in product(ours, theirs)]
        shares.append(sum(wins) / len(wins))
    return sum(shares) / len(shares)


def assert_ends(row, statistic, strata, draws=1500):
    """Ends cut off a fortieth of a statistic of groups of strata drawn anew run by run."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(draws):
        drawn = [[[r[rng.integers(len(r))] for _ in r] for r in group] for group in strata]
        found.append(statistic(*drawn))
    for end, share in ((row["low"], 0.025), (row["high"], 0.975)):
        below, upto = (np.mean(np.array(found) < end + rounding) for rounding in (-1e-9, 1e-9))
        # three standard errors of that many draws here and 2000 there
        assert below - 0.016 <= share <= upto + 0.016


MEASURES = [
    (performance.iqm, slow_iqm),
    (performance.mean, slow_mean),
    (performance.median, slow_median),
    (lambda s: performance.optimality_gap(s, 0.4), lambda tasks: slow_gap(tasks, 0.4)),
]


@pytest.mark.parametrize(("measure", "slow"), MEASURES, ids=["iqm", "mean", "median", "gap"])
def test_measures_are_those_of_loops_over_tasks_and_seeds(measure, slow):
    scores = unequal()
    found = measure(scores).set_index("method")
    for method in ("a", "b"):
        tasks = slow_scores(scores, method)
        assert found["value"][method] == pytest.approx(slow(tasks), rel=1e-12)
    assert_ends(found.loc["a"], slow, [slow_scores(scores, "a")])
    assert found.loc["a", ["tasks", "fewest_seeds", "most_seeds"]].tolist() == [3, 4, 7]


def test_probability_of_improvement_is_that_of_all_pairs_of_runs():
    scores = unequal()
    found = performance.probability_of_improvement(scores, "b")
    ours, theirs = (slow_scores(scores, method) for method in ("a", "b"))
    assert found[["method", "over"]].to_numpy().tolist() == [["a", "b"]]
    assert found["value"][0] == pytest.approx(slow_improvement(ours, theirs), rel=1e-12)
    assert_ends(found.iloc[0], slow_improvement, [ours, theirs])
    back = performance.probability_of_improvement(scores, "a")
    assert back["value"][0] == pytest.approx(1 - found["value"][0], rel=1e-12)
    assert back.loc[0, ["tasks", "fewest_seeds", "most_seeds"]].tolist() == [3, 3, 7]
    same = scores[scores["method"] == "a"]
    itself = pd.concat([same, same.assign(method="again")])
    assert performance.probability_of_improvement(itself, "a")["value"][0] == 0.5
    with pytest.raises(UsageError, match=r"Unknown method 'c'\. Known: a, b"):
        performance.probability_of_improvement(scores, "c")


def test_performance_profile_is_the_share_of_runs_above_each_threshold():
    scores = unequal()
    found = performance.performance_profile(scores, TAUS)
    for method, tau in product(("a", "b"), TAUS):
        tasks = slow_scores(scores, method)
        slow = slow_mean([[float(v > tau) for v in runs] for runs in tasks])
        (row,) = found[(found["method"] == method) & (found["threshold"] == tau)].itertuples()
        assert row.value == pytest.approx(slow, rel=1e-12)
        assert row.low <= row.value <= row.high
    ours = slow_scores(scores, "a")
    row = found[(found["method"] == "a") & (found["threshold"] == 5)].iloc[0]
    assert 0 < row["low"] < row["high"] < 1
    assert_ends(
        row, lambda tasks: slow_mean([[float(v > 5) for v in runs] for runs in tasks]), [ours]
    )


def test_sample_efficiency_is_the_interquartile_mean_at_frames_that_all_have():
    scores = unequal()
    rows = [
        (*row, frames, frames * score)
        for *row, score in scores.itertuples(index=False)
        for frames in ((0, 8, 20) if row[0] == "a" else (4, 12, 16))
    ]
    curves = pd.DataFrame(rows, columns=["method", "task", "seed", "frames", "score"])
    curves.loc[0, "score"] = np.nan  # a point that is not known shortens its curve
    found = performance.sample_efficiency(curves, points=3)
    assert found["frames"].tolist() == [8, 12, 16] * 2
    ends = performance.iqm(scores)
    for method, frames in product(("a", "b"), (8, 12, 16)):
        (row,) = found[(found["method"] == method) & (found["frames"] == frames)].itertuples()
        end = ends[ends["method"] == method].iloc[0]
        for name in ("value", "low", "high"):
            assert getattr(row, name) == pytest.approx(frames * end[name], rel=1e-9)


def test_equal_seeds_are_pooled_and_a_single_task_is_as_across_seeds():
    scores = table({"a": {"x": 7, "y": 7}}, np.random.default_rng(0))
    pooled = np.sort(scores["score"])
    assert performance.iqm(scores)["value"][0] == pytest.approx(pooled[3:-3].mean(), rel=1e-12)
    one = scores[scores["task"] == "x"]
    found = performance.iqm(one, resamples=500, seed=4)[["value", "low", "high"]].iloc[0].tolist()
    alone = across_seeds(one["score"].to_numpy()[:, None], 500, 4)
    assert found == [float(x[0]) for x in alone]


def test_draws_are_those_of_the_seed_and_of_no_global_generator():
    scores = unequal()
    found = performance.iqm(scores)
    np.random.seed(1)
    pd.testing.assert_frame_equal(found, performance.iqm(scores))
    other = performance.iqm(scores, seed=1)
    assert (other["value"] == found["value"]).all()
    assert (other["low"] != found["low"]).any()


def test_order_of_rows_makes_no_difference_but_to_the_order_of_methods():
    scores = unequal()
    mixed = scores.sample(frac=1, random_state=2)
    for measure in (performance.iqm, lambda s: performance.performance_profile(s, TAUS)):
        found, other = (
            measure(s).sort_values("method", kind="stable").reset_index(drop=True)
            for s in (scores, mixed)
        )
        pd.testing.assert_frame_equal(found, other)
    assert performance.iqm(scores[::-1])["method"].tolist() == ["b", "a"]


def test_single_seed_of_any_task_leaves_no_interval():
    found = performance.iqm(table({"a": {"x": 9, "y": 1}}, np.random.default_rng(0)))
    assert np.isfinite(found["value"][0])
    assert np.isnan(found[["low", "high"]].to_numpy(dtype=float)).all()


def test_scores_are_normalised_by_bounds_that_are_said():
    scores = unequal()
    scores.loc[scores["task"] == "y", "score"] *= 100
    bounds = performance.pooled_bounds(scores)
    for task, (low, high) in bounds.items():
        of = scores.loc[scores["task"] == task, "score"].tolist()
        assert (low, high) == (min(of), max(of))
    ranges = performance.normalise(scores, bounds).groupby("task")["score"]
    assert ranges.min().tolist() == [0, 0, 0]
    assert ranges.max().tolist() == [1, 1, 1]
    given = performance.normalise(scores, {"x": (-1.0, 1.0), "y": (0.0, 100.0), "z": (0.0, 1.0)})
    assert given["score"][0] == (scores["score"][0] + 1) / 2
    with pytest.raises(UsageError, match="Unknown task 'z'"):
        performance.normalise(scores, {"x": (0.0, 1.0), "y": (0.0, 1.0)})
    with pytest.raises(
        UsageError, match=r"`bounds\['x'\]` must be two finite numbers.*\(1\.0, 1\.0\)"
    ):
        performance.normalise(scores, dict.fromkeys("xyz", (1.0, 1.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pivot_table(index="seed", columns="task", values="score"),
            r"Got scores=\['x', 'y', 'z'\]",
        ),
        (lambda s: s.rename(columns={"task": "seed", "seed": "task"}), "tasks and seeds swapped"),
        (lambda s: s.iloc[:0], "at least one row"),
        (
            lambda s: pd.concat([s, s.iloc[[3]]]),
            "one row for each method, task, seed: .* Got two of method=a, task=x, seed=3",
        ),
        (lambda s: s.assign(score=np.inf), "`score` must be finite.* method=a, task=x, seed=0"),
        (
            lambda s: s.query("method == 'a' or task != 'z'"),
            "same tasks for all methods. Got none of method='b' on task='z'",
        ),
        (lambda s: pd.concat([s.assign(frames=n) for n in (0, 1)]), "one row for each"),
    ],
)
def test_what_are_not_scores_of_methods_tasks_and_seeds_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        performance.iqm(change(unequal()))


def test_an_array_is_refused():
    # by name where types are checked, before the function is reached
    with pytest.raises((UsageError, TypeError), match=r"columns method, task, seed|DataFrame"):
        performance.iqm(unequal().to_numpy())


def test_curves_that_do_not_overlap_or_have_no_score_are_refused():
    curves = unequal().assign(frames=0)
    with pytest.raises(UsageError, match="`frames` must overlap"):
        performance.sample_efficiency(
            pd.concat([curves.query("seed == 0"), curves.query("seed == 1").assign(frames=9)])
        )
    curves.loc[curves["task"] == "y", "score"] = np.nan
    with pytest.raises(
        UsageError, match=r"finite somewhere\. Got none of method=a, task=y, seed=0"
    ):
        performance.sample_efficiency(curves)
    with pytest.raises(UsageError, match="the columns method, task, seed, frames, score"):
        performance.sample_efficiency(unequal())


def test_tasks_that_a_method_lacks_can_be_left_out():
    scores = unequal().query("method == 'a' or task != 'z'")
    kept = performance.in_all_methods(scores)
    assert sorted(kept["task"].unique()) == ["x", "y"]
    assert performance.iqm(kept)["tasks"].tolist() == [2, 2]


def coverage(statistic, draws, truth, resamples, *, mixed=False):
    """How often intervals of draws [task, seed, repetition] hold the truth."""
    strata = list(draws.transpose(1, 0, 2) if mixed else draws)
    _, low, high = bootstrap(strata, statistic, resamples)
    return float(((low <= truth) & (truth <= high)).mean())


def draw_tasks(rng, seeds, repetitions):
    """Runs of tasks whose levels lie apart, symmetric about 0, so that 0 is true of all means."""
    levels = np.array([-3.0, -1.0, 1.0, 3.0])[:, None, None]
    return levels + rng.standard_normal((4, seeds, repetitions))


def test_intervals_of_strata_hold_the_truth_and_those_of_swapped_axes_do_not():
    draws = draw_tasks(np.random.default_rng(0), 40, 500)
    # the slow test is the narrower one: of 500 repetitions a share is known to about 0.01
    assert 0.9 <= coverage(interquartile_mean_of, draws, 0.0, 600) <= 0.98
    # tasks drawn in place of seeds: intervals of the tasks' spread
    assert coverage(interquartile_mean_of, draws[..., :200], 0.0, 200, mixed=True) > 0.99
    # and of a single task no interval at all, however unsure the mean is
    one = draws[:1].transpose(1, 0, 2)
    assert np.isnan(bootstrap(list(one), interquartile_mean_of)[1]).all()
    # runs of a task whose episodes were taken for further seeds: too narrow
    episodes = np.repeat(draws[..., :100], 10, axis=1)
    assert coverage(interquartile_mean_of, episodes, 0.0, 100) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "least"), [(5, 0.8), (10, 0.9), (20, 0.92), (40, 0.93)])
def test_intervals_of_every_measure_hold_the_truth(seeds, least):
    """Of few seeds less often: as few are drawn anew as there are, which vary too little."""
    rng = np.random.default_rng(seeds)
    draws = draw_tasks(rng, seeds, 4000)
    runs = 0.5 * (1 + math.erf(1 / 2))  # P(X > Y) of normals with means 1 apart
    above = np.array([0.5 * math.erfc((0.5 - level) / math.sqrt(2)) for level in (-3, -1, 1, 3)])
    fall = np.array([
        (1 - level) * 0.5 * math.erfc((level - 1) / math.sqrt(2))
        + math.exp(-((1 - level) ** 2) / 2) / math.sqrt(2 * math.pi)
        for level in (-3, -1, 1, 3)
    ])
    for statistic, of, truth in (
        (interquartile_mean_of, draws, 0.0),
        (performance._mean, draws, 0.0),
        (performance._median, draws, 0.0),
        (performance._mean, (draws > 0.5).astype(float), above.mean()),
        (performance._mean, np.maximum(1 - draws, 0), fall.mean()),
    ):
        assert least <= coverage(statistic, of, truth, 1000) <= 0.97
    better = 1 + draw_tasks(rng, seeds, 1000)
    both = np.concatenate([better, draws[..., :1000]])
    assert least <= coverage(performance._improvement, both, runs, 300) <= 0.97
