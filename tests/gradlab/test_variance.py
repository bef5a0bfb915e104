"""Every variable of `variance` against loops over dense per-sample gradients."""

from itertools import combinations

import numpy as np
import pytest
import torch
from cases import AGENTS
from scipy import stats
from test_estimates import slow_inner_product, slow_variance
from test_interference import CASES, COPY, SAMPLES, by_layer, dense, some_case, with_gradients

from gradlab.checks import UsageError
from gradlab.decomposition import decompose
from gradlab.metrics.variance import variance

MINIBATCHES = (1, 2, 5, 24, 30)
THETA = (  # those without an axis of spaces
    "variance_agent",
    "variance_within",
    "variance_between",
    "variance_minibatch",
    "gsnr",
    "design_effect",
)


def close(found, expected, what):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=what)


def slow_copies_to_resolve(sums, count, cosine, i, k):
    """n for which cosine |Z_i| |Z_k| is the needed number of standard errors of D_ik.

    From the jackknife's variance J, as the docs say: J = 4 (z2 + (n - 4) z1) / (n (n - 2)), and
    the true one at n' clusters is about 4 z1 / n' + 2 z2 / n'^2.
    """
    n = sums.shape[1]
    own = [slow_inner_product(sums, count, agent, agent) for agent in (i, k)]
    errors = [slow_variance(sums, count, agent, agent) ** 0.5 for agent in (i, k)]
    if any(value <= 2 * error for value, error in zip(own, errors, strict=True)):
        return np.nan
    left_out = np.array([slow_inner_product(sums, count, i, k, (e,)) for e in range(n)])
    jackknife = (n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()
    pairs = count[i].sum() * count[k].sum() - count[i] @ count[k]
    kernel = [
        (sums[i, e] @ sums[k, e + 1] + sums[i, e + 1] @ sums[k, e]) / 2 * n * (n - 1) / pairs
        for e in range(n - 1)
    ]
    z2 = np.var(kernel, ddof=1)
    z1 = max(0.0, (jackknife * n * (n - 2) / 4 - z2) / (n - 4))
    needed = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    target = cosine**2 * own[0] * own[1] / needed**2  # the variance to reach
    roots = np.roots([target, -4 * z1, -2 * z2])
    return roots.real.max()


def expected(rows, exist, cluster):
    """All variables of one space and layer, from per-sample gradients, by loops."""
    agents, _, size = rows.shape
    there = exist.any(1)
    clusters = cluster.max() + 1
    count = np.stack([(exist & (cluster == e)).sum(1) for e in range(clusters)], 1)
    sums = np.stack(
        [(rows * (exist & (cluster == e))[..., None]).sum(1) for e in range(clusters)], 1
    )
    names = ("variance_agent", "gsnr", "squared_norm_debiased", "variance_mean", "design_effect")
    found = {name: np.full(agents, np.nan) for name in names}
    found["variance_minibatch"] = np.full((len(MINIBATCHES), agents), np.nan)
    found["copies_to_resolve"] = np.full((agents, agents), np.nan)
    means, known = [], []
    for i in np.flatnonzero(there):
        own, n = rows[i, exist[i]], exist[i].sum()
        mean, spread = own.mean(0), own.var(0, ddof=1)
        means.append(mean)
        found["variance_agent"][i] = own.var(0).sum()
        each = np.full(size, np.nan)
        moving = spread > 0
        each[moving] = (mean**2 - spread / n)[moving] / spread[moving]
        found["gsnr"][i] = np.nanmean(each) if moving.any() else np.nan
        for row, parts in enumerate(MINIBATCHES):
            if parts <= n:
                found["variance_minibatch"][row, i] = own.var(0).sum() * (parts - 1) / (n - 1)
        found["squared_norm_debiased"][i] = slow_inner_product(sums, count, i, i)
        error = slow_variance(sums, count, i, i) ** 0.5
        known.append(found["squared_norm_debiased"][i] > 2 * error)
        of_clusters = sums[i] - count[i][:, None] * mean
        inside = clusters / (clusters - 1) * (of_clusters**2).sum() / n**2
        found["variance_mean"][i] = inside
        found["design_effect"][i] = inside / (own.var(0, ddof=1).sum() / n)
    for i in np.flatnonzero(there):
        for k in np.flatnonzero(there):
            of_pair = slow_copies_to_resolve(sums, count, 0.3, i, k)
            found["copies_to_resolve"][i, k] = of_pair
    normalised = found["variance_mean"] / found["squared_norm_debiased"]
    normalised[there] = np.where(known, normalised[there], np.nan)
    found["normalised_variance"] = normalised
    found["noise_scale"] = clusters * normalised  # each cluster is one copy
    found["variance_within"] = found["variance_agent"][there].mean()
    found["variance_between"] = np.var(means, axis=0).sum()
    return found


def agrees(found, d, rows, exist=None):
    exist = np.ones((AGENTS, SAMPLES), bool) if exist is None else exist
    checked = {"coordinate_variance", "variance_jacobian"}
    for space, layer, part in by_layer(d, rows):
        for name, value in expected(part, exist, COPY.numpy()).items():
            checked.add(name)
            if name in THETA and space == "psi":
                continue
            where = {"layer": layer} if name in THETA else {"layer": layer, "space": space}
            close(found[name].sel(where), value, f"{name} {space} {layer}")
    assert set(found.data_vars) <= checked
    gradients = rows["psi"] * exist[..., None]
    counts = np.maximum(exist.sum(1), 1)[:, None]
    total = (gradients.sum(1) / counts).sum(0)
    close(found.coordinate_variance, total.var(), "coordinate_variance")


@pytest.mark.parametrize(("method", "surrogate"), CASES)
def test_every_variable_equals_loops_over_samples(method, surrogate):
    c = some_case(method, surrogate)
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY, coordinates=True)
    found = variance(d, minibatches=MINIBATCHES, cosine=0.3)
    agrees(found, d, dense(c))
    assert ("variance_jacobian" in found) == (method == "hypermarl-coupled")


@pytest.mark.parametrize("method", ["fups-id", "hypermarl", "nops"])
def test_an_absent_agent_is_unknown_and_the_others_as_without_it(method):
    c = some_case(method, "value")
    exist = torch.rand(AGENTS, SAMPLES, generator=torch.Generator().manual_seed(0)) < 0.8
    exist[1] = False
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY, mask=exist, coordinates=True)
    found = variance(d, minibatches=MINIBATCHES, cosine=0.3)
    agrees(found, d, dense(c), exist.numpy())
    for name, values in found.data_vars.items():
        if "agent" in values.dims:
            assert np.isnan(values.sel(agent=1)).all(), name
            assert not np.isnan(values.sel(agent=[0, 2], layer="all")).all(), name
        else:
            whole = values.sel(layer="all") if "layer" in values.dims else values
            assert np.isfinite(whole), name


def test_noise_of_the_jacobian_alone():
    c = some_case("hypermarl-coupled", "value")
    found = variance(decompose(c.generator, c.surrogate, c.batch, copy=COPY))
    theta_rows = dense(c)["theta"]
    mean = theta_rows.mean(1)
    rows = []
    for agent in range(AGENTS):
        for t in range(SAMPLES):
            theta = c.generator(torch.tensor([agent]), c.batch["observation"][agent, t][None])
            values = torch.cat([tensor[0].flatten() for tensor in theta.values()])
            parts = torch.autograd.grad(
                values @ torch.from_numpy(mean[agent]),
                list(c.generator.parameters()),
                materialize_grads=True,
            )
            rows.append(torch.cat([part.flatten() for part in parts]))
    jacobian = torch.stack(rows).view(AGENTS, SAMPLES, -1).numpy()
    d = decompose(c.generator, c.surrogate, c.batch)
    for space, layer, part in by_layer(d, {"theta": theta_rows, "psi": jacobian}):
        if space == "psi":
            exist = np.ones((AGENTS, SAMPLES), bool)
            value = expected(part, exist, COPY.numpy())["variance_mean"]
            close(found.variance_jacobian.sel(layer=layer), value, layer)
    assert (found.variance_jacobian.sel(layer="all") > 0).all()


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_minibatches_add_what_all_subsets_of_a_batch_spread(parts):
    rows = np.random.default_rng(0).standard_normal((2, 8, 3)) * [1, 2, 5] + 1
    found = variance(with_gradients(rows), minibatches=[parts]).variance_minibatch.sel(layer="all")
    for agent in range(2):
        subsets = [rows[agent, list(s)].mean(0) for s in combinations(range(8), 8 // parts)]
        np.testing.assert_allclose(
            found[0, agent], np.var(subsets, axis=0).sum(), rtol=1e-10, atol=1e-12
        )


def test_total_variance_is_within_plus_between():
    rows = np.random.default_rng(0).standard_normal((4, 50, 6)) + np.arange(4)[:, None, None]
    found = variance(with_gradients(rows)).sel(layer="all")
    total = rows.reshape(200, 6).var(0).sum()
    assert found.variance_within + found.variance_between == pytest.approx(total, rel=1e-10)


def test_equal_samples_have_no_variance_and_no_ratio_to_it():
    rows = np.ones((3, 16, 4)) * np.array([1.0, -2.0, 0.0])[:, None, None]
    found = variance(with_gradients(rows, np.arange(16), coordinates=True)).sel(layer="all")
    for name in ("variance_agent", "variance_within", "variance_mean"):
        np.testing.assert_allclose(found[name], 0, atol=1e-12, err_msg=name)
    for name in ("gsnr", "design_effect"):
        assert np.isnan(found[name]).all(), name
    np.testing.assert_allclose(found.normalised_variance[:, :2], 0, atol=1e-12)
    assert np.isnan(found.normalised_variance[:, 2]).all()
    np.testing.assert_allclose(found.squared_norm_debiased, [[4, 16, 0]] * 2, atol=1e-12)


def test_design_effect_counts_by_how_much_copies_repeat_themselves():
    random, rounds = np.random.default_rng(0), 40
    copy, values = np.repeat(np.arange(32), 8), {"independent": [], "shared": [], "repeated": []}
    for _ in range(rounds):
        own = random.standard_normal((1, 256, 20))
        common = np.repeat(random.standard_normal((1, 32, 20)), 8, axis=1)
        for name, rows in (("independent", own), ("shared", own + common), ("repeated", common)):
            found = variance(with_gradients(rows, copy)).design_effect.sel(layer="all")
            values[name].append(float(found[0]))
    # samples of a copy with correlation r: 1 + 7 r, up to the few clusters' effect on a ratio
    for name, truth in (("independent", 1.0), ("shared", 4.5), ("repeated", 8.0)):
        error = np.std(values[name]) / rounds**0.5
        tolerance = 4 * error + 0.03 * truth
        assert np.mean(values[name]) == pytest.approx(truth, abs=tolerance), name


def test_noise_scale_and_gsnr_of_known_signal_and_noise():
    random, rounds = np.random.default_rng(0), 40
    found = {"noise_scale": [], "gsnr": [], "squared_norm_debiased": [], "normalised_variance": []}
    mean = np.array([2.0, 1.0, 0.5, 0.0])
    for _ in range(rounds):
        rows = mean + 3 * random.standard_normal((1, 256, 4))
        one = variance(with_gradients(rows, np.arange(256), coordinates=True, clusters=64)).sel(
            layer="all"
        )
        found["gsnr"].append(float(one.gsnr[0]))
        for name in ("noise_scale", "squared_norm_debiased", "normalised_variance"):
            found[name].append(float(one[name].sel(space="psi")[0]))
    signal, noise = 5.25, 36.0
    truth = {
        "noise_scale": noise / signal,
        "gsnr": np.mean(mean**2 / 9),
        "squared_norm_debiased": signal,
        "normalised_variance": noise / signal / 256,
    }
    for name, values in found.items():
        error = np.std(values) / rounds**0.5
        assert np.mean(values) == pytest.approx(truth[name], abs=4 * error), name
        assert error < 0.1 * truth[name]


def test_coordinate_variance_is_that_of_the_whole_gradient():
    rows = np.random.default_rng(0).standard_normal((3, 10, 7)) + 1
    total = rows.mean(1).sum(0)
    found = variance(with_gradients(rows)).coordinate_variance
    assert found == pytest.approx(total.var(), rel=1e-10)
    assert found.unit == "loss^2"


def test_a_single_sample_has_no_variance_of_means():
    found = variance(with_gradients(np.ones((2, 1, 3)), [0])).sel(layer="all")
    assert (found.variance_agent == 0).all()
    for name in ("variance_minibatch", "design_effect", "variance_mean", "squared_norm_debiased"):
        assert np.isnan(found[name]).all(), name


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["fups", "hypermarl", "nops", "hypermarl-coupled"])
def test_gradients_that_are_not_finite_concern_their_agent_alone(method, value):
    def measured(c):
        d = decompose(c.generator, c.surrogate, c.batch, copy=COPY, coordinates=True, check=0)
        return variance(d)

    c = some_case(method, "ppo-continuous")
    finite = measured(c)
    c.batch["advantage"][1, 3] = value
    c.batch["advantage"][1, 4] = -value
    found = measured(c)
    assert np.isnan(found.coordinate_variance)
    for name, values in found.data_vars.items():
        if "agent" in values.dims:
            of_agent = values.sel(agent=1, layer="all")
            assert not np.isfinite(of_agent).any(), name
            others = {dim: [0, 2] for dim in values.dims if dim.startswith("agent")}
            np.testing.assert_allclose(
                values.sel(others), finite[name].sel(others), rtol=1e-9, err_msg=name
            )
    assert "psi-space" in found.summary


def test_datasets_become_tables_and_carry_their_settings():
    c = some_case("hypermarl", "value")
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY, coordinates=True)
    found = variance(d)
    assert set(found.to_dataframe().columns) == set(found.data_vars)
    assert (found.clusters, found.copies) == (9, 9)
    assert "noise scale" in found.summary
    assert found.summary.endswith("9 clusters of 9 environment copies, 24 samples of each agent")
    assert found.summary in found._repr_html_()
    plain = variance(decompose(c.generator, c.surrogate, c.batch))
    assert set(plain) == {
        "variance_agent",
        "variance_within",
        "variance_between",
        "variance_minibatch",
        "coordinate_variance",
    }
    assert "of single samples' variance is within agents in theta-space" in plain.summary
    for name, values in found.data_vars.items():
        assert values.attrs["unit"], name
        assert values.attrs["estimator"], name


def test_bad_settings_are_named():
    d = with_gradients(np.ones((1, 2, 3)))
    with pytest.raises(UsageError, match=r"`minibatches` must be at least 1 each. Got .*\[0, 2\]"):
        variance(d, minibatches=[0, 2])
    for cosine in (0.0, 1.5):
        with pytest.raises(UsageError, match=f"`cosine` must be .* Got cosine={cosine}"):
            variance(d, cosine=cosine)
