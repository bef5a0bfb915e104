"""Which agents are alike: an order and a tree of them from a matrix over pairs."""

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform


def similarity_tree(
    distance: Float[np.ndarray, "agent agent_other"],
) -> Float[np.ndarray, "merge 4"]:
    """Cluster agents by average linkage, with leaves ordered so that neighbours are alike.

    Args:
        distance: Distances, at least 2 by 2; what is not finite counts as the mean distance.

    Returns:
        SciPy's linkage matrix: which two clusters merge, at what mean distance, of how many agents.
    """
    pairs = squareform((distance + distance.T) / 2, checks=False).astype(float)
    finite = np.isfinite(pairs)
    pairs[~finite] = pairs[finite].mean() if finite.any() else 0.0
    pairs = np.maximum(pairs, 0.0)
    tree: Float[np.ndarray, "merge 4"] = optimal_leaf_ordering(linkage(pairs, "average"), pairs)
    return tree


def similarity_order(distance: Float[np.ndarray, "agent agent_other"]) -> list[int]:
    """Order agents so that those at small distance stand together.

    Args:
        distance: Distances; what is not finite counts as the mean distance.

    Returns:
        The agents' numbers.

    >>> similarity_order(np.array([[0, 9, 1], [9, 0, 5], [1, 5, 0.0]]))
    [1, 2, 0]
    """
    if len(distance) < 3:
        return list(range(len(distance)))
    return [int(agent) for agent in leaves_list(similarity_tree(distance))]


def clusters(distance: Float[np.ndarray, "agent agent_other"]) -> Int[np.ndarray, " agent"]:
    """Group agents where the tree has its longest branch.

    The cut is half-way between the two neighbouring merges that lie farthest apart, the distance 0
    of an agent to itself counting as the first; so all agents are one group only if they are alike.

    Args:
        distance: Distances; what is not finite counts as the mean distance.

    Returns:
        Each agent's group, numbered from 0 by first appearance.

    >>> clusters(np.array([[0, 9, 1], [9, 0, 9], [1, 9, 0.0]]))
    array([0, 1, 0])
    """
    if len(distance) < 2:
        return np.zeros(len(distance), dtype=int)
    tree = similarity_tree(distance)
    heights = np.concatenate([[0.0], tree[:, 2]])
    gaps = np.diff(heights)
    largest = int(gaps.argmax())
    if gaps[largest] <= 0:
        return np.zeros(len(distance), dtype=int)
    cut = (heights[largest] + heights[largest + 1]) / 2
    found = fcluster(tree, cut, criterion="distance")
    _, first, group = np.unique(found, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return np.asarray(rank[group.reshape(-1)])
