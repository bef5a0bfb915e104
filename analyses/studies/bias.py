"""What plug-in cosines and debiased estimates of noisy gradients say of a known truth."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.studies.chart import Line, Panel, chart
from analyses.studies.study import Findings, Simulation
from analyses.studies.verdict import Verdict, told
from gradlab.cluster_products import CLUSTERS, ClusterProducts
from gradlab.estimates import Estimates
from gradlab.verdicts import ALIGNED, CONFLICT

AGENTS, PARAMS = 4, 300
COPIES = (8, 16, 32, 64, 128, 256, 512)
COSINES = (-0.3, 0.0)
SNR = 0.02
SHARED = 0.3

_NAIVE, _DEBIASED = "naive mean cosine", "debiased mean cosine"
_KNOWN, _PRODUCT = "lengths known", "debiased mean product"
_NEGATIVE, _CONFLICT, _ALIGNED = "naive negative", "called conflict", "called aligned"
_HOLD, _HOLD_COSINE = "intervals hold product", "intervals hold cosine"
_ERROR = "standard error"
_PAIRS = np.triu_indices(AGENTS, k=1)


def draw(
    random: np.random.Generator, cosine: float, copies: int
) -> tuple[NDArray[np.float64], int]:
    """Draw gradients of agents whose true ones are unit vectors.

    Args:
        random: Source of randomness.
        cosine: True cosine of every two agents.
        copies: Number of environment copies, a multiple of the clusters they are pooled into.

    Returns:
        Sums over the clusters [agent, cluster, param], and the copies in each. In a single copy the
        noise has `1 / SNR` times the true gradient's squared length, and two agents' noise the
        correlation `SHARED`.
    """
    clusters = min(copies, CLUSTERS)
    each = copies // clusters
    gram = np.full((AGENTS, AGENTS), cosine) + (1 - cosine) * np.eye(AGENTS)
    mean = np.zeros((AGENTS, 1, PARAMS))
    mean[:, 0, :AGENTS] = np.linalg.cholesky(gram)
    common = random.standard_normal((1, clusters, PARAMS))
    own = random.standard_normal((AGENTS, clusters, PARAMS))
    noise = np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * own
    return each * mean + np.sqrt(each / SNR / PARAMS) * noise, each


def products(sums: NDArray[np.float64], each: int) -> ClusterProducts:
    """Inner products by cluster, as `decompose` has them.

    Args:
        sums: Sums over clusters [agent, cluster, param].
        each: Number of copies, of one sample each, in a cluster.

    Returns:
        The products, of a single layer.
    """
    return ClusterProducts(
        layers=("layer",),
        count=np.full(sums.shape[:2], each),
        within=np.einsum("iep,kep->eik", sums, sums)[None],
        across=np.einsum("iep,kp->eik", sums, sums.sum(1))[None],
        following=np.einsum("iep,kep->eik", sums[:, :-1], sums[:, 1:])[None],
    )


def measure(cosine: float, copies: int, draws: int) -> dict[str, float]:
    """Compare estimates with the truth over many draws.

    Args:
        cosine: True cosine of every two agents.
        copies: Number of environment copies.
        draws: How often to draw.

    Returns:
        Means over draws and pairs of agents by name.
    """
    random = np.random.default_rng([copies, round(100 * abs(cosine))])
    of_draws: dict[str, list[float]] = {}
    for _ in range(draws):
        sums, each = draw(random, cosine, copies)
        total = sums.sum(1)
        gram = total @ total.T
        length = np.sqrt(np.diagonal(gram))
        naive = (gram / np.outer(length, length))[_PAIRS]
        estimates = Estimates({"theta": products(sums, each)})
        interval, of_cosine = estimates.inner_product_interval, estimates.cosine_interval
        inside, inside_cosine = (
            ((i.low[0] <= cosine) & (cosine <= i.high[0]))[_PAIRS] for i in (interval, of_cosine)
        )
        verdict, value = (array[0][_PAIRS] for array in (estimates.verdict, of_cosine.value))
        known = np.isfinite(value)
        found = {
            _NAIVE: naive.mean(),
            _DEBIASED: value[known].mean() if known.any() else np.nan,
            _KNOWN: known.mean(),
            _PRODUCT: interval.value[0][_PAIRS].mean(),
            _NEGATIVE: (naive < 0).mean(),
            _CONFLICT: (verdict == CONFLICT).mean(),
            _ALIGNED: (verdict == ALIGNED).mean(),
            _HOLD: inside.mean(),
            _HOLD_COSINE: inside_cosine[known].mean() if known.any() else np.nan,
        }
        for name, number in found.items():
            of_draws.setdefault(name, []).append(float(number))
    error = np.std(of_draws[_PRODUCT], ddof=1) / np.sqrt(draws)
    return {name: _mean(values) for name, values in of_draws.items()} | {_ERROR: float(error)}


def _mean(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else np.nan


def _report(draws: int, progress: Callable[[int, int], None]) -> Findings:
    rows: list[dict[str, float]] = []
    for cosine in COSINES:
        for copies in COPIES:
            progress(len(rows), len(COSINES) * len(COPIES))
            rows.append({"cosine": cosine, "copies": copies, **measure(cosine, copies, draws)})
    progress(len(rows), len(rows))
    found = pd.DataFrame(rows)
    shown = pd.DataFrame({"true cosine": found["cosine"], "copies": found["copies"]})
    shares = (_KNOWN, _NEGATIVE, _CONFLICT, _ALIGNED, _HOLD, _HOLD_COSINE)
    for names, form in (((_NAIVE, _DEBIASED, _PRODUCT), "+.3f"), (shares, ".1%")):
        for name in names:
            shown[name] = [format(x, form) if math.isfinite(x) else "" for x in found[name]]
    return Findings(
        shown=shown,
        verdicts=_verdicts(found),
        tables={"bias": found},
        figures={"bias": _figure(found)},
    )


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    opposed, unrelated = (found[found["cosine"] == cosine] for cosine in COSINES)
    wrong = opposed.loc[opposed[_NAIVE] > 0, "copies"].tolist()
    off = ((found[_PRODUCT] - found["cosine"]).abs() / found[_ERROR]).max()
    held = found[_HOLD]
    held_cosine = found.loc[found[_KNOWN] > 0.9, _HOLD_COSINE]
    called = unrelated[_CONFLICT] + unrelated[_ALIGNED]
    few, many = opposed.iloc[0], opposed.iloc[-1]
    return [
        told(
            "noise that agents share gives the naive cosine the wrong sign on average",
            holds=bool(wrong),
            evidence=f"at {', '.join(map(str, wrong)) or 'no'} copies",
        ),
        told(
            "debiased products are right on average at every number of copies",
            holds=bool(off < 4),
            evidence=f"largest difference {off:.1f} standard errors",
        ),
        told(
            "95 % intervals of products hold the truth in 93 % to 97 % of cases",
            holds=bool(held.between(0.93, 0.97).all()),
            evidence=f"{held.min():.1%} to {held.max():.1%}",
        ),
        told(
            "so do those of cosines where nine in ten lengths are known",
            holds=bool(held_cosine.between(0.93, 0.97).all()),
            evidence=f"{held_cosine.min():.1%} to {held_cosine.max():.1%}",
        ),
        told(
            "of unrelated gradients at most 5 % of pairs get a verdict",
            holds=bool(called.max() <= 0.05),
            evidence=f"at most {called.max():.1%}; the naive cosine is negative in "
            f"{unrelated[_NEGATIVE].min():.1%} to {unrelated[_NEGATIVE].max():.1%}",
        ),
        told(
            "opposed gradients are nearly all called so if there are enough copies",
            holds=bool(many[_CONFLICT] > 0.95),
            evidence=f"{few[_CONFLICT]:.1%} at {few['copies']:.0f} copies, "
            f"{many[_CONFLICT]:.1%} at {many['copies']:.0f}",
        ),
    ]


def _figure(found: pd.DataFrame) -> str:
    def lines(*names: str) -> list[Line]:
        return [
            Line(
                name=f"{'naive' if name in (_NAIVE, _NEGATIVE) else 'debiased'}, "
                f"true cosine {cosine:g}",
                values=found.loc[found["cosine"] == cosine, name].tolist(),
                dashed=cosine == 0,
            )
            for name in names
            for cosine in COSINES
        ]

    return chart(
        [
            Panel(
                title="Mean cosine (debiased: product)",
                lines=lines(_NAIVE, _PRODUCT),
                ticks=(-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3),
                marks=COSINES,
            ),
            Panel(
                title="Share of pairs negative, called conflict",
                lines=lines(_NEGATIVE, _CONFLICT),
                ticks=(0.0, 0.25, 0.5, 0.75, 1.0),
            ),
            Panel(
                title="Intervals that hold the product",
                lines=lines(_HOLD),
                ticks=(0.85, 0.9, 0.95, 1.0),
                marks=(0.95,),
            ),
        ],
        [str(copies) for copies in COPIES],
        "environment copies",
    )


BIAS = Simulation(
    name="bias",
    question="What do naive and debiased cosines say of gradients whose truth is known?",
    budgets={"quick": 100, "standard": 1000},
    about=f"{AGENTS} agents with true gradients of length 1 in {PARAMS} coordinates, Gaussian "
    f"noise whose variance in one copy is {1 / SNR:g} times the squared length, and whose "
    f"correlation between agents of one copy is {SHARED:g}; copies pooled into at most {CLUSTERS} "
    "clusters. Means over pairs and draws (quick: 100, standard: 1000). Naive: cosine of the "
    "means over copies. Product: the debiased inner product, here the cosine's unbiased "
    "counterpart, as all true lengths are 1. Debiased cosine and its intervals: of the pairs both "
    "of whose lengths are known (two standard errors above 0), which at few copies are those whose "
    "lengths came out too large. Verdicts at a false discovery rate of 5 % over the pairs.",
    draw=_report,
)
