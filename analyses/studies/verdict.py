"""What numbers with intervals say of a claim: supported, not supported, or undecided."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["supported", "not supported", "undecided"]

ERROR = 0.05
"""Share of claims that are true at a bound and yet called not supported, if intervals hold."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval.

    Attributes:
        value: The number.
        low: The interval's lower end, NaN if it has none.
        high: Its upper end.
        drawn: The number of each bootstrap resample, if it has an interval that comes from some.
    """

    value: float
    low: float
    high: float
    drawn: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def unknown(cls) -> "Estimate":
        """Make one of which nothing is known.

        Returns:
            NaN without an interval.
        """
        return cls(math.nan, math.nan, math.nan)

    def numbers(self) -> dict[str, float]:
        """Name its numbers, for a table.

        Returns:
            value, low and high.
        """
        return {"value": self.value, "low": self.low, "high": self.high}

    def less(self, number: float) -> "Estimate":
        """Take away a number that is known without error.

        Args:
            number: The number.

        Returns:
            The difference and its interval.
        """
        drawn = None if self.drawn is None else self.drawn - number
        return Estimate(self.value - number, self.low - number, self.high - number, drawn)

    def among(self, several: int) -> tuple[float, float]:
        """Widen the interval so that all of several numbers' hold in 95 % of cases (Bonferroni).

        Args:
            several: How many numbers there are.

        Returns:
            The ends of its percentile interval at a level of 1 - 0.05 / several; of the one that it
            has if it comes from no resamples, or is the only number.
        """
        if several == 1 or self.drawn is None:
            return self.low, self.high
        tail = ERROR / several / 2
        low, high = np.quantile(self.drawn, (tail, 1 - tail))
        return float(low), float(high)

    def text(self, form: str = ".3f") -> str:
        """Write it down.

        Args:
            form: Format of each number.

        Returns:
            E.g. "0.750 (0.741 to 0.758)"; without the interval if there is none.

        >>> Estimate(0.75, 0.741, 0.758).text()
        '0.750 (0.741 to 0.758)'
        """
        if not math.isfinite(self.value):
            return "-"
        value = format(self.value, form)
        if not math.isfinite(self.low) or not math.isfinite(self.high):
            return value
        return f"{value} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a study says of one claim.

    Attributes:
        claim: The claim.
        outcome: Whether it is supported.
        evidence: The numbers that say so.
    """

    claim: str
    outcome: Outcome
    evidence: str

    def __str__(self) -> str:
        return f"**{self.outcome}**: {self.claim} ({self.evidence})"


def judge(
    claim: str,
    estimates: Mapping[str, Estimate],
    *,
    above: int | float = -math.inf,
    below: int | float = math.inf,
    form: str = ".3f",
) -> Verdict:
    """Judge a claim that numbers lie above, below or between bounds.

    Args:
        claim: The claim, which is about all of the numbers.
        estimates: The numbers, by what each is of.
        above: What they are above, if the claim holds.
        below: What they are below, if the claim holds.
        form: How to write the numbers.

    Returns:
        Supported if every 95 % interval lies within the bounds: if the claim is wrong of one
        number, that one has to err. Not supported if one lies outside of them at a level of
        1 - 0.05 / m, of m numbers with an interval: any of them may err. Else undecided, as it is
        without any number or interval, or if an interval ends at a bound.

    >>> print(judge("a is more than b", {"a - b": Estimate(2.0, 1.0, 3.0)}, above=0))
    **supported**: a is more than b (a - b: 2.000 (1.000 to 3.000))
    >>> judge("a is more than 2", {"a": Estimate(2.0, 1.0, 3.0)}, above=2).outcome
    'undecided'
    """
    within = [above < x.low and x.high < below for x in estimates.values()]
    known = [x for x in estimates.values() if math.isfinite(x.low) and math.isfinite(x.high)]
    outside = [high < above or low > below for low, high in (x.among(len(known)) for x in known)]
    outcome: Outcome = "undecided"
    if any(outside):
        outcome = "not supported"
    elif within and all(within):
        outcome = "supported"
    said = "; ".join(f"{name}: {x.text(form)}" for name, x in estimates.items())
    return Verdict(claim=claim, outcome=outcome, evidence=said or "no runs")


def told(claim: str, *, holds: bool, evidence: str) -> Verdict:
    """Write down what is known of a claim without an interval.

    Args:
        claim: The claim.
        holds: Whether it holds.
        evidence: The numbers that say so.

    Returns:
        The verdict.
    """
    return Verdict(
        claim=claim, outcome="supported" if holds else "not supported", evidence=evidence
    )
