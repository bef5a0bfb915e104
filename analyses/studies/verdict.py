"""What numbers with intervals say of a claim: supported, not supported, or undecided."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Outcome = Literal["supported", "not supported", "undecided"]


class Estimate(NamedTuple):
    """A number, and the ends of its 95 % interval, NaN if it has none."""

    value: float
    low: float
    high: float

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
        Supported if every interval lies within the bounds, not supported if one lies outside,
        else undecided, as it is without any number or interval, or if an interval ends at a bound.

    >>> print(judge("a is more than b", {"a - b": Estimate(2.0, 1.0, 3.0)}, above=0))
    **supported**: a is more than b (a - b: 2.000 (1.000 to 3.000))
    >>> judge("a is more than 2", {"a": Estimate(2.0, 1.0, 3.0)}, above=2).outcome
    'undecided'
    """
    within = [above < x.low and x.high < below for x in estimates.values()]
    outside = [x.high < above or x.low > below for x in estimates.values()]
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
