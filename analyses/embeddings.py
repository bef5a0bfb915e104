"""Agents' embeddings over training, projected to the plane.

PCA is fitted once on all updates, so its points move only when the embeddings do. t-SNE is fitted
anew at each update, started from the one before; its distances, sizes and gaps mean little
(Wattenberg et al., "How to Use t-SNE Effectively", 2016).
"""

import warnings

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness

from gradlab.extras import require
from gradlab.metrics.procrustes import procrustes, procrustes_path

MIN_DISTINCT = 4  # below that, every arrangement in the plane is about as good as another
_SEED_ITERATIONS = 500
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


def tsne(points: xr.DataArray, seed: int = 0, scale: float = 1.0) -> xr.Dataset:
    """Arrange the agents by t-SNE at each update.

    Agents with identical rows count once and share a position: scikit-learn's default start
    crashes the process on them. The first update starts from the joint PCA, each later one from
    the positions before, which keeps the picture from jumping more than the embeddings do.

    Args:
        points: Embeddings [update, agent, feature]; rows with a non-finite number are left out.
        seed: Of the tiny displacement that parts agents which were identical before.
        scale: Times the usual perplexity.

    Returns:
        `position` [update, agent, component], `perplexity` [update] as `perplexity_for` gives it,
        `distinct` [update] rows, and `reason` [update]: why there are no positions (NaN), or
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
        perplexity[update] = perplexity_for(len(data), scale)
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


def perplexity_for(distinct: int, scale: float = 1.0) -> float:
    """Choose t-SNE's perplexity, about how many neighbours of a point count as near.

    Args:
        distinct: How many distinct rows there are.
        scale: Times the usual one.

    Returns:
        clip((distinct - 1) / 3, 1, 30) times the scale, from 1 to below the number of rows.

    >>> perplexity_for(4), perplexity_for(31), perplexity_for(31, 2.0)
    (1.0, 10.0, 20.0)
    """
    usual = min(max((distinct - 1) / 3, 1.0), 30.0)
    return float(min(max(usual * scale, 1.0), distinct - 1.0))


def tsne_of_seed(
    rows: Float[np.ndarray, "agent feature"], seed: int, scale: float = 1.0
) -> tuple[Float[np.ndarray, "agent 2"], float]:
    """Arrange agents by t-SNE from a random start, for comparing seeds.

    Agents with identical rows count once.

    Args:
        rows: Embeddings; all finite, with at least `MIN_DISTINCT` distinct ones.
        seed: Of the start.
        scale: Times the usual perplexity.

    Returns:
        Positions, as scikit-learn's `TSNE(perplexity=..., init="random", method="exact",
        max_iter=500, random_state=seed)` gives them; and how far those who are neighbours in the
        picture are neighbours in the rows, see `trust`.
    """
    data, _, group = _distinct_rows(rows)
    found = TSNE(
        perplexity=perplexity_for(len(data), scale),
        init="random",
        method="exact",
        max_iter=_SEED_ITERATIONS,
        random_state=seed,
    ).fit_transform(data)
    return np.asarray(found[group], dtype=float), trust(data, found)


def trust(
    rows: Float[np.ndarray, "agent feature"], position: Float[np.ndarray, "agent component"]
) -> float:
    """Measure whether those who are near in a picture are near in the rows.

    Args:
        rows: Embeddings.
        position: Their picture.

    Returns:
        Trustworthiness for up to 5 neighbours, from 0 to 1 (Venna and Kaski, 2001); NaN for fewer
        than 5 agents.
    """
    neighbours = min(5, (len(rows) - 1) // 2)
    if len(rows) < 5:
        return float("nan")
    return float(trustworthiness(rows, position, n_neighbors=neighbours))


def classical_mds(
    distance: Float[np.ndarray, "agent agent_other"], components: int = 2
) -> tuple[Float[np.ndarray, "agent component"], Float[np.ndarray, " component"]]:
    r"""Place agents so that their distances in the plane come near to given ones.

    Torgerson's scaling (1952): the leading eigenvectors of
    :math:`-\frac12 C D^{\circ 2} C` with the centring matrix C, times the
    roots of their eigenvalues.

    Args:
        distance: Symmetric distances; all finite.
        components: How many axes.

    Returns:
        Positions, zero along axes without a positive eigenvalue; and each axis' share of the sum of
        the positive eigenvalues, NaN if there are none.
    """
    agents = len(distance)
    centring = np.eye(agents) - 1 / agents
    values, vectors = np.linalg.eigh(-centring @ np.square(distance) @ centring / 2)
    order = np.argsort(values)[::-1]
    largest = max(float(np.abs(values).max(initial=0.0)), 0.0)
    values = np.where(values[order] > 1e-12 * largest, values[order], 0.0)
    vectors = vectors[:, order]
    # The largest entry is positive, whatever the linear algebra library prefers.
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(agents)])
    kept = min(components, agents)
    position = np.zeros((agents, components))
    position[:, :kept] = (vectors * signs * np.sqrt(values))[:, :kept]
    share = np.full(components, np.nan)
    if values.sum() > 0:
        share[:] = 0.0
        share[:kept] = values[:kept] / values.sum()
    return position, share


def mds_path(
    distances: Float[np.ndarray, "update agent agent_other"],
) -> tuple[Float[np.ndarray, "update agent 2"], Float[np.ndarray, "update 2"]]:
    """Place agents in the plane at each update, each turned onto the one before.

    Args:
        distances: Symmetric distances; where one is not finite, the update's positions are NaN.

    Returns:
        Positions, which classical scaling leaves open up to a turn or reflection; and the axes'
        shares before that turn.
    """
    position = np.full((*distances.shape[:2], 2), np.nan)
    share = np.full((len(distances), 2), np.nan)
    previous: Float[np.ndarray, "agent 2"] | None = None
    for update, distance in enumerate(distances):
        if not np.isfinite(distance).all():
            continue
        placed, share[update] = classical_mds(distance)
        if previous is not None:
            placed = procrustes(previous, placed).aligned.to_numpy()
        position[update] = previous = placed
    return position, share


def umap(rows: Float[np.ndarray, "agent feature"], seed: int = 0) -> Float[np.ndarray, "agent 2"]:
    """Arrange agents by UMAP (McInnes, Healy and Melville, 2018).

    Args:
        rows: Embeddings; all finite.
        seed: Of the arrangement.

    Returns:
        Positions, as umap-learn gives them for all other agents, or 15, as neighbours.

    Raises:
        UsageError: If umap-learn is not installed.
    """
    require("umap", "umap", needs="UMAP needs")
    from umap import UMAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed makes it slower
        fitted = UMAP(
            n_neighbors=min(15, len(rows) - 1), init="random", random_state=seed
        ).fit_transform(rows)
    return np.asarray(fitted, dtype=float)


def aligned(points: xr.DataArray) -> tuple[xr.DataArray, Float[np.ndarray, " update"]]:
    """Turn each update's rows onto those before, so that only changes of the arrangement are left.

    Args:
        points: Embeddings [update, agent, feature].

    Returns:
        The rows of updates at which all are finite, turned; and the residual of each turn
        (`gradlab.procrustes_path`), NaN at the first.
    """
    kept = points.isel(update=np.isfinite(points.to_numpy()).all(axis=(1, 2)))
    if not kept.size:
        return kept, np.empty(0)
    found = procrustes_path(kept.to_numpy().astype(float), translation=True)
    return kept.copy(data=found.aligned.to_numpy()), found.disparity.to_numpy()


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
