import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from analyses.embeddings import pca, tsne, umap


def points(values):
    return xr.DataArray(
        np.asarray(values, dtype=float),
        dims=("update", "agent", "feature"),
        coords={"update": [10 * u for u in range(len(values))], "agent": range(len(values[0]))},
    )


def walk(updates=5, agents=6, features=8, seed=0):
    return np.cumsum(np.random.default_rng(seed).normal(size=(updates, agents, features)), axis=0)


def test_pca_is_scikit_learns_on_all_updates_together():
    values = walk()
    reference = PCA(2).fit(values.reshape(-1, 8))
    expected = reference.transform(values.reshape(-1, 8)).reshape(5, 6, 2)
    found = pca(points(values))
    np.testing.assert_allclose(np.abs(found["position"]), np.abs(expected), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(
        found["explained_variance_ratio"], reference.explained_variance_ratio_, rtol=1e-9
    )
    assert found["update"].values.tolist() == [0, 10, 20, 30, 40]


def test_pca_keeps_distances_when_two_components_are_all_there_is():
    values = walk(features=2)
    position = pca(points(values))["position"].to_numpy().reshape(-1, 2)
    flat = values.reshape(-1, 2)
    np.testing.assert_allclose(
        np.linalg.norm(position[:, None] - position[None], axis=-1),
        np.linalg.norm(flat[:, None] - flat[None], axis=-1),
        atol=1e-9,
    )


def test_pca_signs_do_not_depend_on_the_order_of_agents():
    values = walk()
    order = [3, 1, 5, 0, 4, 2]
    np.testing.assert_allclose(
        pca(points(values[:, order]))["position"], pca(points(values))["position"][:, order]
    )


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e200])
def test_pca_of_identical_rows_is_zero_with_undefined_variance(constant):
    found = pca(points(np.full((3, 4, 5), constant)))
    assert (found["position"] == 0).all()
    assert np.isnan(found["explained_variance_ratio"]).all()


def test_pca_leaves_out_rows_that_are_not_finite():
    values = walk()
    spoilt = values.copy()
    spoilt[1, 2, 3] = np.nan
    spoilt[4, 0, 0] = np.inf
    found = pca(points(spoilt))["position"].to_numpy()
    left_out = np.isnan(found).all(axis=-1)
    assert np.argwhere(left_out).tolist() == [[1, 2], [4, 0]]
    kept = np.isfinite(spoilt).all(axis=-1)
    expected = PCA(2).fit_transform(values[kept])
    np.testing.assert_allclose(np.abs(found[kept]), np.abs(expected), atol=1e-9)


@pytest.mark.parametrize(("updates", "agents", "features"), [(3, 1, 4), (1, 1, 4), (4, 3, 1)])
def test_pca_of_few_agents_or_features_fills_up_with_zeros(updates, agents, features):
    found = pca(points(walk(updates, agents, features)))
    assert found["position"].shape == (updates, agents, 2)
    assert np.isfinite(found["position"]).all()


@pytest.mark.parametrize("agents", [4, 7, 30])
def test_tsne_first_update_is_scikit_learns_with_the_same_start(agents):
    values = walk(1, agents)
    scaled = values[0] / np.abs(values[0]).max()
    scaled = scaled - scaled.mean(axis=0)
    scaled /= np.abs(scaled).max()
    order = np.lexsort(scaled.T[::-1])
    start = PCA(2).fit_transform(values[0])
    signs = np.sign((pca(points(values))["position"].to_numpy()[0] * start).sum(axis=0))
    start = (start * signs)[order]
    start = start / start[:, 0].std() * 1e-4
    perplexity = min(max((agents - 1) / 3, 1), 30)
    reference = TSNE(
        perplexity=perplexity, init=start.astype(np.float32), method="exact", max_iter=750
    ).fit_transform(scaled[order])
    found = tsne(points(values))
    assert found["perplexity"].item() == pytest.approx(perplexity)
    # Rounding differences of the start are amplified by the descent: compare distances loosely.
    expected = np.linalg.norm(reference[:, None] - reference[None], axis=-1)
    position = found["position"].to_numpy()[0][order]
    distances = np.linalg.norm(position[:, None] - position[None], axis=-1)
    np.testing.assert_allclose(distances, expected, rtol=0.05, atol=0.05 * expected.max())


def test_tsne_is_deterministic():
    values = points(walk())
    xr.testing.assert_identical(tsne(values, seed=3), tsne(values, seed=3))


def test_tsne_warm_start_keeps_the_picture_when_nothing_moves():
    values = np.repeat(walk(1, 8), 4, axis=0)
    position = tsne(points(values))["position"].to_numpy()
    unit = (position - position.mean(axis=1, keepdims=True)) / position.std(axis=(1, 2))[
        :, None, None
    ]
    np.testing.assert_allclose(unit[2], unit[3], atol=0.3)


@pytest.mark.parametrize("agents", [1, 2, 3])
def test_tsne_of_few_agents_gives_the_reason(agents):
    found = tsne(points(walk(2, agents)))
    assert np.isnan(found["position"]).all()
    assert found["position"].shape == (2, agents, 2)
    noun = "agent" if agents == 1 else "agents"
    assert found["reason"].values.tolist() == [f"{agents} {noun}: t-SNE needs at least 4"] * 2


def test_tsne_of_few_distinct_rows_gives_the_reason():
    values = walk(2, 8)
    values[1, 3:] = values[1, 2]
    found = tsne(points(values))
    assert found["reason"].values.tolist() == [
        "",
        "3 distinct points of 8 agents: t-SNE needs at least 4",
    ]
    assert np.isfinite(found["position"][0]).all()
    assert np.isnan(found["position"][1]).all()


def test_tsne_identical_agents_share_a_position_and_part_again():
    values = walk(3, 7)
    values[1, 1] = values[1, 0]
    found = tsne(points(values))
    position = found["position"].to_numpy()
    assert found["distinct"].values.tolist() == [7, 6, 7]
    assert found["perplexity"].values.tolist() == pytest.approx([2.0, 5 / 3, 2.0])
    np.testing.assert_array_equal(position[1, 0], position[1, 1])
    assert np.abs(position[2, 0] - position[2, 1]).max() > 0


def test_tsne_leaves_out_rows_that_are_not_finite():
    values = walk(3, 6)
    values[1, 4, 0] = np.nan
    found = tsne(points(values))
    missing = np.isnan(found["position"]).all(axis=-1)
    assert np.argwhere(missing.to_numpy()).tolist() == [[1, 4]]
    assert found["distinct"].values.tolist() == [6, 5, 6]


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e200])
def test_tsne_does_not_depend_on_the_scale(scale):
    found = tsne(points(walk(2, 5) * scale))
    assert np.isfinite(found["position"]).all()


def test_no_updates_give_empty_results():
    empty = xr.DataArray(
        np.zeros((0, 4, 3)), dims=("update", "agent", "feature"), coords={"update": []}
    )
    assert pca(empty)["position"].shape == (0, 4, 2)
    assert tsne(empty)["position"].shape == (0, 4, 2)


def test_identical_rows_do_not_kill_the_process():
    # A segmentation fault would take the test run down with it, hence a process of its own.
    code = """
import numpy as np, xarray as xr
from analyses.embeddings import pca, tsne, umap
for agents in (1, 2, 3, 4, 8, 30):
    for number in (0.0, 0.1, 1.0):
        p = xr.DataArray(np.full((2, agents, 16), number), dims=("update", "agent", "feature"))
        assert np.isnan(tsne(p)["position"]).all()
        assert (pca(p)["position"] == 0).all()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tsne_is_fast_enough_for_a_page():
    started = time.process_time()
    tsne(points(walk(10, 8)))
    assert time.process_time() - started < 5  # 0.4 s on an idle machine


@pytest.mark.slow  # umap-learn compiles itself
@pytest.mark.parametrize(("agents", "neighbours"), [(4, 3), (30, 15)])
def test_umap_is_umap_learns_with_the_same_seed(agents, neighbours):
    UMAP = pytest.importorskip("umap").UMAP
    rows = walk(1, agents)[0]
    expected = UMAP(n_neighbors=neighbours, init="random", random_state=3, n_jobs=1).fit_transform(
        rows
    )
    found = umap(rows, seed=3)
    np.testing.assert_array_equal(found, expected.astype(float))
    assert np.ptp(found, axis=0).min() > 0
