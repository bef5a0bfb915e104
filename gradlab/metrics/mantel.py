"""Mantel's test: are agents that are far apart in one matrix so in another?

Mantel, "The detection of disease clustering and a generalized regression approach", 1967. Pairs of
agents are not independent, as every agent is in several; so the agents are permuted, not the pairs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

from gradlab.checks import UsageError, check
from gradlab.metrics.permutation import NOT_DEFINED, PermutationTest, permutation_test
from gradlab.metrics.rows import Array, float64
from gradlab.quantity import Quantity

Matrix = Float[np.ndarray, "agent agent_other"]

CORRELATIONS = ("pearson", "spearman")
_MIN_AGENTS = 3  # two agents make a single pair
_CONSTANT = 1e-6  # relative; embeddings kept in float32 know their distances no better


def measure_mantel(
    distance: Matrix, others: Mapping[str, Array | None], *, permutations: int, seed: int
) -> dict[str, Quantity]:
    """Correlate a distance with other matrices, over pairs of agents.

    Args:
        distance: Between agents.
        others: Symmetric matrices [agent, agent_other] by name; None for one that is not known.
            Agents without any finite value are left out.
        permutations: As for `permutation_test`.
        seed: As for `permutation_test`.

    Returns:
        `mantel` and `mantel_p_value` over (compared_with, correlation), `mantel_agents` over
        (compared_with), as `gradlab.geometry` documents them.

    Raises:
        UsageError: If a matrix does not fit the agents, or is not symmetric.
    """
    values, p_values = np.full((2, len(others), len(CORRELATIONS)), np.nan)
    left = np.full(len(others), np.nan)
    how = []
    for number, (name, array) in enumerate(others.items()):
        tests = [NOT_DEFINED] * len(CORRELATIONS)
        if array is not None:
            matrix = _symmetric(name, array, len(distance))
            off_diagonal = ~np.eye(len(matrix), dtype=bool)
            known = (np.isfinite(matrix) & off_diagonal).any(axis=1)
            left[number] = known.sum()
            both = (m[np.ix_(known, known)] for m in (distance, matrix))
            tests = _tests(*both, permutations=permutations, seed=seed)
        values[number] = [test.value for test in tests]
        p_values[number] = [test.p_value for test in tests]
        how.append(f"{name}: {'not given' if array is None else tests[0].how}")
    labels: dict[str, Sequence[str]] = {"compared_with": list(others), "correlation": CORRELATIONS}

    def quantity(values: NDArray[np.float64], estimator: str) -> Quantity:
        dims = tuple(labels)[: values.ndim]
        coords = {dim: labels[dim] for dim in dims}
        return Quantity(values=values, dims=dims, coords=coords, unit="1", estimator=estimator)

    return {
        "mantel": quantity(values, "correlation over pairs of agents"),
        "mantel_p_value": quantity(p_values, f"two-sided; {'; '.join(how)}"),
        "mantel_agents": quantity(left, "agents with a value for any pair; NaN: not given"),
    }


def _symmetric(name: str, array: Array, agents: int) -> Matrix:
    matrix = float64(name, array, ("agent", "agent_other"), finite=False)
    check(matrix.shape == (agents, agents), f"{name}.shape", f"be {(agents,) * 2}", matrix.shape)
    size = np.abs(matrix[np.isfinite(matrix)]).max(initial=0.0)
    differs = ~np.isclose(matrix, matrix.T, rtol=0, atol=_CONSTANT * size, equal_nan=True)
    if differs.any():
        i, k = np.argwhere(differs)[0]
        raise UsageError(
            f"`{name}` must be symmetric. Got {matrix[i, k]} for agents {i}, {k} and "
            f"{matrix[k, i]} for {k}, {i}. The mean of it and its transpose is symmetric."
        )
    return matrix


def _tests(
    distance: Matrix, other: Matrix, *, permutations: int, seed: int
) -> list[PermutationTest]:
    """One test for each kind of correlation."""
    agents = len(distance)
    first, second = np.triu_indices(agents, k=1)
    sides = distance[first, second], other[first, second]
    if agents < _MIN_AGENTS or not np.isfinite(sides[1]).all() or any(map(_constant, sides)):
        return [NOT_DEFINED] * len(CORRELATIONS)
    tests = []
    for correlation in CORRELATIONS:
        ranked = map(rankdata, sides) if correlation == "spearman" else sides
        ours, theirs = (_standardised(side) for side in ranked)
        matrix = squareform(theirs)

        def correlate(
            order: Int[np.ndarray, "arrangement agent"],
            ours: Float[np.ndarray, " pair"] = ours,
            matrix: Matrix = matrix,
        ) -> Float[np.ndarray, " arrangement"]:
            found: Float[np.ndarray, " arrangement"] = (
                matrix[order[:, first], order[:, second]] @ ours
            )
            return found

        own = np.arange(agents)
        tests.append(permutation_test(correlate, own, permutations=permutations, seed=seed))
    return tests


def _constant(pairs: Float[np.ndarray, " pair"]) -> bool:
    return bool(np.ptp(pairs) <= _CONSTANT * np.abs(pairs).max())


def _standardised(pairs: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """Mean 0 and length 1, so that a correlation is an inner product."""
    centred: Float[np.ndarray, " pair"] = pairs - pairs.mean()
    centred /= np.abs(centred).max()  # squares of small numbers vanish
    centred /= np.linalg.norm(centred)
    return centred
