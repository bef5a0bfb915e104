import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

import gradlab
from gradlab.checks import UsageError
from gradlab.metrics.geometry import geometry

SCALARS = [
    "within_distance",
    "between_distance",
    "group_difference",
    "group_p_value",
    "effective_rank",
    "participation_ratio",
    "rank_ceiling",
]


def rows_of(agents, features=4, seed=0):
    return np.random.default_rng(seed).normal(size=(agents, features))


def symmetric(agents, seed=1):
    matrix = np.random.default_rng(seed).normal(size=(agents, agents))
    return matrix + matrix.T


def distances_of(rows):
    agents = len(rows)
    found = np.zeros((agents, agents))
    for i, k in itertools.product(range(agents), repeat=2):
        found[i, k] = math.sqrt(
            math.fsum((a - b) ** 2 for a, b in zip(rows[i], rows[k], strict=True))
        )
    return found


def pairs_of(matrix):
    return [matrix[i, k] for i, k in itertools.combinations(range(len(matrix)), 2)]


def within_and_between(distances, groups):
    within, between = [], []
    for i, k in itertools.combinations(range(len(groups)), 2):
        (within if groups[i] == groups[k] else between).append(distances[i, k])
    return np.mean(within), np.mean(between)


def share_as_extreme(values, observed):
    return np.mean([abs(value) >= abs(observed) - 1e-12 for value in values])


def mantel_of(distances, matrix, correlate):
    """Statistic and exact two-sided p-value, all permutations of the agents in a loop."""
    orders = itertools.permutations(range(len(matrix)))
    values = [
        correlate(pairs_of(distances), pairs_of(matrix[np.ix_(order, order)])) for order in orders
    ]
    return values[0], share_as_extreme(values, values[0])


CORRELATE = {
    "pearson": lambda a, b: np.corrcoef(a, b)[0, 1],
    "spearman": lambda a, b: spearmanr(a, b).statistic,
}


@pytest.mark.parametrize("agents", [1, 2, 3, 30])
def test_cosines_and_distances_equal_loops(agents):
    rows = rows_of(agents)
    found = geometry(rows)
    np.testing.assert_allclose(found.embedding_distance, distances_of(rows), atol=1e-10)
    for i, k in itertools.product(range(agents), repeat=2):
        cosine = rows[i] @ rows[k] / math.sqrt(rows[i] @ rows[i]) / math.sqrt(rows[k] @ rows[k])
        np.testing.assert_allclose(found.embedding_cosine[i, k], cosine, atol=1e-10)


def test_identical_opposite_and_orthogonal_agents():
    rows = np.array([[3.0, 4.0], [3.0, 4.0], [-6.0, -8.0], [-4.0, 3.0]])
    found = geometry(rows)
    np.testing.assert_allclose(found.embedding_cosine[0], [1, 1, -1, 0], atol=1e-15)
    np.testing.assert_allclose(found.embedding_distance[0], [0, 0, 15, math.sqrt(50)], atol=1e-12)


def test_identical_rows_have_no_rank():
    found = geometry(np.tile([0.1, 0.2, 0.3], (5, 1)), groups=[0, 0, 1, 1, 1])
    np.testing.assert_allclose(found.embedding_cosine, 1, atol=1e-15)
    assert (found.embedding_distance == 0).all()
    for name in ("effective_rank", "participation_ratio"):
        assert np.isnan(found[name])
        assert "identical" in found[name].estimator
    assert found.rank_ceiling == 3
    assert found.within_distance == found.between_distance == 0
    assert found.group_p_value == 1


def test_a_row_of_zeros_has_no_cosine():
    rows = rows_of(3)
    rows[1] = 0
    found = geometry(rows)
    expected = [[False, True, False], [True, True, True], [False, True, False]]
    np.testing.assert_array_equal(np.isnan(found.embedding_cosine), expected)
    np.testing.assert_allclose(found.embedding_distance[1, 0], np.linalg.norm(rows[0]))


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_very_small_and_large_rows_keep_their_geometry(size):
    rows, groups, matrix = rows_of(5), list("aabbb"), symmetric(5)
    one = geometry(rows, groups=groups, behavioural_distance=matrix)
    other = geometry(rows * size, groups=groups, behavioural_distance=matrix * size)
    for name in one:
        scale = size if one[name].unit == "embedding" else 1
        np.testing.assert_allclose(other[name], one[name] * scale, rtol=1e-10)


@pytest.mark.parametrize(("agents", "features"), [(2, 4), (3, 4), (6, 4), (30, 4), (30, 40)])
def test_ranks_equal_those_of_the_covariance(agents, features):
    rows = rows_of(agents, features) * np.linspace(0.5, 2, features) + 3
    covariance = np.atleast_2d(np.cov(rows, rowvar=False))
    eigenvalues = np.linalg.eigvalsh(covariance).clip(min=0)
    share = [value / eigenvalues.sum() for value in eigenvalues if value > 0]
    entropy = -math.fsum(p * math.log(p) for p in share)
    found = geometry(rows)
    np.testing.assert_allclose(found.effective_rank, math.exp(entropy), atol=1e-10)
    ratio = np.trace(covariance) ** 2 / np.trace(covariance @ covariance)
    np.testing.assert_allclose(found.participation_ratio, ratio, atol=1e-10)
    assert found.rank_ceiling == min(agents - 1, features)


def test_ranks_of_known_arrangements():
    simplex = geometry(np.eye(5))  # as many dimensions as five agents can show
    line = geometry(np.outer([1.0, 2.0, 4.0], [1.0, -1.0, 2.0]))
    cross = geometry(np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]) * 1.0)
    for found, rank in ((simplex, 4), (line, 1), (cross, 2)):
        np.testing.assert_allclose(found.effective_rank, rank, atol=1e-10)
        np.testing.assert_allclose(found.participation_ratio, rank, atol=1e-10)
    # variances 3 and 1
    rows = np.array([[math.sqrt(3), 0], [-math.sqrt(3), 0], [0, 1], [0, -1]])
    found = geometry(rows)
    np.testing.assert_allclose(found.participation_ratio, 16 / 10, atol=1e-10)
    np.testing.assert_allclose(found.effective_rank, 4 / 3**0.75, atol=1e-10)


def test_a_single_agent():
    found = geometry(
        np.array([[1.0, 2.0]]),
        groups=["only"],
        behavioural_distance=np.zeros((1, 1)),
        interference=np.ones((1, 1)),
    )
    assert found.embedding_cosine.values.round(12).tolist() == [[1.0]]
    assert found.embedding_distance.values.tolist() == [[0.0]]
    assert found.rank_ceiling == 0
    assert found.mantel_agents.values.tolist() == [0, 0]
    for name in SCALARS[:-1]:
        assert np.isnan(found[name]), name
    assert "single agent" in found.effective_rank.estimator
    assert np.isnan(found.mantel).all()


def test_two_agents_have_no_correlation():
    found = geometry(rows_of(2), groups=["a", "b"], interference=symmetric(2))
    assert np.isnan(found.mantel).all()
    assert np.isnan(found.mantel_p_value).all()
    assert found.between_distance == found.embedding_distance[0, 1]
    assert np.isnan(found.within_distance)
    assert np.isnan(found.group_p_value)
    assert "no such pair" in found.group_p_value.estimator


@pytest.mark.parametrize(
    "groups", ["aab", "aabb", "abcab", "aaabbb", "aabbccd", "abbbbbbb", "aaabbbcc"]
)
def test_groups_equal_all_permutations_of_their_labels(groups):
    rows = rows_of(len(groups))
    distances = distances_of(rows)
    found = geometry(rows, groups=list(groups))
    within, between = within_and_between(distances, groups)
    np.testing.assert_allclose(found.within_distance, within, atol=1e-10)
    np.testing.assert_allclose(found.between_distance, between, atol=1e-10)
    np.testing.assert_allclose(found.group_difference, between - within, atol=1e-10)
    differences = []
    for order in set(itertools.permutations(groups)):
        own, other = within_and_between(distances, order)
        differences.append(other - own)
    expected = share_as_extreme(differences, between - within)
    np.testing.assert_allclose(found.group_p_value, expected, atol=1e-10)
    assert f"all {len(differences)} arrangements" in found.group_p_value.estimator


def test_groups_that_lie_apart():
    rows = rows_of(8) / 10
    rows[::2] += 10
    found = geometry(rows, groups=["left", "right"] * 4)
    assert found.group_difference > 15
    # of 70 ways to part eight agents into two fours, this one and its mirror are as extreme
    np.testing.assert_allclose(found.group_p_value, 2 / 70)


def test_groups_without_a_pair_within_or_between():
    rows = rows_of(4)
    everyone, no_one = geometry(rows, groups=[7, 7, 7, 7]), geometry(rows, groups=range(4))
    assert np.isnan(everyone.between_distance)
    assert np.isnan(no_one.within_distance)
    for found in (everyone, no_one):
        assert np.isnan(found.group_difference)
        assert np.isnan(found.group_p_value)
    mean = np.mean(pairs_of(distances_of(rows)))
    np.testing.assert_allclose(everyone.within_distance, mean)
    np.testing.assert_allclose(no_one.between_distance, mean)


def test_without_groups_or_matrices_there_is_nothing_to_say():
    found = geometry(rows_of(4))
    for name in SCALARS[:4]:
        assert np.isnan(found[name])
        assert "no groups" in found[name].estimator
    assert np.isnan(found.mantel).all()
    assert np.isnan(found.mantel_agents).all()
    assert "interference: not given" in found.mantel_p_value.estimator


def test_groups_may_be_arrays():
    rows, labels = rows_of(5), [0, 1, 0, 1, 1]
    for groups in (np.array(labels), torch.tensor(labels), tuple(labels)):
        xr.testing.assert_identical(geometry(rows, groups=groups), geometry(rows, groups=labels))


@pytest.mark.parametrize("agents", [3, 4, 6])
def test_mantel_equals_all_permutations_of_the_agents(agents):
    rows, behaviour, cosines = rows_of(agents), symmetric(agents), symmetric(agents, seed=2)
    cosines[0, 1] = cosines[1, 0] = cosines[0, 2] = cosines[2, 0]  # a tie
    found = geometry(rows, behavioural_distance=behaviour, interference=cosines)
    for name, matrix in (("behavioural_distance", behaviour), ("interference", cosines)):
        for correlation, correlate in CORRELATE.items():
            place = {"compared_with": name, "correlation": correlation}
            value, p_value = mantel_of(distances_of(rows), matrix, correlate)
            np.testing.assert_allclose(found.mantel.sel(place), value, atol=1e-10)
            np.testing.assert_allclose(found.mantel_p_value.sel(place), p_value, atol=1e-10)
    assert found.mantel_agents.values.tolist() == [agents, agents]


def test_mantel_of_matrices_that_say_the_same():
    rows = rows_of(6)
    distances = distances_of(rows)
    found = geometry(rows, behavioural_distance=2 * distances + 1, interference=-(distances**3))
    np.testing.assert_allclose(found.mantel.sel(correlation="spearman"), [1, -1], atol=1e-10)
    np.testing.assert_allclose(
        found.mantel.sel(correlation="pearson", compared_with="behavioural_distance"), 1
    )
    np.testing.assert_allclose(found.mantel_p_value.sel(correlation="spearman"), 1 / 720)


def test_random_permutations_agree_with_all_of_them():
    rows, groups, matrix = rows_of(7), list("aaabbcc"), symmetric(7)
    settings = {"groups": groups, "interference": matrix}
    exact = geometry(rows, **settings)
    # 210 arrangements of the groups, 5040 of the agents
    drawn = geometry(rows, **settings, permutations=200, seed=3)
    assert "200 random arrangements, seed 3" in drawn.group_p_value.estimator
    found = [
        (exact.group_p_value, drawn.group_p_value),
        *(
            tuple(
                d.mantel_p_value.sel(compared_with="interference", correlation=c)
                for d in (exact, drawn)
            )
            for c in CORRELATE
        ),
    ]
    for p, estimate in found:
        assert abs(p - estimate) < 4 * math.sqrt(p * (1 - p) / 200) + 1 / 200
    xr.testing.assert_identical(drawn, geometry(rows, **settings, permutations=200, seed=3))
    assert not drawn.identical(geometry(rows, **settings, permutations=200, seed=4))


def test_a_p_value_from_random_permutations_is_never_zero():
    rows = rows_of(12)
    found = geometry(rows, behavioural_distance=distances_of(rows), permutations=99)
    np.testing.assert_allclose(found.mantel_p_value[0], 1 / 100)


def test_p_values_of_noise_are_small_as_rarely_as_they_say():
    found = [
        geometry(
            rows_of(6, seed=seed),
            groups=list("aabbcc"),
            interference=symmetric(6, seed=1000 + seed),
            permutations=99,
            seed=seed,
        )
        for seed in range(300)
    ]
    for name in ("group_p_value", "mantel_p_value"):
        p = np.array([np.nanmax(one[name].values) for one in found])
        assert np.mean(p <= 0.2) < 0.2 + 4 * math.sqrt(0.16 / 300)
    pearson = np.array([float(one.mantel_p_value[1, 0]) for one in found])
    assert np.mean(pearson <= 0.2) > 0.2 - 4 * math.sqrt(0.16 / 300)


def test_agents_without_a_value_are_left_out_of_mantel():
    rows, cosines = rows_of(6), symmetric(6)
    cosines[2] = cosines[:, 2] = np.nan  # a zero gradient
    kept = [0, 1, 3, 4, 5]
    found = geometry(rows, interference=cosines)
    expected = geometry(rows[kept], interference=cosines[np.ix_(kept, kept)])
    assert found.mantel_agents.sel(compared_with="interference") == 5
    xr.testing.assert_identical(found.mantel, expected.mantel)
    xr.testing.assert_identical(found.mantel_p_value, expected.mantel_p_value)
    cosines[0, 1] = cosines[1, 0] = np.nan  # and a pair that is not known
    assert np.isnan(geometry(rows, interference=cosines).mantel).all()


def test_mantel_does_not_read_the_diagonal():
    rows, cosines = rows_of(5), symmetric(5)
    other = cosines.copy()
    np.fill_diagonal(other, np.nan)
    xr.testing.assert_identical(
        geometry(rows, interference=cosines), geometry(rows, interference=other)
    )


def test_constant_distances_have_no_correlation():
    equidistant = np.eye(5) + np.float32(1e-8) * rows_of(5, 5)
    found = geometry(equidistant, interference=symmetric(5))
    assert np.isnan(found.mantel).all()
    found = geometry(rows_of(5), interference=np.ones((5, 5)))
    assert np.isnan(found.mantel).all()
    assert "interference: not defined" in found.mantel_p_value.estimator


@given(seed=st.integers(0, 1000), agents=st.integers(3, 6))
def test_agents_may_come_in_any_order(seed, agents):
    rows, matrix = rows_of(agents, seed=seed), symmetric(agents, seed)
    groups = np.arange(agents) // 2
    order = np.random.default_rng(seed).permutation(agents)
    one = geometry(rows, groups=groups, interference=matrix)
    other = geometry(rows[order], groups=groups[order], interference=matrix[np.ix_(order, order)])
    for name in ("embedding_cosine", "embedding_distance"):
        moved = one[name].values[np.ix_(order, order)]
        np.testing.assert_allclose(other[name], moved, atol=1e-10)
    for name in [*SCALARS, "mantel", "mantel_p_value"]:
        np.testing.assert_allclose(other[name], one[name], atol=1e-10, err_msg=name)


def test_turning_and_shifting_rows_changes_no_distance_or_rank():
    rows, matrix = rows_of(6), symmetric(6)
    turn, _ = np.linalg.qr(rows_of(4, 4, seed=5))
    settings = {"groups": list("aabbcc"), "behavioural_distance": matrix}
    one, other = geometry(rows, **settings), geometry(rows @ turn + 2, **settings)
    for name in ["embedding_distance", *SCALARS, "mantel", "mantel_p_value"]:
        np.testing.assert_allclose(other[name], one[name], atol=1e-10, err_msg=name)


def test_torch_and_labelled_arrays_are_taken():
    rows, matrix = rows_of(4), symmetric(4)
    expected = geometry(rows, interference=matrix)
    tensors = geometry(
        torch.from_numpy(rows).requires_grad_(), interference=torch.from_numpy(matrix)
    )
    labelled = geometry(
        xr.DataArray(rows, dims=("agent", "feature")),
        interference=xr.DataArray(matrix, dims=("agent", "agent_other")),
    )
    xr.testing.assert_identical(tensors, expected)
    xr.testing.assert_identical(labelled, expected)


def test_every_quantity_has_a_unit_and_an_estimator():
    for variable in geometry(rows_of(4)).values():
        assert variable.unit, variable.name
        assert variable.estimator, variable.name


def test_wrong_input_is_named():
    rows = rows_of(4)
    wrong, lopsided = rows.copy(), symmetric(4)
    wrong[2, 1] = np.nan
    lopsided[0, 3] += 1
    for arguments, message in (
        ((wrong,), "`rows` must be finite. Got nan at agent 2, feature 1"),
        ((rows[0],), r"be that of \[agent, feature\]"),
        ((rows[:0],), "no axis empty"),
        ((rows, {"groups": ["a", "b"]}), "`groups` must label each of 4 agents"),
        ((rows, {"permutations": 0}), "`permutations` must be at least 1"),
        ((rows, {"interference": lopsided}), "`interference` must be symmetric.*agents 0, 3"),
        (
            (rows, {"behavioural_distance": symmetric(3)}),
            r"`behavioural_distance.shape` must be \(4, 4\)",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            geometry(arguments[0], **(arguments[1] if len(arguments) > 1 else {}))


def test_the_package_exports_it_without_loading_scikit_learn():
    assert gradlab.geometry is geometry
    code = (
        "import sys, gradlab; gradlab.geometry; gradlab.procrustes\n"
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
