import itertools
import math

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import t as student

import gradlab
from gradlab.checks import UsageError
from gradlab.estimates import FEWEST
from gradlab.metrics.diversity import diversity, shared_observations

AGENTS, OBSERVATIONS, ACTIONS = 4, 30, 5


def discrete(seed=0, agents=AGENTS, observations=OBSERVATIONS, actions=ACTIONS):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.dirichlet(np.full(actions, 0.5), size=(agents, observations)))


def gaussian(seed=0, agents=AGENTS, observations=OBSERVATIONS, dims=3):
    rng = np.random.default_rng(seed)
    shape = (agents, observations, dims)
    return torch.from_numpy(rng.normal(size=shape)), torch.from_numpy(rng.uniform(0.1, 2, shape))


def copies(count, observations=OBSERVATIONS):
    """Labels of copies that have unequally many observations, not in order."""
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.arange(count), rng.integers(count, size=observations - count)])
    return torch.from_numpy(rng.permutation(labels) * 3 + 2)


def matrix(distance, *parameters):
    """Means over observations of a distance between single distributions, in loops."""
    agents, observations = parameters[0].shape[:2]
    found = np.zeros((agents, agents))
    for i, k in itertools.permutations(range(agents), 2):
        values = []
        for o in range(observations):
            one = [p[i, o].tolist() for p in parameters]
            other = [p[k, o].tolist() for p in parameters]
            values.append(distance(one, other))
        found[i, k] = math.fsum(values) / observations
    return found


def wasserstein(one, other):
    (mean, std), (mean_other, std_other) = one, other
    pairs = [*zip(mean, mean_other, strict=True), *zip(std, std_other, strict=True)]
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in pairs))


def hellinger(one, other):
    coefficient = 1.0
    for m, s, mo, so in zip(*one, *other, strict=True):
        width = s**2 + so**2
        coefficient *= math.sqrt(2 * s * so / width) * math.exp(-((m - mo) ** 2) / width / 4)
    return math.sqrt(1 - coefficient)


def mean_over_pairs(distances):
    pairs = list(itertools.combinations(range(len(distances)), 2))
    return sum(distances[i, k] for i, k in pairs) / len(pairs)


def test_jensen_shannon_equals_scipy_over_actions():
    p = discrete()
    found = diversity(probabilities=p)
    expected = matrix(lambda a, b: float(jensenshannon(a[0], b[0], base=2)), p)
    np.testing.assert_allclose(found.behavioural_distance, expected, atol=1e-10)
    every = jensenshannon(p[:, None].numpy(), p[None].numpy(), axis=-1, base=2)
    np.testing.assert_allclose(found.behavioural_distance, every.mean(-1), atol=1e-10)
    np.testing.assert_allclose(found.snd, mean_over_pairs(expected), atol=1e-10)


def test_wasserstein_and_hellinger_equal_their_formulas_in_loops():
    mean, std = gaussian()
    for name, oracle, unit in (
        ("wasserstein", wasserstein, "action"),
        ("hellinger", hellinger, "1"),
    ):
        found = diversity(mean=mean, std=std, distance=name)
        expected = matrix(oracle, mean, std)
        np.testing.assert_allclose(found.behavioural_distance, expected, atol=1e-10)
        np.testing.assert_allclose(found.snd, mean_over_pairs(expected), atol=1e-10)
        assert {variable.unit for variable in found.values()} == {unit}
    xr.testing.assert_identical(
        diversity(mean=mean, std=std), diversity(mean=mean, std=std, distance="wasserstein")
    )


def test_hellinger_equals_the_integral_of_its_definition():
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in ([0.3, 1.5], [0.4, 1.1])
    )
    x = np.linspace(-15, 15, 200_001)
    one, other = (
        np.exp(-((x - float(m)) ** 2) / (2 * float(s) ** 2)) / float(s) / math.sqrt(2 * math.pi)
        for m, s in zip(mean, std, strict=True)
    )
    overlap = np.trapezoid(np.sqrt(one * other), x)
    found = diversity(mean=mean, std=std, distance="hellinger")
    np.testing.assert_allclose(found.snd, math.sqrt(1 - overlap), atol=1e-10)


def test_logits_mean_the_same_as_their_probabilities():
    p = discrete()
    shift = torch.linspace(-500, 500, OBSERVATIONS).double()[None, :, None]
    xr.testing.assert_allclose(
        diversity(logits=p.log() + shift), diversity(probabilities=p), rtol=0, atol=1e-10
    )
    masked = torch.tensor([[[0.0, 0.0, -math.inf]], [[-math.inf, 0.0, 0.0]]])
    expected = jensenshannon([0.5, 0.5, 0], [0, 0.5, 0.5], base=2)
    np.testing.assert_allclose(diversity(logits=masked).snd, expected, atol=1e-10)


def test_equal_policies_have_no_diversity():
    p, (mean, std) = discrete(agents=1), gaussian(agents=1)
    three = [array.repeat(3, 1, 1) for array in (p, mean, std)]
    for found in (
        diversity(probabilities=three[0], copy=copies(10)),
        diversity(mean=three[1], std=three[2], copy=copies(10)),
        diversity(mean=three[1], std=three[2], copy=copies(10), distance="hellinger"),
    ):
        for variable in found.values():
            assert (variable == 0).all(), variable.name


@pytest.mark.parametrize("difference", [1e-3, 1e-7, 1e-12])
def test_nearly_equal_policies_keep_their_digits(difference):
    # to second order, the divergence of p and p + delta is sum delta^2 / (8 p ln 2)
    p = torch.tensor([0.5, 0.5]).double()
    q = p + torch.tensor([difference, -difference]).double()
    exact = float(q[0] - p[0])
    found = diversity(probabilities=torch.stack([p, q])[:, None])
    expected = exact * math.sqrt(0.5 / math.log(2))
    np.testing.assert_allclose(found.snd, expected, rtol=difference**2 + 1e-12)
    # that of Hellinger, for means of Gaussians of unit width, is difference / sqrt(8)
    mean = torch.tensor([0.0, difference], dtype=torch.float64)[:, None, None]
    found = diversity(mean=mean, std=torch.ones_like(mean), distance="hellinger")
    np.testing.assert_allclose(found.snd, difference / math.sqrt(8), rtol=difference**2 + 1e-12)


def test_deterministic_policies_that_never_agree_are_at_distance_one():
    certain = torch.eye(4).double()[:, None].repeat(1, OBSERVATIONS, 1)
    found = diversity(probabilities=certain, copy=copies(9))
    for name in ("snd", "snd_low", "snd_high"):
        assert found[name] == 1
    np.testing.assert_array_equal(found.behavioural_distance, 1 - np.eye(4))


def test_distance_grows_with_the_share_of_observations_that_tell_agents_apart():
    certain = torch.eye(2).double()
    one = certain[torch.zeros(8, dtype=torch.int64)]
    other = certain[torch.tensor([1, 0, 0, 0, 1, 0, 0, 0])]
    assert diversity(probabilities=torch.stack([one, other])).snd == 0.25


def test_an_almost_impossible_action_counts_as_impossible():
    p = torch.tensor([[[1.0, 0.0]], [[1e-16, 1 - 1e-16]]], dtype=torch.float64)
    np.testing.assert_allclose(diversity(probabilities=p).snd, 1, atol=1e-14)


def test_unit_gaussians_at_a_distance_are_that_far_apart():
    mean = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).double()[:, None]
    found = diversity(mean=mean, std=torch.ones_like(mean))
    assert found.snd == 5
    assert found.snd.unit == "action"


def test_deterministic_gaussians():
    mean = torch.tensor([0.0, 0.0, 2.0]).double()[:, None, None]
    std = torch.zeros_like(mean)
    expected = np.array([[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    found = diversity(mean=mean, std=std)
    np.testing.assert_array_equal(found.behavioural_distance, 2 * expected)
    found = diversity(mean=mean, std=std, distance="hellinger")
    np.testing.assert_array_equal(found.behavioural_distance, expected)
    std[0] = 1.0  # a density shares nothing with a point
    found = diversity(mean=mean, std=std, distance="hellinger")
    np.testing.assert_array_equal(found.behavioural_distance, 1 - np.eye(3))


def jackknife(values, labels):
    """Ends of a 95 % interval of a mean, leaving out one label at a time."""
    kinds = sorted(set(labels.tolist()))
    without = [
        math.fsum(v for v, own in zip(values, labels, strict=True) if own != kind)
        / sum(own != kind for own in labels.tolist())
        for kind in kinds
    ]
    centre = math.fsum(without) / len(kinds)
    square = math.fsum((w - centre) ** 2 for w in without)
    error = math.sqrt((len(kinds) - 1) / len(kinds) * square)
    reach = student.ppf(0.975, len(kinds) - 1) * error
    return np.mean(values) - reach, np.mean(values) + reach


def test_intervals_equal_a_jackknife_in_loops():
    mean, std = gaussian()
    labels = copies(FEWEST)
    found = diversity(mean=mean, std=std, copy=labels)
    of_pairs = {
        (i, k): [
            wasserstein([mean[i, o], std[i, o]], [mean[k, o], std[k, o]])
            for o in range(OBSERVATIONS)
        ]
        for i, k in itertools.combinations(range(AGENTS), 2)
    }
    for (i, k), values in of_pairs.items():
        low, high = jackknife(values, labels)
        for pair in ({"agent": i, "agent_other": k}, {"agent": k, "agent_other": i}):
            np.testing.assert_allclose(found.behavioural_distance_low.sel(pair), low, atol=1e-10)
            np.testing.assert_allclose(found.behavioural_distance_high.sel(pair), high, atol=1e-10)
    low, high = jackknife(np.mean(list(of_pairs.values()), axis=0), labels)
    np.testing.assert_allclose([found.snd_low, found.snd_high], [low, high], atol=1e-10)
    assert low > 0
    assert f"{FEWEST} copies" in found.snd_low.estimator


def test_intervals_stay_within_the_distance_s_range():
    certain = torch.eye(2).double()
    rare = torch.zeros(10, dtype=torch.int64)
    rare[0] = 1
    one = certain[torch.zeros_like(rare)]
    for other, end, limit in ((rare, "snd_low", 0), (1 - rare, "snd_high", 1)):
        policies = torch.stack([one, certain[other]])
        found = diversity(probabilities=policies, copy=torch.arange(10))
        low, high = jackknife(other.double().tolist(), torch.arange(10))
        assert low < 0 or high > 1
        assert found[end] == limit


def test_intervals_cover_the_truth_and_repeated_observations_do_not_narrow_them():
    # d_ik at an observation is the copy's own level plus noise; its expectation is 5
    rng = np.random.default_rng(0)
    covered, runs, per_copy = 0, 400, 6
    labels = torch.arange(12).repeat_interleave(per_copy)
    for _ in range(runs):
        gap = 5 + rng.normal(size=12).repeat(per_copy) + 0.1 * rng.normal(size=len(labels))
        mean = torch.from_numpy(np.stack([np.zeros_like(gap), gap]))[..., None]
        found = diversity(mean=mean, std=torch.ones_like(mean), copy=labels)
        covered += bool(found.snd_low <= 5 <= found.snd_high)
    assert abs(covered / runs - 0.95) < 4 * math.sqrt(0.95 * 0.05 / runs)
    twice = diversity(
        mean=mean.repeat(1, 2, 1), std=torch.ones_like(mean).repeat(1, 2, 1), copy=labels.repeat(2)
    )
    np.testing.assert_allclose(twice.snd_low, found.snd_low, rtol=1e-10)


def test_too_few_copies_give_no_interval_and_say_so():
    p = discrete()
    for found, reason in (
        (diversity(probabilities=p, copy=copies(FEWEST - 1)), "at least 8 copies, got 7"),
        (diversity(probabilities=p), "`copy`"),
    ):
        for name in ("behavioural_distance", "snd"):
            assert np.isfinite(found[name]).all()
            for end in ("low", "high"):
                assert np.isnan(found[f"{name}_{end}"]).all()
                assert reason in found[f"{name}_{end}"].estimator
    assert np.isfinite(diversity(probabilities=p, copy=copies(FEWEST)).snd_low)


def test_one_agent_has_no_diversity_to_measure():
    found = diversity(probabilities=discrete(agents=1), copy=copies(10))
    assert found.behavioural_distance.values.tolist() == [[0.0]]
    for name in ("snd", "snd_low", "snd_high"):
        assert np.isnan(found[name])
        assert "one agent has no pair" in found[name].estimator


@given(seed=st.integers(0, 1000), agents=st.integers(2, 5))
def test_agents_may_come_in_any_order_and_obey_the_triangle_inequality(seed, agents):
    p = discrete(seed, agents=agents)
    order = np.random.default_rng(seed).permutation(agents)
    one, other = diversity(probabilities=p), diversity(probabilities=p[order])
    distances = one.behavioural_distance.values
    np.testing.assert_allclose(
        distances[np.ix_(order, order)], other.behavioural_distance, atol=1e-12
    )
    np.testing.assert_allclose(one.snd, other.snd, atol=1e-12)
    assert (distances == distances.T).all()
    for i, k, middle in itertools.product(range(agents), repeat=3):
        assert distances[i, k] <= distances[i, middle] + distances[middle, k] + 1e-12


def test_numpy_and_float32_are_taken():
    p = discrete()
    xr.testing.assert_identical(diversity(probabilities=p), diversity(probabilities=p.numpy()))
    xr.testing.assert_allclose(
        diversity(probabilities=p), diversity(probabilities=p.float()), rtol=1e-4
    )


def test_probabilities_rounded_to_few_bits_are_made_to_sum_to_one():
    p = discrete()
    scale = torch.linspace(0.995, 1.005, AGENTS).double()[:, None, None]
    xr.testing.assert_allclose(
        diversity(probabilities=p * scale), diversity(probabilities=p), rtol=1e-10
    )


def test_policies_must_be_given_in_one_way():
    p, (mean, std) = discrete(), gaussian()
    for policies in ({}, {"probabilities": p, "logits": p}, {"mean": mean}, {"std": std}):
        with pytest.raises(UsageError, match=r"Got (none|.*logits|mean|std)\.$"):
            diversity(**policies)


def test_what_is_no_distribution_is_named():
    p, (mean, std) = discrete(), gaussian()

    def changed(array, value):
        array = array.clone()
        array[1, 2, 0] = value
        return array

    for policies, message in (
        ({"probabilities": changed(p, math.nan)}, "Got nan at agent 1, observation 2, action 0"),
        ({"probabilities": changed(p, -0.1)}, "or are they logits.*-0.1"),
        ({"probabilities": changed(p, 2.0)}, r"sum to 1 .*agent 1, observation 2\)"),
        ({"logits": changed(p, math.nan)}, "nan at agent 1, observation 2"),
        ({"logits": changed(p, math.inf)}, "inf at agent 1, observation 2"),
        ({"logits": p * -math.inf}, "-inf at agent 0, observation 0"),
        ({"mean": changed(mean, math.inf), "std": std}, "`mean`.*inf at agent 1"),
        ({"mean": mean, "std": changed(std, -1.0)}, "`std` must be at least 0. Got std=-1.0"),
        ({"mean": mean, "std": std[..., :1]}, "shape of the mean, .*expand_as"),
        ({"probabilities": p[0]}, r"be that of \[agent, observation, action\]"),
        ({"probabilities": p[:, :0]}, "no axis empty"),
        ({"probabilities": p, "copy": torch.arange(3)}, "label each of 30 observations"),
    ):
        with pytest.raises(UsageError, match=message):
            diversity(**policies)


def test_a_distance_that_does_not_suit_the_policies_is_named():
    with pytest.raises(UsageError, match=r"'wasserstein'.*Known: jensen-shannon"):
        diversity(probabilities=discrete(), distance="wasserstein")
    mean, std = gaussian()
    with pytest.raises(UsageError, match=r"'jensen-shannon'.*Known: wasserstein, hellinger"):
        diversity(mean=mean, std=std, distance="jensen-shannon")


def marked_observations(agents, samples):
    """Observations that say whose they are, and of which sample."""
    agent, sample = torch.meshgrid(torch.arange(agents), torch.arange(samples), indexing="ij")
    return torch.stack([agent, sample], dim=-1).float()


def test_shared_observations_are_drawn_once_each_with_their_copies():
    observation, copy = marked_observations(3, 20), torch.arange(20) % 5 + 7
    drawn, label = shared_observations(observation, 24, torch.Generator().manual_seed(0), copy=copy)
    assert drawn.shape == (24, 2)
    assert len(drawn.unique(dim=0)) == 24
    assert torch.equal(label, copy[drawn[:, 1].long()])
    assert set(drawn[:, 0].tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("most", [60, 1000])
def test_all_observations_are_shared_where_there_are_no_more(most):
    observation, copy = marked_observations(3, 20), torch.arange(20)
    drawn, label = shared_observations(observation, most, torch.Generator(), copy=copy)
    assert torch.equal(drawn, observation.flatten(0, 1))
    assert torch.equal(label, copy.repeat(3))


def test_every_observation_is_as_likely_to_be_shared():
    observation, random = marked_observations(2, 5), torch.Generator().manual_seed(0)
    counts, draws = torch.zeros(2, 5), 2000
    for _ in range(draws):
        drawn, _ = shared_observations(observation, 3, random, copy=torch.arange(5))
        counts[drawn[:, 0].long(), drawn[:, 1].long()] += 1
    assert ((counts / draws - 0.3).abs() < 5 * math.sqrt(0.3 * 0.7 / draws)).all()


def test_shared_observations_come_from_their_own_random_source():
    observation, copy = marked_observations(3, 20), torch.arange(20)
    state = torch.random.get_rng_state()
    first, second, other = (
        shared_observations(observation, 9, torch.Generator().manual_seed(seed), copy=copy)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_at_least_one_observation_is_shared():
    observation = marked_observations(2, 5)
    with pytest.raises(UsageError, match=r"`most` must be at least 1. Got most=0"):
        shared_observations(observation, 0, torch.Generator(), copy=torch.arange(5))


def test_the_package_exports_them():
    assert gradlab.diversity is diversity
    assert gradlab.shared_observations is shared_observations
