"""Debiased estimates against loops over pairs of clusters, and against known truths."""

import numpy as np
import pytest
from scipy import stats
from synthetic import draw, fast_products, mean_gradients, products_of

from gradlab.estimates import Estimates
from gradlab.verdicts import ALIGNED, CONFLICT, UNDECIDED


def estimates_of(products):
    return Estimates({"theta": products})


def slow_inner_product(sums, count, i, k, without=()):
    products, pairs = 0.0, 0
    clusters = [e for e in range(sums.shape[1]) if e not in without]
    for e in clusters:
        for f in clusters:
            if e != f:
                products += sums[i, e] @ sums[k, f]
                pairs += count[i, e] * count[k, f]
    return products / pairs


def slow_variance(sums, count, i, k):
    """The jackknife's variance, less what it has too much of the kernel's, as the docs say."""
    n = sums.shape[1]
    left_out = np.array([slow_inner_product(sums, count, i, k, (e,)) for e in range(n)])
    jackknife = (n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()
    pairs = count[i].sum() * count[k].sum() - (count[i] * count[k]).sum()
    kernel = [
        (sums[i, e] @ sums[k, e + 1] + sums[i, e + 1] @ sums[k, e]) / 2 * n * (n - 1) / pairs
        for e in range(n - 1)
    ]
    corrected = ((n - 2) ** 2 * jackknife - 2 * np.var(kernel, ddof=1)) / ((n - 1) * (n - 4))
    return max(corrected, jackknife / 2)


@pytest.fixture
def unequal():
    random = np.random.default_rng(3)
    count = random.integers(1, 5, (3, 11))
    sums = draw(random, mean_gradients(3, -0.3, 6), 11, 0.7, shared=0.3) * count[..., None]
    return sums, count


def test_estimates_equal_loops(unequal):
    sums, count = unequal
    found = estimates_of(products_of(sums, count))
    quantile = stats.t.ppf(0.975, 10)
    interval = found.inner_product_interval
    for i in range(3):
        for k in range(3):
            value = slow_inner_product(sums, count, i, k)
            error = slow_variance(sums, count, i, k) ** 0.5
            for layer in (0, 1):  # the whole is the only layer
                assert found.inner_product[layer, i, k] == pytest.approx(value, rel=1e-10)
                assert found.inner_product_error[layer, i, k] == pytest.approx(error, rel=1e-9)
                assert interval.high[layer, i, k] == pytest.approx(value + quantile * error)
                p = 2 * stats.t.sf(abs(value) / error, 10)
                assert found.p_value[layer, i, k] == pytest.approx(p, rel=1e-8)


def test_noise_is_the_clusters_spread(unequal):
    sums, count = unequal
    found = estimates_of(products_of(sums, count)).noise[0]
    for i in range(3):
        mean = sums[i].sum(0) / count[i].sum()
        residuals = sums[i] - count[i][:, None] * mean
        expected = 11 / 10 * (residuals**2).sum() / count[i].sum() ** 2
        assert found[i] == pytest.approx(expected, rel=1e-10)


def test_equal_clusters_give_the_two_size_noise_scale():
    """McCandlish et al. (2018), appendix A.1, with one cluster as the small batch."""
    sums = draw(np.random.default_rng(0), mean_gradients(2, 0.2, 8), 16, 1.0)
    found = estimates_of(products_of(sums))
    small = (sums**2).sum(2).mean(1)
    big = (sums.mean(1) ** 2).sum(1)
    signal = (16 * big - small) / 15
    noise = (small - big) / (1 - 1 / 16)
    np.testing.assert_allclose(found.signal[0], signal, rtol=1e-10)
    np.testing.assert_allclose(found.noise[0] * 16, noise, rtol=1e-10)


def test_agents_of_one_copy_share_noise_and_the_plug_in_cosine_has_the_wrong_sign():
    random, means = np.random.default_rng(0), mean_gradients(2, -0.3, 500)
    plug_in, debiased = [], []
    for _ in range(200):
        sums = draw(random, means, 32, 0.02, shared=0.3)
        a, b = sums.mean(1)
        plug_in.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        debiased.append(estimates_of(fast_products(sums)).inner_product[0, 0, 1])
    assert np.mean(plug_in) > 0.03
    error = np.std(debiased) / 200**0.5
    assert np.mean(debiased) == pytest.approx(-0.3, abs=3 * error)
    assert error < 0.02


def test_a_cosines_interval_holds_the_values_that_are_not_refuted():
    sums = draw(np.random.default_rng(1), mean_gradients(3, -0.4, 20), 24, 1.0)
    found = estimates_of(products_of(sums)).cosine_interval
    i, k = 0, 2
    three = (i, i, k), (k, i, k)
    whole = estimates_of(products_of(sums)).inner_product[0][three]
    left_out = np.array([
        estimates_of(products_of(np.delete(sums, e, 1))).inner_product[0][three] for e in range(24)
    ])
    chain = (sums[:, None, :-1] * sums[None, :, 1:]).sum(3)
    kernel = ((chain + chain.swapaxes(0, 1)) / 2)[three].T

    def variance(weights):
        """The jackknife's, of a combination of D_ik, D_ii and D_kk, and its correction."""
        left = left_out @ weights
        plain = 23 / 24 * ((left - left.mean()) ** 2).sum()
        corrected = (22**2 * plain - 2 * np.var(kernel @ weights, ddof=1)) / (23 * 20)
        return plain, max(0.5, corrected / plain)

    root = (whole[1] * whole[2]) ** 0.5
    unlike, factor = variance([0, 1 / whole[1], -1 / whole[2]])
    scale = root * (1 + unlike * factor / 8)
    assert found.value[0, i, k] == pytest.approx(whole[0] / scale, rel=1e-10)

    def t(cosine):
        """The statistic of D_ik - c sqrt(D_ii D_kk), linear at the estimates."""

        def weights(c):
            return np.array([1.0, -c * root / whole[1] / 2, -c * root / whole[2] / 2])

        _, factor = variance(weights(found.value[0, i, k]))
        return (whole[0] - cosine * scale) / (variance(weights(cosine))[0] * factor) ** 0.5

    limit = stats.t.ppf(0.975, 23)
    assert t(found.low[0, i, k]) == pytest.approx(limit, rel=1e-6)
    assert t(found.high[0, i, k]) == pytest.approx(-limit, rel=1e-6)
    assert found.low[0, i, k] < found.value[0, i, k] < found.high[0, i, k]


def test_lengths_that_fluctuate_apart_do_not_make_a_cosine_too_large():
    """As the root of the product of their estimates is too small on average."""
    random, means = np.random.default_rng(0), mean_gradients(2, 0.9, 3)
    values, naive = [], []
    for _ in range(800):
        found = estimates_of(fast_products(draw(random, means, 64, 0.3)))
        values.append(found.cosine_interval.value[0, 0, 1])
        naive.append(found.inner_product[0, 0, 1] / np.prod(found.signal[0]) ** 0.5)
    error = np.std(naive) / len(naive) ** 0.5
    assert np.mean(naive) > 0.9 + 4 * error
    assert np.nanmean(values) == pytest.approx(0.9, abs=3 * error)


def test_identical_opposite_and_orthogonal_agents():
    random = np.random.default_rng(0)
    mean, noise = np.zeros(50), 0.02 * random.standard_normal((4, 32, 50))
    mean[0] = 1.0
    other = np.roll(mean, 1)
    sums = np.stack([mean, mean, -mean, other])[:, None] + noise
    found = estimates_of(products_of(sums))
    verdict, cosine = found.verdict[0], found.cosine_interval
    assert verdict[0, 1] == ALIGNED
    assert verdict[0, 2] == verdict[1, 2] == CONFLICT
    assert verdict[0, 3] == verdict[3, 0] == UNDECIDED
    assert np.isnan(verdict[0, 0])
    assert cosine.value[0, 0, 1] == pytest.approx(1, abs=1e-3)
    assert cosine.value[0, 0, 2] == pytest.approx(-1, abs=1e-3)
    assert abs(cosine.low[0, 0, 2] + 1) < 1e-6
    np.testing.assert_allclose(np.diagonal(cosine.value[0]), 1, rtol=1e-12)


def test_separate_parameters_are_undecided_by_structure():
    sums = draw(np.random.default_rng(0), np.eye(2), 16, 5.0)
    sums *= np.eye(2)[:, None]  # each agent has a coordinate of its own
    found = estimates_of(products_of(sums))
    assert found.inner_product[0, 0, 1] == 0
    assert found.p_value[0, 0, 1] == 1
    assert found.verdict[0, 0, 1] == UNDECIDED


def test_a_zero_gradient_has_no_cosine():
    sums = draw(np.random.default_rng(0), mean_gradients(2, 0.5, 4), 16, 5.0)
    sums[1] = 0
    found = estimates_of(products_of(sums))
    assert np.isnan(found.cosine_interval.value[0, 0, 1])
    assert found.cosine_interval.low[0, 0, 1] == -found.cosine_interval.high[0, 0, 1] == -1
    assert found.verdict[0, 0, 1] == UNDECIDED


@pytest.mark.parametrize("clusters", [1, 2, 7])
def test_too_few_clusters_have_no_interval(clusters):
    sums = draw(np.random.default_rng(0), mean_gradients(3, 0.5, 4), clusters, 5.0)
    found = estimates_of(products_of(sums))
    for values in (found.inner_product_error, found.verdict, found.cosine_interval.low):
        assert np.isnan(values[0, 0, 1])
    assert np.isnan(found.inner_product[0, 0, 1]) == (clusters == 1)


def test_an_absent_agent_is_unknown_and_the_others_as_without_it():
    random = np.random.default_rng(0)
    sums = draw(random, mean_gradients(3, -0.5, 4), 16, 5.0)
    count = np.ones((3, 16), int)
    sums[1], count[1] = 0, 0
    found = estimates_of(products_of(sums, count))
    alone = estimates_of(products_of(sums[[0, 2]], count[[0, 2]]))
    for name in ("inner_product", "inner_product_error", "verdict"):
        ours, theirs = getattr(found, name), getattr(alone, name)
        assert np.isnan(ours[0, 0, 1])
        assert ours[0, 0, 2] == theirs[0, 0, 1]


def test_an_agent_in_half_of_the_clusters_is_judged_on_those():
    sums = draw(np.random.default_rng(0), mean_gradients(2, -0.8, 4), 32, 5.0)
    count = np.ones((2, 32), int)
    sums[:, 16:], count[:, 16:] = 0, 0
    found = estimates_of(products_of(sums, count))
    half = estimates_of(products_of(sums[:, :16]))
    assert found.inner_product[0, 0, 1] == pytest.approx(half.inner_product[0, 0, 1], rel=1e-12)
    assert found.clusters[0, 1] == 16
    errors = found.inner_product_error[0, 0, 1], half.inner_product_error[0, 0, 1]
    assert errors[0] == pytest.approx(errors[1], rel=0.3)  # they differ in what estimates zeta_2


def test_copies_needed_are_those_at_which_a_pair_is_told_apart():
    random, means = np.random.default_rng(0), mean_gradients(2, -0.2, 100)
    many = estimates_of(fast_products(draw(random, means, 4000, 0.1)))
    needed = round(float(many.clusters_to_resolve(0.2)[0, 0, 1]))
    assert 16 < needed < 400
    told = [
        estimates_of(fast_products(draw(random, means, needed, 0.1))).verdict[0, 0, 1] == CONFLICT
        for _ in range(400)
    ]
    assert 0.7 < np.mean(told) < 0.9


COVERAGE = [  # clusters, snr, cosine, shared noise, parameters, spectrum, agents
    (16, 0.1, -0.3, 0.3, 200, 0.0, 4),
    (16, 0.5, 0.0, 0.0, 50, 1.0, 3),
    (32, 0.05, -0.3, 0.3, 500, 0.0, 4),
    (32, 0.5, 0.9, 0.0, 100, 0.0, 2),
    (32, 0.2, 0.0, 0.3, 100, 1.0, 16),
    (64, 0.1, -0.1, 0.3, 300, 0.0, 8),
    (128, 0.02, 0.3, 0.3, 300, 0.0, 4),
    (32, 0.3, -0.01, 0.1, 100, 0.0, 64),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clusters", "snr", "cosine", "shared", "params", "spectrum", "agents"), COVERAGE
)
def test_intervals_cover(clusters, snr, cosine, shared, params, spectrum, agents):
    replications = 1000
    random, means = np.random.default_rng(7), mean_gradients(agents, cosine, params)
    pairs = np.triu_indices(agents, 1)
    true = means @ means.T
    hits = {"inner product": [], "squared norm": [], "cosine": []}
    values = {"inner product": [], "squared norm": []}
    for _ in range(replications):
        found = estimates_of(fast_products(draw(random, means, clusters, snr, shared, spectrum)))
        interval = found.inner_product_interval
        inside = (interval.low[0] <= true) & (true <= interval.high[0])
        hits["inner product"].append(inside[pairs].mean())
        hits["squared norm"].append(np.diagonal(inside).mean())
        values["inner product"].append(found.inner_product[0][pairs].mean())
        values["squared norm"].append(found.signal[0].mean())
        of_cosine = found.cosine_interval
        held = (of_cosine.low[0] <= cosine) & (cosine <= of_cosine.high[0])
        hits["cosine"].append(held[pairs][np.isfinite(of_cosine.value[0][pairs])].mean())
    low, high = (0.93, 0.97) if clusters >= 32 else (0.90, 0.98)
    for name, of_name in hits.items():
        assert low <= np.nanmean(of_name) <= high, name
    for name, of_name in values.items():
        error = np.std(of_name) / replications**0.5
        expected = true[pairs].mean() if name == "inner product" else 1.0
        assert abs(np.mean(of_name) - expected) < 4 * error, name


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "params"), [(16, 200), (32, 10), (32, 1000), (128, 200)])
def test_pure_noise_is_rarely_called_conflict(clusters, params):
    random = np.random.default_rng(0)
    pairs = np.triu_indices(6, 1)
    called, naive, any_call = [], [], []
    for _ in range(1000):
        found = estimates_of(fast_products(draw(random, np.zeros((6, params)), clusters, 1.0)))
        verdict = found.verdict[0][pairs]
        called.append((verdict == CONFLICT).mean())
        any_call.append((verdict != UNDECIDED).any())
        naive.append((found.inner_product[0][pairs] < 0).mean())
    assert np.mean(called) < 0.02
    assert np.mean(any_call) <= 0.065  # where all pairs are null, FDR is the chance of any verdict
    assert 0.45 < np.mean(naive) < 0.55
