"""Permutation test of labelled agents over seeds: labels are permuted within each seed.

Agents of one seed are alike before training, whichever goal is theirs; if goals made no difference,
any other assignment of them would be as likely to give a statistic as large. Seeds are independent,
so each has its own arrangement (Good, "Permutation, Parametric, and Bootstrap Tests of Hypotheses",
2005, on tests in blocks). The observed arrangement counts, and a p-value is never 0 (Phipson and
Smyth, "Permutation p-values should never be zero", 2010).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from analyses.studies.verdict import Outcome, Verdict

LEVEL = 0.05
_EXACT = 200_000
_DRAWN = 100_000
_TIE = 1e-12  # sums of the same numbers in another order


@dataclass(frozen=True, kw_only=True)
class Relabelled:
    """What a permutation test within seeds found.

    Attributes:
        value: Mean over seeds of the statistic as observed.
        more: Share of arrangements whose mean is at least as large.
        less: Share of arrangements whose mean is at most as large.
        how: Over which arrangements.
    """

    value: float
    more: float
    less: float
    how: str

    def verdict(self, claim: str, said: str) -> Verdict:
        """Judge the claim that the statistic is larger than labels by chance make it.

        Args:
            claim: The claim.
            said: What to say of the statistic.

        Returns:
            Supported if at most `LEVEL` of the arrangements reach it, not supported if as few lie
            as low, else undecided.
        """
        outcome: Outcome = "undecided"
        if self.more <= LEVEL:
            outcome = "supported"
        elif self.less <= LEVEL:
            outcome = "not supported"
        return Verdict(claim=claim, outcome=outcome, evidence=f"{said}; {self.text()}")

    def text(self) -> str:
        """Write the test down.

        Returns:
            E.g. "p = 0.0002, 59,049 arrangements".
        """
        return f"p = {self.more:.2g}, {self.how}" if math.isfinite(self.more) else "no p"


def partitions(labels: Sequence[int]) -> Int[np.ndarray, "arrangement agent"]:
    """List the ways to share out labels, which are the same but for their names.

    Args:
        labels: Each agent's label.

    Returns:
        Labels numbered by their first agent; the observed ones first.

    >>> partitions([0, 0, 1, 1]).tolist()
    [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    """
    found = {tuple(_by_first(order)): None for order in (labels, *permutations(labels))}
    return np.array(list(found))


def _by_first(labels: Sequence[int]) -> list[int]:
    names: dict[int, int] = {}
    return [names.setdefault(label, len(names)) for label in labels]


def gaps(
    distance: Float[np.ndarray, "agent agent_other"], labels: Sequence[int]
) -> Float[np.ndarray, " arrangement"]:
    """How much further apart agents of different labels are than those of the same.

    Args:
        distance: Symmetric distances between agents.
        labels: Each agent's label, of at least two kinds, one of them with two agents.

    Returns:
        Mean distance of pairs with different labels less that of pairs with the same, over the mean
        of all pairs; for the labels as they are, and then for every other way to share them out. 0
        if all distances are.
    """
    one, other = np.triu_indices(len(distance), 1)
    pairs = distance[one, other]
    ways = partitions(labels)
    same = ways[:, one] == ways[:, other]
    apart = (pairs * ~same).sum(1) / (~same).sum(1) - (pairs * same).sum(1) / same.sum(1)
    found: Float[np.ndarray, " arrangement"] = apart / (pairs.mean() or 1.0)
    return found


def correlations(
    distance: Float[np.ndarray, "agent agent_other"],
    other: Float[np.ndarray, "agent agent_other"],
) -> Float[np.ndarray, " arrangement"]:
    """Correlate two distances over pairs of agents, as Mantel's test does.

    Args:
        distance: Symmetric distances between agents.
        other: Other ones.

    Returns:
        Spearman's correlation, and that for every other order of the second one's agents; NaN
        where one of them is constant.
    """
    agents = len(distance)
    pair = np.triu_indices(agents, 1)
    ours = stats.rankdata(distance[pair])
    ranks = np.zeros((agents, agents))
    ranks[pair] = stats.rankdata(other[pair])
    ranks += ranks.T
    orders = np.array(list(permutations(range(agents))))
    theirs = ranks[orders[:, pair[0]], orders[:, pair[1]]]
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return np.full(len(orders), np.nan)
    centred = theirs - theirs.mean(1, keepdims=True)
    with_ours = centred @ (ours - ours.mean())
    found: Float[np.ndarray, " arrangement"] = with_ours / (
        np.linalg.norm(centred, axis=1) * np.linalg.norm(ours - ours.mean())
    )
    return found


def within_seeds(
    of_seeds: Sequence[Float[np.ndarray, " arrangement"]], *, seed: int = 0
) -> Relabelled:
    """Test the mean over seeds of a statistic, each seed's labels permuted by themselves.

    Args:
        of_seeds: For each seed the statistic of all its arrangements, the observed one first;
            seeds in which it is not known do not count.
        seed: Of the arrangements that are drawn, where there are too many.

    Returns:
        The mean and its place among all combinations of arrangements, if there are at most
        200,000, else among 100,000 drawn ones and the observed one. NaN without any seed.
    """
    known = [values for values in of_seeds if np.isfinite(values).all()]
    if not known:
        return Relabelled(value=math.nan, more=math.nan, less=math.nan, how="no seeds")
    number = math.prod(map(len, known))
    if number <= _EXACT:
        sums = np.zeros(1)
        for values in known:
            sums = np.add.outer(sums, values).ravel()
        how = f"all {number:,} arrangements within {len(known)} seeds"
    else:
        random = np.random.default_rng(seed)
        drawn = sum(random.choice(values, _DRAWN) for values in known)
        sums = np.append(sum(values[0] for values in known), drawn)
        how = f"{_DRAWN:,} random arrangements within {len(known)} seeds"
    means = sums / len(known)
    value = float(means[0])
    return Relabelled(
        value=value,
        more=float((means >= value - _TIE).mean()),
        less=float((means <= value + _TIE).mean()),
        how=how,
    )
