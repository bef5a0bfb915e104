"""The gradient noise scale over a training, smoothed."""

import numpy as np
import pandas as pd

from gradlab.checks import check
from gradlab.run import Run


def smoothed_noise_scale(
    run: Run,
    *,
    network: str = "actor",
    space: str = "theta",
    layer: str = "all",
    decay: float = 0.9,
) -> pd.DataFrame:
    r"""Noise over signal, each smoothed by itself and then divided.

    A ratio of two noisy numbers must not be averaged: where the squared length happens to be small
    it is huge. So numerator and denominator are exponential moving averages,
    :math:`m_t = d\, m_{t-1} + (1 - d)\, x_t` with the same decay d, and their ratio needs no
    correction for the start.

    Args:
        run: A run with full diagnostics of at least two environment copies.
        network: "actor" or "critic".
        space: "psi" or "theta".
        layer: A layer's name, or "all".
        decay: Weight of the past, from 0 (no smoothing) to below 1.

    Returns:
        Columns update, agent, noise_scale: how many environment copies have as much noise in their
        mean gradient as signal; NaN while the smoothed squared length is not above 0.

    Raises:
        UsageError: If the run did not record it, or the decay is out of range.
    """
    check(0 <= decay < 1, "decay", "be from 0 to below 1", decay)
    where = {"network": network, "space": space, "layer": layer}
    noise, signal = (
        pd
        .DataFrame(run.quantity(name).sel(where).to_pandas())
        .ewm(alpha=1 - decay, adjust=False)
        .mean()
        for name in ("variance_mean", "squared_norm_debiased")
    )
    scale = noise / signal.where(signal > 0) * run.config.get("copies", np.nan)
    table: pd.DataFrame = scale.melt(ignore_index=False, value_name="noise_scale").reset_index()
    return table
