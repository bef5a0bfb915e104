from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from analyses.studies import relabelling
from analyses.studies.relabelling import correlations, gaps, partitions, within_seeds

PAIRS = (0, 0, 1, 1)


def distances(random, shift=0.0):
    """Between 4 agents, those of different pairs further apart by `shift`."""
    drawn = random.uniform(1, 2, (4, 4))
    apart = np.array(PAIRS)[:, None] != np.array(PAIRS)
    return np.triu(drawn + shift * apart, 1) + np.triu(drawn + shift * apart, 1).T


def gap(distance, labels):
    """The statistic as loops."""
    same, apart = [], []
    for i in range(len(labels)):
        for k in range(i):
            (same if labels[i] == labels[k] else apart).append(distance[i, k])
    return (np.mean(apart) - np.mean(same)) / np.mean(same + apart)


def test_gaps_are_of_every_way_to_share_out_labels():
    distance = distances(np.random.default_rng(0))
    found = gaps(distance, PAIRS)
    assert len(found) == 3
    assert found[0] == pytest.approx(gap(distance, PAIRS))
    ways = {round(gap(distance, labels), 12) for labels in permutations(PAIRS)}
    assert {round(value, 12) for value in found} == ways
    assert len(partitions([0, 0, 1, 2])) == 6
    assert gaps(distance, [5, 5, 7, 7]) == pytest.approx(found)
    assert not gaps(np.zeros((4, 4)), PAIRS).any()


def test_correlations_are_of_every_order_of_agents():
    random = np.random.default_rng(1)
    one, other = distances(random), distances(random)
    pair = np.triu_indices(4, 1)
    found = correlations(one, other)
    for value, order in zip(found, permutations(range(4)), strict=True):
        turned = other[np.ix_(order, order)]
        assert value == pytest.approx(stats.spearmanr(one[pair], turned[pair]).statistic)
    assert np.isnan(correlations(one, np.ones((4, 4)))).all()


def test_labels_are_permuted_within_each_seed():
    random = np.random.default_rng(2)
    of_seeds = [distances(random, 0.2) for _ in range(5)]
    found = within_seeds([gaps(distance, PAIRS) for distance in of_seeds])
    ways = ((0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0))
    means = np.array([
        np.mean([gap(d, labels) for d, labels in zip(of_seeds, chosen, strict=True)])
        for chosen in product(ways, repeat=5)
    ])
    assert found.value == pytest.approx(means[0])
    assert found.more == pytest.approx((means >= means[0] - 1e-12).mean())
    assert found.less == pytest.approx((means <= means[0] + 1e-12).mean())
    assert found.how == "all 243 arrangements within 5 seeds"
    assert 1 / 243 <= found.more < 0.1


def test_random_arrangements_come_near_all_of_them(monkeypatch):
    random = np.random.default_rng(3)
    of_seeds = [gaps(distances(random, 0.1), PAIRS) for _ in range(5)]
    every = within_seeds(of_seeds)
    monkeypatch.setattr(relabelling, "_EXACT", 1)
    drawn = within_seeds(of_seeds)
    assert drawn.how == "100,000 random arrangements within 5 seeds"
    assert drawn.value == pytest.approx(every.value)
    assert drawn.more == pytest.approx(every.more, abs=0.005)
    assert drawn.less == pytest.approx(every.less, abs=0.005)


def test_p_values_keep_their_level_and_find_what_is_there():
    random = np.random.default_rng(4)

    def p_values(shift):
        return np.array([
            within_seeds([gaps(distances(random, shift), PAIRS) for _ in range(5)]).more
            for _ in range(200)
        ])

    by_chance = p_values(0.0)
    assert 0.02 < (by_chance <= 0.05).mean() < 0.08
    assert 0.4 < (by_chance <= 0.5).mean() < 0.6
    assert (p_values(0.5) <= 0.05).mean() > 0.9


@pytest.mark.parametrize(
    ("shift", "outcome"), [(2.0, "supported"), (-0.9, "not supported"), (0.0, "undecided")]
)
def test_verdict_follows_from_the_place_among_arrangements(shift, outcome):
    random = np.random.default_rng(8)
    found = within_seeds([gaps(distances(random, shift), PAIRS) for _ in range(6)])
    verdict = found.verdict("pairs are near", "gap")
    assert verdict.outcome == outcome
    assert "729 arrangements within 6 seeds" in verdict.evidence


def test_seeds_in_which_nothing_is_known_do_not_count():
    values = gaps(distances(np.random.default_rng(6)), PAIRS)
    unknown = np.full(3, np.nan)
    assert within_seeds([values, unknown]) == within_seeds([values])
    nothing = within_seeds([unknown])
    assert np.isnan(nothing.more)
    assert nothing.verdict("claim", "gap").outcome == "undecided"
