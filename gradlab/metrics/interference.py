r"""How far agents' gradients point with or against each other.

Two spaces, side by side: **theta**, where :math:`Z_i \cdot Z_k` says whether two agents want the
same change of a policy, and **psi**, where :math:`g_i \cdot g_k = Z_i^\top J_i J_k^\top Z_k` says
how much of it the sharing scheme lets through to the trained parameters.
"""

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from gradlab.decomposition import Decomposition
from gradlab.parameters import WHOLE

SPACES = ("psi", "theta")


def interference(decomposition: Decomposition) -> xr.Dataset:
    r"""Pairwise inner products, cosines and magnitudes of agents' gradients, by layer.

    All are plug-in estimates from one batch. The cosine of two noisy gradients is biased towards
    zero, and the share of negative cosines of pure noise is one half.

    Args:
        decomposition: What `decompose` returned.

    Returns:
        Variables over (space, layer, agent, agent_other), NaN for a layer that a space lacks:

        - `inner_product`
        - `cosine` = inner product / product of norms; NaN where a gradient is zero
        - `magnitude_similarity` = 2 |a| |b| / (|a|^2 + |b|^2), 1 for equal norms (Yu et al.,
          "Gradient Surgery", 2020, Def. 2)

        over (space, layer, agent): `norm`; and over (space, layer): `conflict_rate`, the share of
        agent pairs with a negative cosine (ibid., Def. 1), and `mean_cosine` over the pairs.
    """
    d = decomposition
    layers = (WHOLE, *dict.fromkeys((*d.theta_layout.layers, *d.psi_layout.layers)))
    agents = d.agents
    grams = np.full((len(SPACES), len(layers), agents, agents), np.nan)
    for space, gram in (("psi", d.gram_psi()), ("theta", d.gram_theta())):
        of_space = grams[SPACES.index(space)]
        for layer, products in gram.items():
            of_space[layers.index(layer)] = products.cpu().numpy()
        of_space[0] = np.sum([of_space[layers.index(layer)] for layer in gram], axis=0)
    dims = ("space", "layer", "agent", "agent_other")
    coordinates = {
        "space": list(SPACES),
        "layer": list(layers),
        "agent": range(agents),
        "agent_other": range(agents),
    }
    norms = np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1))
    cosines = cosine_from_gram(grams)
    rates, means = summarise_pairs(cosines)
    plug_in = "plug-in, one batch"
    return xr.Dataset(
        {
            "inner_product": (dims, grams, {"unit": "loss^2", "estimator": plug_in}),
            "cosine": (dims, cosines, {"unit": "1", "estimator": plug_in}),
            "magnitude_similarity": (
                dims,
                magnitude_similarity(norms),
                {"unit": "1", "estimator": plug_in},
            ),
            "norm": (dims[:3], norms, {"unit": "loss", "estimator": plug_in}),
            "conflict_rate": (
                dims[:2],
                rates,
                {"unit": "1", "estimator": "share of agent pairs with a negative plug-in cosine"},
            ),
            "mean_cosine": (
                dims[:2],
                means,
                {"unit": "1", "estimator": "mean over agent pairs of the plug-in cosine"},
            ),
        },
        coords=coordinates,
    )


def cosine_from_gram(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines between the vectors of a Gram matrix.

    Args:
        gram: Inner products, shape [..., agent, agent].

    Returns:
        Cosines of the same shape; NaN where a vector has no length.
    """
    squared = np.diagonal(gram, axis1=-2, axis2=-1)
    scale = np.sqrt(squared[..., :, None]) * np.sqrt(squared[..., None, :])
    with np.errstate(invalid="ignore", divide="ignore"):
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
