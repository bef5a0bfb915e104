"""Permutation tests: is a statistic of labelled agents larger than relabelling them makes it?

A p-value counts the labelling that was observed among the possible ones, and so is never 0
(Phipson and Smyth, "Permutation p-values should never be zero", 2010).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Statistic = Callable[[Int[np.ndarray, "arrangement agent"]], Float[np.ndarray, " arrangement"]]

_TIE = 1e-12  # arrangements that are the same by symmetry differ by rounding
_NUMBERS_AT_ONCE = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class PermutationTest:
    """What a permutation test found.

    Attributes:
        value: The statistic as observed.
        p_value: Two-sided: the share of arrangements, the observed one included, that make the
            statistic at least as large in absolute value.
        how: Over which arrangements.
    """

    value: float
    p_value: float
    how: str


NOT_DEFINED = PermutationTest(value=np.nan, p_value=np.nan, how="not defined")


def permutation_test(
    statistic: Statistic, codes: Int[np.ndarray, " agent"], *, permutations: int, seed: int
) -> PermutationTest:
    """Test a statistic against all arrangements of the agents' labels, or random ones.

    Args:
        statistic: Made from many arrangements at once, of order 1, and of mean 0 over all of them.
        codes: The agents' labels as observed, numbered from 0.
        permutations: How many arrangements to take at most besides the observed one: all, if there
            are no more, else this many random ones.
        seed: Of the random ones.

    Returns:
        The statistic and its p-value (b + 1) / (m + 1), b of m arrangements being as extreme.
    """
    counts = Counter(codes.tolist())
    # number of different arrangements but the observed one
    others = math.factorial(len(codes)) // math.prod(map(math.factorial, counts.values())) - 1
    if others <= permutations:
        every = np.array(list(_arrangements(counts)), dtype=np.int64)
        drawn = every[(every != codes).any(1)]
        how = f"permutation test over all {others + 1} arrangements"
    else:
        rng = np.random.default_rng(seed)
        drawn = rng.permuted(np.tile(codes, (permutations, 1)), axis=1)
        how = f"permutation test over {permutations} random arrangements, seed {seed}"
    value = float(statistic(codes[None])[0])
    parts = math.ceil(len(drawn) * len(codes) ** 2 / _NUMBERS_AT_ONCE)
    as_extreme = sum(
        int((np.abs(statistic(part)) >= abs(value) - _TIE).sum())
        for part in np.array_split(drawn, max(parts, 1))
    )
    return PermutationTest(value=value, p_value=(as_extreme + 1) / (len(drawn) + 1), how=how)


def _arrangements(left: Counter[int]) -> Iterator[tuple[int, ...]]:
    """All different orders of labels, given how many there are of each."""
    if not left:
        yield ()
    for code in left:
        for rest in _arrangements(left - Counter([code])):
            yield (code, *rest)
