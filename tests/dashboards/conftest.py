"""Small runs of every method, and made-up ones of shapes that no small training has."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from playwright.sync_api import sync_playwright

from gradlab.run import Run, open_run
from gradlab.run_writer import RunWriter
from trainers.config import TrainConfig
from trainers.train import train_run

NETWORKS = ["actor", "critic"]
SPACES = ["psi", "theta"]
LAYERS = ["all", "layer0", "layer1", "head", "log_std", "embedding"]


METHODS = ("hypermarl", "fups", "fups-id", "nops", "hypermarl-linear", "hypermarl-coupled")
SMALL = {
    "env": "specialisation",
    "copies": 8,
    "steps": 8,
    "frames": 8 * 8 * 3,
    "diagnostics": "full",
    "every": 1,
    "effects_every": 1,
    "evaluation": {"every": 2, "episodes": 4},
}


@pytest.hookimpl(tryfirst=True)  # before the groups are looked at
def pytest_collection_modifyitems(items):
    """Keep the tests of this folder in one process, which then trains and opens pages once."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("dashboards"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of each method, of three updates; and a second seed of the first."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {}
    for name, method, seed in [*((m, m, 0) for m in METHODS), ("hypermarl-seed1", METHODS[0], 1)]:
        # t-SNE, which takes longest to draw, needs four agents: one method's runs are enough.
        agents = 4 if method == METHODS[0] else 3
        settings = SMALL | {"method": method, "seed": seed, "agents": agents}
        train_run(TrainConfig.model_validate(settings), folder / name)
        runs[name] = open_run(folder / name)
    return runs


@pytest.fixture(scope="session")
def browser():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path:
        pytest.fail("no chromium: install it, or set CHROMIUM to a browser's path")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=flags.split())
        yield started
        started.close()


@pytest.fixture(name="write_run", scope="session")
def _write_run():
    return write_run


def write_run(
    path: Path,
    *,
    agents: int = 4,
    updates: int = 20,
    every: int = 2,
    method: str = "hypermarl",
    names: list[str] | None = None,
    embeddings: str = "walk",
    variance: bool = True,
    diagnostics: bool = True,
    seed: int = 0,
) -> Run:
    """`embeddings` is "walk", "equal" (all agents the same), or "none"."""
    rng = np.random.default_rng(seed)
    structural = method == "nops"
    vectors = rng.normal(size=(2, 2, len(LAYERS), agents, 5))
    points = rng.normal(size=(2, agents, 8))
    with RunWriter(path) as writer:
        writer.describe(
            method=method,
            environment="navigation",
            agents=agents,
            seed=seed,
            config={},
            state="done",
            updates=updates,
            agent_names=names or [f"agent_{i}" for i in range(agents)],
        )
        for update in range(updates):
            ended = update % 5 != 3
            values = {
                "frames": _array(np.int64((update + 1) * 6000), "frames"),
                "episode_return": _array(
                    -80 * np.exp(-update / updates * 3) + 3 * rng.normal() if ended else np.nan
                ),
            }
            if diagnostics and update % every == 0:
                vectors = vectors + 0.4 * rng.normal(size=vectors.shape)
                points = points + 0.25 * rng.normal(size=points.shape)
                values |= _gradients(vectors, structural=structural)
                if variance:
                    values |= _variances(rng, update)
                if embeddings != "none":
                    rows = points if embeddings == "walk" else np.ones_like(points)
                    values |= {
                        f"embedding_{network}": xr.DataArray(
                            rows[n],
                            dims=("agent", "feature"),
                            coords={"agent": range(agents), "feature": range(8)},
                            attrs={"unit": "", "estimator": "learned embedding"},
                        )
                        for n, network in enumerate(NETWORKS)
                    }
            writer.write(update, values)
    return open_run(path)


def _array(value: object, unit: str = "") -> xr.DataArray:
    return xr.DataArray(np.asarray(value), attrs={"unit": unit, "estimator": "exact"})


def _gradients(vectors: np.ndarray, *, structural: bool) -> dict[str, xr.DataArray]:
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    cosine = np.clip(np.einsum("nslap,nslbp->nslab", unit, unit), -1, 1)
    agents = cosine.shape[-1]
    off = ~np.eye(agents, dtype=bool)
    if structural:
        cosine[:, 0][..., off] = 0.0
    cosine[:, 1, LAYERS.index("embedding")] = np.nan  # only the trained parameters have it
    cosine[0, :, LAYERS.index("head"), 0, :] = np.nan  # one agent without a gradient
    cosine[0, :, LAYERS.index("head"), :, 0] = np.nan
    pairs = cosine[..., off]
    if pairs.shape[-1]:
        undefined = np.isnan(pairs).all(axis=-1)
        safe = np.where(undefined[..., None], 0.0, pairs)
        rate = np.where(undefined, np.nan, np.nanmean(safe < 0, axis=-1))
        mean = np.where(undefined, np.nan, np.nanmean(safe, axis=-1))
    else:
        rate = mean = np.full(cosine.shape[:3], np.nan)
    labels = {"network": NETWORKS, "space": SPACES, "layer": LAYERS}
    attrs = {"unit": "", "estimator": "plug-in, one batch"}
    return {
        "cosine": xr.DataArray(
            cosine,
            dims=(*labels, "agent", "agent_other"),
            coords=labels | {"agent": range(agents), "agent_other": range(agents)},
            attrs=attrs,
        ),
        "conflict_rate": xr.DataArray(rate, dims=tuple(labels), coords=labels, attrs=attrs),
        "mean_cosine": xr.DataArray(mean, dims=tuple(labels), coords=labels, attrs=attrs),
    }


def _variances(rng: np.random.Generator, update: int) -> dict[str, xr.DataArray]:
    labels = {"network": NETWORKS, "layer": LAYERS}
    shape = (len(NETWORKS), len(LAYERS))
    return {
        f"variance_{part}": xr.DataArray(
            size * np.exp(-update / 30) * np.exp(0.3 * rng.normal(size=shape)),
            dims=tuple(labels),
            coords=labels,
            attrs={"unit": "squared gradient", "estimator": "unbiased"},
        )
        for part, size in (("within", 20.0), ("between", 1.0))
    }
