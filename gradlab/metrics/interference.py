r"""How far agents' gradients point with or against each other.

Two spaces, side by side: **theta**, where :math:`Z_i \cdot Z_k` says whether two agents want the
same change of a policy, and **psi**, where :math:`g_i \cdot g_k = Z_i^\top J_i J_k^\top Z_k` says
how much of it the sharing scheme lets through to the trained parameters.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from gradlab.checks import UsageError
from gradlab.decomposition import Decomposition
from gradlab.engine.per_sample import PerSample, Rows
from gradlab.estimates import FEWEST
from gradlab.metrics.spaces import SPACES, SideBySide, alone, ratio, with_whole
from gradlab.metrics.summary import interference_attributes
from gradlab.parameters import ParameterLayout
from gradlab.quantity import Quantity, dataset
from gradlab.verdicts import ALIGNED, CONFLICT


def interference(
    decomposition: Decomposition, *, signs: bool = False, by_cluster: bool = False
) -> xr.Dataset:
    r"""Pairwise inner products, cosines and verdicts on agents' gradients, by layer.

    Plug-in estimates are from the batch as it is: the cosine of two noisy gradients is biased
    towards zero, agents that act in one environment copy share noise, which may even turn its sign,
    and of pure noise about half of all cosines are negative. Where `decompose` was told the
    samples' copies, estimates that leave out products within a copy stand beside them, with 95 %
    intervals (`gradlab.estimates`).

    Args:
        decomposition: What `decompose` returned.
        signs: Whether to count the coordinates on which two agents' gradients agree in sign.
        by_cluster: Whether to give the plug-in cosines within each cluster as well: what each says
            that trains on it alone. `decompose` takes any labels for clusters, also minibatches'.

    Returns:
        Variables over (space, layer, agent, agent_other), NaN for a layer that a space lacks:

        - `inner_product`, plug-in
        - `cosine` = inner product / product of norms, plug-in; NaN where a gradient is zero
        - `magnitude_similarity` = 2 |a| |b| / (|a|^2 + |b|^2), plug-in, 1 for equal norms (Yu et
          al., "Gradient Surgery", 2020, Def. 2)
        - with copies: `inner_product_debiased` and its standard error `inner_product_error`;
          `cosine_debiased` from `cosine_low` to `cosine_high`, NaN where a gradient's length is not
          two standard errors above 0; `verdict`, -1 conflict, 0 undecided, 1 aligned, at a false
          discovery rate of 5 % over the pairs of a layer. With fewer than 8 copies errors,
          intervals and verdicts are NaN.
        - with `signs`: `sign_agreement`, the share of coordinates of equal sign among those where
          neither gradient is 0

        over (space, layer, agent): `norm`, plug-in; over (space, layer): `conflict_rate` and
        `aligned_rate`, shares of agent pairs with that verdict, NaN without verdicts;
        `negative_rate`, the share of negative plug-in cosines (ibid., Def. 1); `mean_cosine` over
        the pairs, plug-in; `gradient_diversity` = sum |a|^2 / |sum a|^2 (Yin et al., 2018, eq. 1),
        1 / agents if all are equal, 1 if orthogonal, above 1 if they cancel, and `cancelled_norm` =
        1 - |sum a| / sum |a|, both plug-in, with copies also `gradient_diversity_debiased`; and
        with `by_cluster` over (space, layer, cluster, agent, agent_other) `cosine_cluster`. An
        agent without samples has NaN everywhere, and counts in no rate, mean or diversity. The
        attribute `summary` says in a sentence how many pairs are in conflict.

    Raises:
        UsageError: If `by_cluster` is asked for where clusters are not told apart.
    """
    parts = SideBySide({"": decomposition})
    found = alone(measure_interference(parts, signs=signs, by_cluster=by_cluster))
    return dataset(found).assign_attrs(interference_attributes(decomposition, found))


def measure_interference(
    parts: SideBySide, *, signs: bool = False, by_cluster: bool = False
) -> dict[str, Quantity]:
    """What `interference` labels, of several networks at once.

    Args:
        parts: What `decompose` returned for each.
        signs: As for `interference`.
        by_cluster: As for `interference`.

    Returns:
        The quantities by name, with a leading axis `network`.

    Raises:
        UsageError: As for `interference`.
    """
    present = parts.count > 0
    grams = parts.placed(
        torch
        .cat([
            with_whole(torch.stack(list(gram.values())))
            for d in parts.of_networks.values()
            for gram in (d.gram_psi(), d.gram_theta())
        ])
        .cpu()
        .numpy()
    )
    grams = np.where(np.logical_and.outer(present, present), grams, np.nan)
    norms = np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1))
    cosines = cosine_from_gram(grams)
    rates, means = summarise_pairs(cosines)
    squares = np.square(norms[..., present]).sum(-1)
    whole = np.sqrt(total_product(grams, present))
    plug_in = "plug-in, one batch"
    quantity = parts.quantity
    found = {
        "inner_product": quantity(grams, "loss^2", plug_in),
        "cosine": quantity(cosines, "1", plug_in),
        "magnitude_similarity": quantity(magnitude_similarity(norms), "1", plug_in),
        "norm": quantity(norms, "loss", plug_in),
        "negative_rate": quantity(
            rates, "1", "share of agent pairs with a negative plug-in cosine; of noise: one half"
        ),
        "mean_cosine": quantity(means, "1", "mean over agent pairs of the plug-in cosine"),
        "gradient_diversity": quantity(ratio(squares, whole**2), "1", plug_in),
        "cancelled_norm": quantity(1 - ratio(whole, norms[..., present].sum(-1)), "1", plug_in),
    }
    if signs:
        agreement = np.concatenate([
            sign_agreement(gradients, layout)
            for d in parts.of_networks.values()
            for gradients, layout in (
                (d.contributions, d.psi_layout),
                (
                    {n: Rows(z[None]) for n, z in d.theta_layout.unflatten(d.z).items()},
                    d.theta_layout,
                ),
            )
        ])
        found["sign_agreement"] = quantity(
            parts.placed(agreement), "1", "share of coordinates where neither is 0"
        )
    if by_cluster:
        found["cosine_cluster"] = _by_cluster(parts)
    return found | _debiased(parts, present)


def _debiased(parts: SideBySide, present: NDArray[np.bool_]) -> dict[str, Quantity]:
    """What there is to say where environment copies are told apart."""
    quantity, placed = parts.quantity, parts.placed
    how = "share of agent pairs with that verdict"
    e = parts.estimates
    if e is None:
        shape = (len(parts.of_networks), len(SPACES), len(parts.layers))
        nothing = quantity(np.full(shape, np.nan), "1", "needs environment copies")
        return {"conflict_rate": nothing, "aligned_rate": nothing}
    clusters = min(e.clusters[np.ix_(present, present)].flatten().tolist(), default=0)
    leave_out = f"U-statistic without products within a cluster, {clusters} clusters"
    interval = (
        f"95 % interval, jackknife over {clusters} clusters, Fieller"
        if clusters >= FEWEST
        else f"no interval from {clusters} clusters, {FEWEST} are needed"
    )
    whole = total_product(e.inner_product, present)
    diversity = ratio(e.signal[..., present].sum(-1), whole)
    verdicts = placed(e.verdict)
    return {
        "inner_product_debiased": quantity(placed(e.inner_product), "loss^2", leave_out),
        "inner_product_error": quantity(
            placed(e.inner_product_error), "loss^2", "standard error, jackknife"
        ),
        "cosine_debiased": quantity(placed(e.cosine_interval.value), "1", leave_out),
        "cosine_low": quantity(placed(e.cosine_interval.low), "1", interval),
        "cosine_high": quantity(placed(e.cosine_interval.high), "1", interval),
        "verdict": quantity(
            verdicts, "1", "-1 conflict, 0 undecided, 1 aligned; false discovery rate 5 %"
        ),
        "conflict_rate": quantity(share_of_pairs(verdicts, CONFLICT), "1", how),
        "aligned_rate": quantity(share_of_pairs(verdicts, ALIGNED), "1", how),
        "gradient_diversity_debiased": quantity(placed(diversity), "1", leave_out),
    }


def _by_cluster(parts: SideBySide) -> Quantity:
    """Plug-in cosines within each cluster."""
    if not parts.first.products:
        raise UsageError(
            "`by_cluster` needs clusters. Give decompose the argument `copy`, the environment "
            "copy or minibatch that each sample comes from."
        )
    within = [d.products[s].within for d in parts.of_networks.values() for s in SPACES]
    grams = np.concatenate([p for own in within for p in (own.sum(0)[None], own)])
    cosines = parts.placed(cosine_from_gram(grams))
    plain = parts.quantity(cosines[:, :, :, 0], "1", "plug-in, within a cluster")
    *row, agent, agent_other = plain.dims
    return replace(
        plain,
        values=cosines,
        dims=(*row, "cluster", agent, agent_other),
        coords={**plain.coords, "cluster": range(cosines.shape[3])},
    )


def total_product(products: NDArray[np.float64], present: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Squared length of the sum of the present agents' vectors.

    Args:
        products: Inner products, shape [..., agent, agent].
        present: Which agents there are.

    Returns:
        Their sums, shape [...]; at least 0, which rounding and noise may miss.
    """
    with np.errstate(invalid="ignore"):  # infinite products of both signs
        total: NDArray[np.float64] = products[..., present][..., present, :].sum((-2, -1))
    return total.clip(min=0)


def share_of_pairs(verdicts: NDArray[np.float64], verdict: float) -> NDArray[np.float64]:
    """Share of the pairs of different agents that got a verdict.

    Args:
        verdicts: Verdicts, shape [..., agent, agent].
        verdict: Which one.

    Returns:
        Shares, shape [...]; NaN where no pair has a verdict.
    """
    rows, columns = np.triu_indices(verdicts.shape[-1], k=1)
    pairs = verdicts[..., rows, columns]
    return ratio((pairs == verdict).sum(-1), np.isfinite(pairs).sum(-1))


def sign_agreement(
    gradients: Mapping[str, PerSample], layout: ParameterLayout
) -> NDArray[np.float64]:
    """On how many coordinates pairs of gradients agree in sign.

    Args:
        gradients: Gradients of all agents as samples of a single "agent", by parameter.
        layout: The parameters.

    Returns:
        Whole, and by layer, the share among coordinates where neither is 0, [1 + layer, agent,
        agent]; NaN where there is none.
    """
    signed, known = {}, {}
    for name, gradient in gradients.items():
        signs = gradient.mapped(torch.sign)
        signed[name], known[name] = signs.gram().double(), signs.mapped(torch.abs).gram().double()
    agreeing, all_known = (
        with_whole(
            torch.stack([
                torch.stack([of[n] for n in of if layout.layer_of[n] == layer]).sum(0)
                for layer in layout.layers
            ])
        )
        .cpu()
        .numpy()
        for of in (signed, known)
    )
    return ratio(all_known + agreeing, 2 * all_known)


def cosine_from_gram(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines between the vectors of a Gram matrix.

    Args:
        gram: Inner products, shape [..., agent, agent].

    Returns:
        Cosines of the same shape; NaN where a vector has no length.
    """
    squared = np.diagonal(gram, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(squared[..., :, None]) * np.sqrt(squared[..., None, :])
        cosines = np.where(scale > 0, gram / scale, np.nan)
    return np.clip(cosines, -1.0, 1.0)


def magnitude_similarity(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """How equal vectors' lengths are: 2 |a| |b| / (|a|^2 + |b|^2).

    Args:
        norms: Lengths, shape [..., agent].

    Returns:
        Values in [0, 1], shape [..., agent, agent]; NaN where both lengths are 0.
    """
    a, b = norms[..., :, None], norms[..., None, :]
    total = a**2 + b**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, 2 * a * b / total, np.nan)


def summarise_pairs(
    cosines: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of negative cosines, and mean cosine, over the pairs of different agents.

    Args:
        cosines: Cosines, shape [..., agent, agent].

    Returns:
        Both, of shape [...]; NaN where no pair has a cosine.
    """
    agents = cosines.shape[-1]
    rows, columns = np.triu_indices(agents, k=1)
    pairs = cosines[..., rows, columns]
    known = np.isfinite(pairs)
    count = known.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(count > 0, (pairs < 0).sum(-1) / count, np.nan)
        mean = np.where(count > 0, np.where(known, pairs, 0).sum(-1) / count, np.nan)
    return rate, mean
