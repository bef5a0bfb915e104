r"""How agents' embeddings (or any rows of theirs) are arranged, and what goes along with it.

With N agents there are few numbers to say much from: at most N - 1 dimensions can be seen, and few
permutations exist, which bounds every p-value from below.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from scipy.linalg import svdvals
from scipy.spatial.distance import pdist, squareform
from scipy.special import entr
from torch import Tensor

from gradlab.checks import check
from gradlab.metrics.mantel import Matrix, measure_mantel
from gradlab.metrics.permutation import NOT_DEFINED, permutation_test
from gradlab.metrics.rows import Array, float64
from gradlab.quantity import Quantity, dataset

Groups = Sequence[Hashable] | Int[Tensor, " agent"] | np.ndarray


def geometry(
    rows: Array,
    *,
    groups: Groups | None = None,
    behavioural_distance: Array | None = None,
    interference: Array | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> xr.Dataset:
    r"""Distances, spread and dimension of agents' rows, and what they go along with.

    Args:
        rows: One row [agent, feature] for each agent: its embedding, ID column or weights.
        groups: A label for each agent, e.g. its goal.
        behavioural_distance: Symmetric [agent, agent_other], as of `gradlab.diversity`.
        interference: Symmetric [agent, agent_other]: cosines of the agents' gradients, as of
            `gradlab.interference`. In both only pairs of different agents are read, and agents
            without any finite value, as those with a zero gradient, are left out.
        permutations: How many rearrangements of the agents a test draws; it takes all, exactly, if
            there are no more. A p-value is (b + 1) / (m + 1), two-sided, for b of m at least as
            extreme, so never 0 (Phipson and Smyth, 2010), and not corrected for several tests.
        seed: Of the draws.

    Returns:
        Over (agent, agent_other):

        - `embedding_cosine`: NaN for a row of zeros
        - `embedding_distance`: Euclidean, in units of the rows

        scalars about `groups`, NaN without them:

        - `within_distance`, `between_distance`: means of the distance over pairs of one group, and
          of two groups; NaN where there is no such pair
        - `group_difference`: between minus within, positive where groups lie apart; and
          `group_p_value`, from permuting the labels; NaN where either mean is

        scalars about the centred rows' covariance, with eigenvalues l, NaN for a single agent or
        identical rows, which have no variance to share out:

        - `effective_rank` :math:`= \exp(-\sum p \log p)`, :math:`p = l / \sum l` (Roy and Vetterli,
          "The effective rank", 2007, Def. 1, of the covariance)
        - `participation_ratio` :math:`= (\sum l)^2 / \sum l^2`
        - `rank_ceiling`: the most that either can be, the smaller of N - 1 and the features

        and Mantel's statistics (Mantel, 1967) over (compared_with, correlation), i.e.
        ("behavioural_distance" or "interference", "pearson" or "spearman"):

        - `mantel`: correlation over pairs of agents with the embedding distance; NaN where the
          matrix is not given, either is constant (to a millionth), fewer than three agents are
          left, or one of their pairs has no value
        - `mantel_p_value`, from permuting the agents of one matrix

        over (compared_with): `mantel_agents`, the number of agents that are left.

    Raises:
        UsageError: If a row has a number that is not finite (the message names the agent), if
            groups or matrices do not fit the agents, or if a matrix is not symmetric.

    >>> corners = np.array([[0.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
    >>> geometry(corners, groups=["left", "left", "right"]).within_distance.item()
    3.0
    """
    return dataset(
        measure_geometry(
            rows,
            groups=groups,
            behavioural_distance=behavioural_distance,
            interference=interference,
            permutations=permutations,
            seed=seed,
        )
    )


def measure_geometry(
    rows: Array,
    *,
    groups: Groups | None = None,
    behavioural_distance: Array | None = None,
    interference: Array | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> dict[str, Quantity]:
    """What `geometry` labels.

    Args:
        rows: As for `geometry`.
        groups: As for `geometry`.
        behavioural_distance: As for `geometry`.
        interference: As for `geometry`.
        permutations: As for `geometry`.
        seed: As for `geometry`.

    Returns:
        The quantities by name.

    Raises:
        UsageError: As for `geometry`.
    """
    check(permutations >= 1, "permutations", "be at least 1", permutations)
    values = float64("rows", rows, ("agent", "feature"))
    agents = len(values)
    # Squares of very large or small numbers would leave the range of floats.
    size = float(np.abs(values).max()) or 1.0
    unit = values / size
    spacing = squareform(pdist(unit))
    labels: dict[str, Sequence[Any]] = {"agent": range(agents), "agent_other": range(agents)}
    return {
        "embedding_cosine": Quantity(
            values=_cosines(values),
            dims=tuple(labels),
            coords=labels,
            unit="1",
            estimator="exact; NaN: a row of zeros",
        ),
        "embedding_distance": Quantity(
            values=spacing * size,
            dims=tuple(labels),
            coords=labels,
            unit="embedding",
            estimator="exact, Euclidean",
        ),
        **_group_quantities(spacing, size, groups, permutations, seed),
        **_dimensions(unit),
        **measure_mantel(
            spacing,
            {"behavioural_distance": behavioural_distance, "interference": interference},
            permutations=permutations,
            seed=seed,
        ),
    }


def _cosines(values: Float[np.ndarray, "agent feature"]) -> Matrix:
    with np.errstate(invalid="ignore"):
        scaled = values / np.abs(values).max(axis=1, keepdims=True)
        directions = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
        cosines: Matrix = np.clip(directions @ directions.T, -1.0, 1.0)
    return cosines


def _dimensions(unit: Float[np.ndarray, "agent feature"]) -> dict[str, Quantity]:
    agents, features = unit.shape
    rank = ratio = np.nan
    reason = "NaN: a single agent" if agents == 1 else "NaN: all rows are identical"
    if (unit != unit[0]).any():
        centred = unit - unit.mean(axis=0)
        eigenvalues = svdvals(centred / np.abs(centred).max()) ** 2
        share = eigenvalues / eigenvalues.sum()
        rank, ratio = float(np.exp(entr(share).sum())), float(1 / np.square(share).sum())
        reason = f"plug-in, covariance of {agents} rows; few rows make it smaller"
    return {
        "effective_rank": Quantity.scalar(rank, estimator=reason),
        "participation_ratio": Quantity.scalar(ratio, estimator=reason),
        "rank_ceiling": Quantity.scalar(
            float(min(agents - 1, features)), estimator="the smaller of agents - 1 and features"
        ),
    }


def _group_quantities(
    spacing: Matrix, size: float, groups: Groups | None, permutations: int, seed: int
) -> dict[str, Quantity]:
    agents = len(spacing)
    first, second = np.triu_indices(agents, k=1)
    pairs = spacing[first, second]
    within = between = np.nan
    test = NOT_DEFINED
    if groups is not None:
        members = groups.tolist() if isinstance(groups, Tensor | np.ndarray) else list(groups)
        check(len(members) == agents, "groups", f"label each of {agents} agents", members)
        known = list(dict.fromkeys(members))
        codes = np.array([known.index(member) for member in members])
        same = codes[first] == codes[second]
        within = _mean(pairs[same])
        between = _mean(pairs[~same])
        largest = pairs.max(initial=0.0) or 1.0

        def difference(
            codes: Int[np.ndarray, "arrangement agent"],
        ) -> Float[np.ndarray, " arrangement"]:
            together = (codes[:, first] == codes[:, second]).astype(float)
            apart = 1 - together
            scaled = pairs / largest
            found: Float[np.ndarray, " arrangement"] = apart @ scaled / apart.sum(
                1
            ) - together @ scaled / together.sum(1)
            return found

        if same.any() and not same.all():
            test = permutation_test(difference, codes, permutations=permutations, seed=seed)
    missing = "NaN: no groups" if groups is None else "NaN: no such pair"

    def quantity(value: float, how: str, unit: str = "embedding") -> Quantity:
        estimator = missing if np.isnan(value) else how
        return Quantity.scalar(value, unit=unit, estimator=estimator)

    return {
        "within_distance": quantity(within * size, "mean over pairs of one group"),
        "between_distance": quantity(between * size, "mean over pairs of two groups"),
        "group_difference": quantity((between - within) * size, "between minus within"),
        "group_p_value": quantity(test.p_value, f"{test.how}, two-sided", "1"),
    }


def _mean(pairs: Float[np.ndarray, " pair"]) -> float:
    return float(pairs.mean()) if len(pairs) else np.nan
