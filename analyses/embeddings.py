"""Agents' embeddings over training, projected to the plane.

PCA is fitted once on all updates, so its points move only when the embeddings do. t-SNE is fitted
anew at each update, started from the one before; its distances, sizes and gaps mean little
(Wattenberg et al., "How to Use t-SNE Effectively", 2016).
"""

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

MIN_DISTINCT = 4  # below that, every arrangement in the plane is about as good as another
_COLD_ITERATIONS = 750  # the cost no longer falls after that; 0.04 s for 8 agents, 0.1 s for 30
# Measured on random walks of 4 to 30 agents, this warm start ends at the lowest cost and moves the
# picture least: a wider start gets stuck when agents swap, a larger step size overshoots.
_WARM_ITERATIONS = 250  # scikit-learn's minimum
_WARM_STEP = 10.0
_WARM_SPREAD = 30.0
_COLD_SPREAD = 1e-4  # scikit-learn's


def pca(points: xr.DataArray, components: int = 2) -> xr.Dataset:
    """Project all updates with one principal component analysis.

    Args:
        points: Embeddings [update, agent, feature]; rows with a non-finite number are left out.
        components: How many principal components.

    Returns:
        `position` [update, agent, component], NaN for the rows left out, and
        `explained_variance_ratio` [component], NaN if all rows are identical. Components beyond
        the number of features or rows are zero.
    """
    rows = points.to_numpy().astype(float)
    position = np.full((*rows.shape[:2], components), np.nan)
    ratio = np.full(components, np.nan)
    finite = np.isfinite(rows).all(axis=-1)
    if finite.any():
        data, scale = _centred_and_scaled(rows[finite])
        position[finite] = 0.0
        if (data != data[0]).any():
            fitted = PCA(min(components, *data.shape), svd_solver="full").fit(data)
            # The largest loading is positive, whatever the linear algebra library prefers.
            largest = np.abs(fitted.components_).argmax(axis=1)
            signs = np.sign(fitted.components_[np.arange(len(largest)), largest])
            kept = len(signs)
            position[finite, :kept] = fitted.transform(data) * signs * scale
            ratio[:] = 0.0
            ratio[:kept] = fitted.explained_variance_ratio_
    return xr.Dataset(
        {
            "position": (("update", "agent", "component"), position),
            "explained_variance_ratio": ("component", ratio),
        },
        coords={
            "update": points["update"].to_numpy(),
            "agent": _labels(points, "agent"),
            "component": range(1, components + 1),
        },
    )


def tsne(points: xr.DataArray, seed: int = 0) -> xr.Dataset:
    """Arrange the agents by t-SNE at each update.

    Agents with identical rows count once and share a position: scikit-learn's default start
    crashes the process on them. The first update starts from the joint PCA, each later one from
    the positions before, which keeps the picture from jumping more than the embeddings do.

    Args:
        points: Embeddings [update, agent, feature]; rows with a non-finite number are left out.
        seed: Of the tiny displacement that parts agents which were identical before.

    Returns:
        `position` [update, agent, component], `perplexity` [update] = clip((distinct - 1) / 3, 1,
        30), `distinct` [update] rows, and `reason` [update]: why there are no positions (NaN), or
        empty.
    """
    rows = points.to_numpy().astype(float)
    updates, agents = rows.shape[:2]
    position = np.full((updates, agents, 2), np.nan)
    perplexity = np.full(updates, np.nan)
    distinct = np.zeros(updates, dtype=int)
    reason = [""] * updates
    # t-SNE is blind to scale; unit size keeps squares of the start from overflowing.
    largest = np.abs(rows, where=np.isfinite(rows), out=np.zeros_like(rows)).max(initial=0.0)
    start = pca(points / largest if largest else points)["position"].to_numpy()
    rng = np.random.default_rng(seed)
    previous: Float[np.ndarray, "agent 2"] | None = None
    for update in range(updates):
        finite = np.isfinite(rows[update]).all(axis=-1)
        data, first, group = _distinct_rows(rows[update][finite])
        distinct[update] = len(data)
        if len(data) < MIN_DISTINCT:
            reason[update] = _too_few(len(data), agents, agents - int(finite.sum()))
            continue
        perplexity[update] = np.clip((len(data) - 1) / 3, 1, 30)
        warm = previous is not None and bool(np.isfinite(previous[finite]).all())
        known = previous if warm and previous is not None else start[update]
        size = float(known[finite].std())
        spread = np.clip(size, _COLD_SPREAD, _WARM_SPREAD) if warm else _COLD_SPREAD
        origin = _start(known[finite][first], rng, spread)
        found = TSNE(
            perplexity=perplexity[update],
            init=origin,
            method="exact",
            max_iter=_WARM_ITERATIONS if warm else _COLD_ITERATIONS,
            # Exaggeration would first pull the earlier picture together again.
            early_exaggeration=1.0 if warm else 12.0,
            learning_rate=_WARM_STEP if warm else "auto",
            random_state=seed,
        ).fit_transform(data)
        position[update, finite] = found[group]
        previous = position[update]
    return xr.Dataset(
        {
            "position": (("update", "agent", "component"), position),
            "perplexity": ("update", perplexity),
            "distinct": ("update", distinct),
            "reason": ("update", np.array(reason, dtype=object)),
        },
        coords={
            "update": points["update"].to_numpy(),
            "agent": _labels(points, "agent"),
            "component": [1, 2],
        },
    )


def _labels(points: xr.DataArray, dim: str) -> np.ndarray:
    return points[dim].to_numpy() if dim in points.coords else np.arange(points.sizes[dim])


def _centred_and_scaled(
    rows: Float[np.ndarray, "row feature"],
) -> tuple[Float[np.ndarray, "row feature"], float]:
    """Bring numbers to the unit range, so that squares of very large ones do not overflow."""
    if not rows.size:
        return rows, 1.0
    size = float(np.abs(rows).max())
    if size == 0:
        return rows, 1.0
    scaled = rows / size
    same = (scaled == scaled[0]).all()
    # The mean of identical numbers need not be exactly that number.
    return scaled - (scaled[0] if same else scaled.mean(axis=0)), size


def _distinct_rows(
    rows: Float[np.ndarray, "row feature"],
) -> tuple[
    Float[np.ndarray, "distinct feature"], Int[np.ndarray, " distinct"], Int[np.ndarray, " row"]
]:
    """Collapse rows that are identical to t-SNE, i.e. after scaling.

    Returns the distinct rows, the position of the first row of each kind, and each row's kind.
    """
    scaled, _ = _centred_and_scaled(rows)
    spread = float(np.abs(scaled).max(initial=0.0))
    # Squared distances below the smallest float would make distinct rows identical again.
    scaled = scaled / spread if spread > 0 else scaled
    distinct, first, group = np.unique(scaled, axis=0, return_index=True, return_inverse=True)
    return distinct, first, group.reshape(-1)


def _start(
    known: Float[np.ndarray, "distinct 2"], rng: np.random.Generator, spread: float
) -> Float[np.ndarray, "distinct 2"]:
    """Make the initial positions: scaled to a standard deviation along the first axis."""
    centred = known - known.mean(axis=0)
    size = float(centred[:, 0].std()) or float(centred[:, 1].std()) or 1.0
    start = centred / size * spread
    # Coinciding points, or points on a line, would pull each other along that line for ever.
    if len(np.unique(start, axis=0)) < len(start) or not start.std(axis=0).all():
        start = start + rng.normal(scale=spread / 100, size=start.shape)
    return np.asarray(start, dtype=np.float32)


def _too_few(distinct: int, agents: int, left_out: int) -> str:
    if agents < MIN_DISTINCT:
        noun = "agent" if agents == 1 else "agents"
        return f"{agents} {noun}: t-SNE needs at least {MIN_DISTINCT}"
    points = "point" if distinct == 1 else "points"
    lost = f" ({left_out} not finite)" if left_out else ""
    return (
        f"{distinct} distinct {points} of {agents} agents{lost}: "
        f"t-SNE needs at least {MIN_DISTINCT}"
    )
