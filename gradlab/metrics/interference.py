r"""How far agents' gradients point with or against each other.

Two spaces, side by side: **theta**, where :math:`Z_i \cdot Z_k` says whether two agents want the
same change of a policy, and **psi**, where :math:`g_i \cdot g_k = Z_i^\top J_i J_k^\top Z_k` says
how much of it the sharing scheme lets through to the trained parameters.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from gradlab.decomposition import Decomposition
from gradlab.parameters import WHOLE
from gradlab.quantity import Quantity, dataset

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
    return dataset(measure_interference(decomposition))


def measure_interference(decomposition: Decomposition) -> dict[str, Quantity]:
    """What `interference` labels.

    Args:
        decomposition: What `decompose` returned.

    Returns:
        The quantities by name.
    """
    d = decomposition
    layers = [WHOLE, *dict.fromkeys((*d.theta_layout.layers, *d.psi_layout.layers))]
    grams = np.full((len(SPACES), len(layers), d.agents, d.agents), np.nan)
    for space, gram in (("psi", d.gram_psi()), ("theta", d.gram_theta())):
        of_space = grams[SPACES.index(space)]
        for layer, products in gram.items():
            of_space[layers.index(layer)] = products.cpu().numpy()
        of_space[0] = np.sum([of_space[layers.index(layer)] for layer in gram], axis=0)
    norms = np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1))
    cosines = cosine_from_gram(grams)
    rates, means = summarise_pairs(cosines)
    labels: dict[str, Sequence[str | int]] = {
        "space": SPACES,
        "layer": layers,
        "agent": range(d.agents),
        "agent_other": range(d.agents),
    }

    def quantity(
        values: NDArray[np.float64], unit: str = "1", estimator: str = "plug-in, one batch"
    ) -> Quantity:
        dims = tuple(labels)[: values.ndim]
        coords = {dim: labels[dim] for dim in dims}
        return Quantity(values=values, dims=dims, coords=coords, unit=unit, estimator=estimator)

    return {
        "inner_product": quantity(grams, "loss^2"),
        "cosine": quantity(cosines),
        "magnitude_similarity": quantity(magnitude_similarity(norms)),
        "norm": quantity(norms, "loss"),
        "conflict_rate": quantity(
            rates, estimator="share of agent pairs with a negative plug-in cosine"
        ),
        "mean_cosine": quantity(means, estimator="mean over agent pairs of the plug-in cosine"),
    }


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
