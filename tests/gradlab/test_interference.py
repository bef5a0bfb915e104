"""Every variable of `interference` against loops over dense per-sample gradients."""

import numpy as np
import pytest
import torch
from cases import AGENTS, DECOUPLED, case, one_agents
from scipy import stats
from test_estimates import slow_inner_product, slow_variance

from gradlab.checks import UsageError
from gradlab.decomposition import decompose
from gradlab.metrics.interference import interference
from gradlab.verdicts import ALIGNED, CONFLICT, UNDECIDED

SAMPLES, CLUSTERS = 24, 9
COPY = torch.cat([torch.arange(CLUSTERS), torch.arange(CLUSTERS), torch.tensor([3, 3, 0, 8, 5, 1])])
CASES = [(method, "value") for method in (*DECOUPLED, "hypermarl-coupled")]
CASES += [("hypermarl", "ppo-continuous"), ("fups-id", "ppo-discrete")]


def some_case(method, surrogate):
    """Values that lie far from their targets, so that agents have gradients above their noise."""
    c = case(method, surrogate, samples=SAMPLES)
    if surrogate == "value":
        c.batch["target"] += torch.tensor([4.0, 4.0, -4.0])[:, None]
    return c


def dense(c):
    """Per-sample gradients [agent, sample, param] in both spaces, a backward pass for each."""
    reads = getattr(c.generator, "reads_observation", False)
    found = {"theta": [], "psi": []}
    for agent in range(AGENTS):
        for t in range(SAMPLES):
            sample = {name: tensor[agent, t] for name, tensor in c.batch.items()}
            arguments = (sample["observation"][None],) if reads else ()
            theta = one_agents(c.generator(torch.tensor([agent]), *arguments))
            leaves = {"theta": list(theta.values()), "psi": list(c.generator.parameters())}
            loss = c.surrogate(theta, sample)
            for space, of in leaves.items():
                parts = torch.autograd.grad(loss, of, retain_graph=True, materialize_grads=True)
                found[space].append(torch.cat([part.flatten() for part in parts]))
    return {n: torch.stack(rows).view(AGENTS, SAMPLES, -1).numpy() for n, rows in found.items()}


def by_layer(d, rows):
    """The rows of the whole network, and of every layer, in each space."""
    for space, layout in (("theta", d.theta_layout), ("psi", d.psi_layout)):
        yield space, "all", rows[space]
        for layer, part in layout.split_by_layer(torch.from_numpy(rows[space])):
            yield space, layer, part.numpy()


def slow_cosine(sums, count, own, i, k):
    """The debiased cosine and the ends of {c: |D_ik - c sqrt(D_ii D_kk)| <= quantile * error}.

    `own` has the debiased squared lengths of all agents and their variances.
    """
    n = sums.shape[1]
    for agent in (i, k):
        if own[agent][0] <= 2 * own[agent][1] ** 0.5:
            return np.nan, -1.0, 1.0
    if i == k:
        return 1.0, 1.0, 1.0
    d_ik, d_ii, d_kk = slow_inner_product(sums, count, i, k), own[i][0], own[k][0]
    root = (d_ii * d_kk) ** 0.5
    three = (i, k), (i, i), (k, k)
    left_out = np.array([
        [slow_inner_product(sums, count, *pair, (e,)) for pair in three] for e in range(n)
    ])
    kernel = np.array([
        [
            (sums[a, e] @ sums[b, e + 1] + sums[a, e + 1] @ sums[b, e])
            / 2
            * (n * (n - 1) / (count[a].sum() * count[b].sum() - count[a] @ count[b]))
            for a, b in three
        ]
        for e in range(n - 1)
    ])

    def weights(c):  # of D_ik, D_ii and D_kk in D_ik - c sqrt(D_ii D_kk), to first order
        return np.array([1.0, -c * d_kk / (2 * root), -c * d_ii / (2 * root)])

    def variance(weights):  # the jackknife's, and its correction
        values = left_out @ weights
        plain = (n - 1) / n * ((values - values.mean()) ** 2).sum()
        of_kernel = np.var(kernel @ weights, ddof=1)
        corrected = ((n - 2) ** 2 * plain - 2 * of_kernel) / ((n - 1) * (n - 4))
        return plain, max(0.5, corrected / plain) if plain > 0 else 1.0

    if d_ik == 0:  # 0 by structure, without noise
        return 0.0, 0.0, 0.0
    unlike, factor = variance(np.array([0, 1 / d_ii, -1 / d_kk]))
    scale = root * (1 + unlike * factor / 8)
    value = d_ik / scale
    _, factor = variance(weights(value))
    quantile = stats.t.ppf(0.975, n - 1)
    points = np.array([-1.0, 0.0, 1.0])  # the condition is a parabola in c
    heights = [
        (d_ik - c * scale) ** 2 - quantile**2 * factor * variance(weights(c))[0] for c in points
    ]
    parabola = np.polyfit(points, heights, 2)
    if parabola[0] <= 0:
        return np.nan, -1.0, 1.0
    return value, *np.clip(np.sort(np.roots(parabola).real), -1, 1)


def slow_verdicts(debiased, error, clusters):
    """Benjamini and Hochberg's step-up rule over the pairs, at 5 %."""
    found, p = np.full(debiased.shape, np.nan), {}
    for i, k in zip(*np.triu_indices(len(debiased), 1), strict=True):
        value = debiased[i, k]
        if np.isfinite(value):
            t = 0 if value == 0 else abs(value) / error[i, k]
            p[i, k] = 2 * stats.t.sf(t, clusters - 1)
    ranked = sorted(p.values())
    passed = [value for rank, value in enumerate(ranked, 1) if value <= 0.05 * rank / len(p)]
    for (i, k), value in p.items():
        decided = bool(passed) and value <= max(passed)
        found[i, k] = found[k, i] = np.sign(debiased[i, k]) if decided else UNDECIDED
    return found


def expected(rows, exist, cluster):
    """All variables of one space and layer, from per-sample gradients, by loops."""
    agents = len(rows)
    there = exist.any(1)
    pairs = [(i, k) for i in range(agents) for k in range(agents) if there[i] and there[k]]
    upper = [(i, k) for i, k in pairs if i < k]
    clusters = cluster.max() + 1
    count = np.stack([(exist & (cluster == e)).sum(1) for e in range(clusters)], 1)
    sums = np.stack(
        [(rows * (exist & (cluster == e))[..., None]).sum(1) for e in range(clusters)], 1
    )
    mean = sums.sum(1) / np.maximum(count.sum(1), 1)[:, None]

    def filled(function):
        values = np.full((agents, agents), np.nan)
        for i, k in pairs:
            if i <= k:
                values[i, k] = values[k, i] = function(i, k)
        return values

    def cosine(a, b):
        scale = np.linalg.norm(a) * np.linalg.norm(b)
        return np.clip(a @ b / scale, -1, 1) if scale > 0 else np.nan

    def similarity(i, k):
        a, b = np.linalg.norm(mean[i]), np.linalg.norm(mean[k])
        return 2 * a * b / (a**2 + b**2) if a + b > 0 else np.nan

    def agreement(i, k):
        both = (mean[i] != 0) & (mean[k] != 0)
        return (np.sign(mean[i]) == np.sign(mean[k]))[both].mean() if both.any() else np.nan

    cosines = filled(lambda i, k: cosine(mean[i], mean[k]))
    known = [cosines[p] for p in upper if np.isfinite(cosines[p])]
    norms = np.where(there, np.linalg.norm(mean, axis=1), np.nan)
    together = np.linalg.norm(mean[there].sum(0))
    debiased = filled(lambda i, k: slow_inner_product(sums, count, i, k))
    error = filled(lambda i, k: slow_variance(sums, count, i, k) ** 0.5)
    verdict = slow_verdicts(debiased, error, clusters)
    judged = [verdict[p] for p in upper]
    of_sum = debiased[there][:, there].sum()
    own = list(zip(np.diagonal(debiased), np.diagonal(error) ** 2, strict=True))
    intervals = np.full((3, agents, agents), np.nan)
    for i, k in pairs:
        intervals[:, i, k] = slow_cosine(sums, count, own, i, k)
    return {
        "inner_product": filled(lambda i, k: mean[i] @ mean[k]),
        "cosine": cosines,
        "magnitude_similarity": filled(similarity),
        "norm": norms,
        "negative_rate": np.mean(np.array(known) < 0) if known else np.nan,
        "mean_cosine": np.mean(known) if known else np.nan,
        "gradient_diversity": np.nansum(norms**2) / together**2,
        "cancelled_norm": 1 - together / np.nansum(norms),
        "sign_agreement": filled(agreement),
        "cosine_cluster": np.array([
            filled(lambda i, k, e=e: cosine(sums[i, e], sums[k, e])) for e in range(clusters)
        ]),
        "inner_product_debiased": debiased,
        "inner_product_error": error,
        "cosine_debiased": intervals[0],
        "cosine_low": intervals[1],
        "cosine_high": intervals[2],
        "verdict": verdict,
        "conflict_rate": np.mean(np.array(judged) == CONFLICT) if judged else np.nan,
        "aligned_rate": np.mean(np.array(judged) == ALIGNED) if judged else np.nan,
        "gradient_diversity_debiased": np.trace(debiased[there][:, there]) / of_sum
        if of_sum > 0
        else np.nan,
    }


def agrees(found, d, rows, exist=None):
    exist = np.ones((AGENTS, SAMPLES), bool) if exist is None else exist
    for space, layer, part in by_layer(d, rows):
        values = expected(part, exist, COPY.numpy())
        assert set(values) == set(found.data_vars)
        for name, value in values.items():
            here = found[name].sel(space=space, layer=layer).to_numpy()
            np.testing.assert_allclose(
                here, value, rtol=1e-9, atol=1e-11, err_msg=f"{name} {space} {layer}"
            )


@pytest.mark.parametrize(("method", "surrogate"), CASES)
def test_every_variable_equals_loops_over_samples(method, surrogate):
    c = some_case(method, surrogate)
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY)
    found = interference(d, signs=True, by_cluster=True)
    agrees(found, d, dense(c))


@pytest.mark.parametrize("method", ["fups-id", "hypermarl", "nops"])
def test_an_absent_agent_is_unknown_and_the_others_as_without_it(method):
    c = some_case(method, "value")
    exist = torch.rand(AGENTS, SAMPLES, generator=torch.Generator().manual_seed(0)) < 0.8
    exist[1] = False
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY, mask=exist)
    found = interference(d, signs=True, by_cluster=True)
    agrees(found, d, dense(c), exist.numpy())
    for name, values in found.data_vars.items():
        if "agent" in values.dims:
            assert np.isnan(values.sel(agent=1)).all(), name
            assert not np.isnan(values.sel(agent=0, layer="all")).all(), name
        else:
            assert np.isfinite(values.sel(layer="all")).any(), name
    assert "1 pairs" not in found.summary
    assert "2 unknown" in found.summary
    assert "9 clusters" in found.cosine_low.estimator
    assert "0 to" in found.summary


def test_full_sharing_makes_both_spaces_the_same():
    c = some_case("fups", "value")
    found = interference(
        decompose(c.generator, c.surrogate, c.batch, copy=COPY), signs=True, by_cluster=True
    )
    for name, values in found.data_vars.items():
        both = values.sel(space="psi"), values.sel(space="theta")
        np.testing.assert_allclose(*both, rtol=1e-9, atol=1e-12, err_msg=name)


def test_separate_networks_never_conflict_in_psi():
    c = some_case("nops", "value")
    found = interference(
        decompose(c.generator, c.surrogate, c.batch, copy=COPY), signs=True, by_cluster=True
    )
    psi, off = found.sel(space="psi"), ~np.eye(AGENTS, dtype=bool)
    for name in ("inner_product", "cosine", "inner_product_debiased", "inner_product_error"):
        assert (psi[name].to_numpy()[:, off] == 0).all(), name
    assert (psi.cosine_cluster.to_numpy()[:, :, off] == 0).all()
    assert np.isnan(psi.sign_agreement.to_numpy()[:, off]).all()  # no coordinate in common
    assert (psi.verdict.to_numpy()[:, off] == UNDECIDED).all()
    for name in ("conflict_rate", "aligned_rate", "negative_rate", "mean_cosine"):
        assert (psi[name] == 0).all(), name
    np.testing.assert_allclose(psi.gradient_diversity, 1, rtol=1e-12)
    assert (found.verdict.sel(space="theta", layer="all").to_numpy()[off] != UNDECIDED).any()


class Shared(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, agents):  # noqa: ARG002
        return {"w": self.w[None]}


def with_gradients(rows, copy=None, **settings):
    """Full sharing of one vector, and a loss whose per-sample gradients are `rows`."""
    batch = {"x": torch.as_tensor(np.asarray(rows, float))}
    return decompose(
        Shared(batch["x"].shape[2]),
        lambda theta, s: (theta["w"] * s["x"]).sum(),
        batch,
        copy=None if copy is None else torch.as_tensor(copy),
        **settings,
    )


def test_identical_opposite_and_orthogonal_agents():
    random = np.random.default_rng(0)
    base = np.zeros((32, 8))
    base[:, 0] = 1.0
    base[:, :4] += 0.1 * random.standard_normal((32, 4))
    rows = np.stack([base, base, -base, np.roll(base, 4, axis=1), 0 * base])
    found = interference(with_gradients(rows, np.arange(32)), signs=True).sel(
        space="psi", layer="all"
    )
    for name in ("cosine", "cosine_debiased", "verdict"):
        values = found[name].to_numpy()
        assert values[0, 1] == pytest.approx(1), name
        assert values[0, 2] == values[1, 2] == pytest.approx(-1), name
        assert values[0, 3] == pytest.approx(0, abs=1e-12), name
    assert found.cosine_low[0, 1] == pytest.approx(1)
    assert found.cosine_high[0, 2] == pytest.approx(-1)
    assert found.verdict[0, 4] == UNDECIDED
    assert np.isnan(found.cosine[0, 4])
    assert found.norm[4] == 0
    signs = found.sign_agreement.to_numpy()
    assert (signs[0, 1], signs[0, 2]) == (1, 0)
    assert np.isnan(signs[0, 3])
    # of ten pairs two are opposite and one is equal
    assert found.conflict_rate == pytest.approx(0.2)
    assert found.aligned_rate == pytest.approx(0.1)
    assert found.negative_rate == pytest.approx(2 / 6)  # the zero gradient's pairs have no cosine
    assert found.attrs["summary"] == (
        "2 of 10 pairs in conflict in psi-space, 1 aligned, 7 undecided; "
        "32 clusters of 32 environment copies, 32 samples of each agent"
    )


@pytest.mark.parametrize(
    ("signs", "diversity", "cancelled"),
    [([1, 1, 1, 1], 1 / 4, 0), ([1, 1, 1, -1], 1, 1 / 2), ([1, -1, 1, -1], np.nan, 1)],
)
def test_diversity_and_cancellation_of_equal_and_opposite_agents(signs, diversity, cancelled):
    rows = np.array(signs)[:, None, None] * np.ones((1, 16, 3))
    found = interference(with_gradients(rows, np.arange(16))).sel(space="theta", layer="all")
    for name in ("gradient_diversity", "gradient_diversity_debiased"):
        np.testing.assert_allclose(found[name], diversity, rtol=1e-12)
    np.testing.assert_allclose(found.cancelled_norm, cancelled, atol=1e-12)


def test_copies_that_agents_share_mislead_the_plug_in_estimates_only():
    random, rounds = np.random.default_rng(0), 60
    mean = np.zeros((2, 50))
    mean[:, 0] = 1.0
    mean[1, :2] = -0.3, (1 - 0.09) ** 0.5
    copy = np.repeat(np.arange(32), 4)
    plug_in, debiased = [], []
    for _ in range(rounds):
        common = np.repeat(random.standard_normal((1, 32, 50)), 4, axis=1)
        own = random.standard_normal((2, 128, 50))
        rows = mean[:, None] + 0.6 * (common + own)
        found = interference(with_gradients(rows, copy)).sel(space="psi", layer="all")
        plug_in.append(float(found.cosine[0, 1]))
        debiased.append(float(found.inner_product_debiased[0, 1]))
    assert np.mean(plug_in) > 0.05
    error = np.std(debiased) / rounds**0.5
    assert np.mean(debiased) == pytest.approx(-0.3, abs=3 * error)
    assert error < 0.03


def test_one_agent_has_no_pairs():
    rows = np.random.default_rng(0).standard_normal((1, 20, 3)) + 2
    found = interference(with_gradients(rows, np.arange(20)), signs=True, by_cluster=True)
    whole = found.sel(space="psi", layer="all")
    for name in ("cosine", "cosine_debiased", "cosine_low", "magnitude_similarity"):
        assert float(whole[name][0, 0]) == pytest.approx(1), name
    for name in ("conflict_rate", "aligned_rate", "negative_rate", "mean_cosine"):
        assert np.isnan(whole[name]), name
    assert np.isnan(whole.verdict).all()
    for name in ("gradient_diversity", "gradient_diversity_debiased"):
        assert whole[name] == pytest.approx(1), name
    assert whole.cancelled_norm == pytest.approx(0)
    assert found.summary.startswith("one agent, no pairs; 20 clusters")


def test_without_copies_there_are_no_verdicts():
    c = some_case("hypermarl", "value")
    found = interference(decompose(c.generator, c.surrogate, c.batch))
    assert not {"verdict", "cosine_debiased", "gradient_diversity_debiased"} & set(found)
    assert np.isnan(found.conflict_rate).all()
    assert np.isnan(found.aligned_rate).all()
    assert found.conflict_rate.estimator == "needs environment copies"
    assert found.summary.endswith("24 samples of each agent, environment copies not told apart")
    assert "of 3 pairs with a negative plug-in cosine" in found.summary
    assert (found.clusters, found.copies) == (0, 0)
    with pytest.raises(UsageError, match="`by_cluster` needs clusters"):
        interference(decompose(c.generator, c.surrogate, c.batch), by_cluster=True)


def test_fewer_than_eight_clusters_have_no_interval():
    c = some_case("hypermarl", "value")
    seven = decompose(c.generator, c.surrogate, c.batch, copy=COPY, clusters=7)
    found = interference(seven).sel(layer="all")
    for name in ("inner_product_error", "cosine_low", "cosine_high", "verdict", "conflict_rate"):
        assert np.isnan(found[name]).all(), name
    assert np.isfinite(found.inner_product_debiased).all()
    assert found.cosine_low.estimator == "no interval from 7 clusters, 8 are needed"
    assert "no verdicts without at least 8 environment copies; 7 clusters of 9" in found.summary


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["fups", "hypermarl", "nops", "hypermarl-coupled"])
def test_gradients_that_are_not_finite_concern_their_agent_alone(method, value):
    c = some_case(method, "ppo-continuous")
    finite = interference(
        decompose(c.generator, c.surrogate, c.batch, copy=COPY, check=0),
        signs=True,
        by_cluster=True,
    )
    c.batch["advantage"][1, 3] = value
    c.batch["advantage"][1, 4] = -value
    found = interference(
        decompose(c.generator, c.surrogate, c.batch, copy=COPY, check=0),
        signs=True,
        by_cluster=True,
    )
    assert not np.isfinite(found.norm.sel(agent=1, layer="all")).any()
    for name in ("cosine", "inner_product_debiased", "cosine_low", "norm"):
        ours, theirs = (one[name].sel(agent=[0, 2]) for one in (found, finite))
        if "agent_other" in ours.dims:
            ours, theirs = (one.sel(agent_other=[0, 2]) for one in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=name)
    assert np.isnan(found.verdict.sel(agent=1, layer="all")).all()
    assert np.isnan(found.gradient_diversity.sel(layer="all")).all()
    assert found.summary


def test_datasets_become_tables_and_carry_their_settings():
    c = some_case("hypermarl", "value")
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY)
    found = interference(d, signs=True)
    table = found.to_dataframe()
    assert len(table) == 2 * found.sizes["layer"] * AGENTS**2
    assert set(table.columns) == set(found.data_vars)
    assert {n: found.attrs[n] for n in ("clusters", "copies", "level", "false_discovery_rate")} == {
        "clusters": 9,
        "copies": 9,
        "level": 0.95,
        "false_discovery_rate": 0.05,
    }
    assert found.summary in found._repr_html_()
    for name, values in found.data_vars.items():
        assert values.attrs["unit"], name
        assert values.attrs["estimator"], name
