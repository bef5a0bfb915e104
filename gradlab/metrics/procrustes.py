r"""Orthogonal Procrustes alignment: one set of agents' rows turned onto another.

What a network learns is often the same up to a rotation of its embedding space. Alignment takes
that out, so that what is left between two updates, or two seeds, is a change of the arrangement.
"""

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.linalg import orthogonal_procrustes

from gradlab.checks import check
from gradlab.metrics.rows import Array, float64
from gradlab.quantity import Quantity, dataset


def procrustes(
    reference: Array, rows: Array, *, translation: bool = False, scaling: bool = False
) -> xr.Dataset:
    r"""Turn agents' rows so that they come as near as possible to a reference.

    Over orthogonal matrices Q (rotations and reflections), and on demand a shift t of the origin
    and a scale s > 0, minimises :math:`\sum_i \|a_i - (s\, Q b_i + t)\|^2` for rows :math:`b_i` and
    reference :math:`a_i` (Schönemann, "A generalized solution of the orthogonal Procrustes
    problem", Psychometrika 31, 1966).

    Args:
        reference: Rows [agent, feature] that stay.
        rows: Rows [agent, feature] of the same agents, to be turned.
        translation: Whether to move the rows' mean onto the reference's as well. Without it the
            origin stays, and with it the rows' norms and cosines.
        scaling: Whether to stretch or shrink the rows as well.

    Returns:
        `aligned` over (agent, feature), in units of the rows; `disparity`: the smallest sum above
        over :math:`\sum_i \|a_i\|^2`, the rows taken from their mean if `translation`. 0 for a
        perfect fit; NaN where the reference is all zero (with `translation`, all its rows
        identical). With both options it is scipy.spatial.procrustes' disparity.

    Raises:
        UsageError: If the shapes differ, or a number is not finite (the message names the agent).

    >>> square = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> turned = square[[1, 2, 3, 0]]
    >>> found = procrustes(square, turned)
    >>> bool(np.allclose(found.aligned, square)), round(float(found.disparity), 12)
    (True, 0.0)
    """
    axes = ("agent", "feature")
    target, source = float64("reference", reference, axes), float64("rows", rows, axes)
    rule = f"have the shape of the reference, {target.shape}"
    check(source.shape == target.shape, "rows", rule, source.shape)
    aligned, disparity = _align(target, source, translation, scaling)
    agents, features = target.shape
    return dataset({
        "aligned": Quantity(
            values=aligned,
            dims=axes,
            coords={"agent": range(agents), "feature": range(features)},
            unit="embedding",
            estimator=_title(translation, scaling),
        ),
        "disparity": Quantity.scalar(disparity, estimator=_DISPARITY),
    })


def procrustes_path(
    frames: Array, *, translation: bool = False, scaling: bool = False
) -> xr.Dataset:
    """Turn agents' rows at each time onto those at the time before, as aligned.

    Args:
        frames: Rows [time, agent, feature].
        translation: As for `procrustes`.
        scaling: As for `procrustes`; every frame then has about the first one's size.

    Returns:
        `aligned` over (time, agent, feature), the first frame as it was; `disparity` over (time)
        as for `procrustes`, between a time and the one before; NaN at the first, which has none.

    Raises:
        UsageError: If there are other axes, or a number is not finite (the message names time and
            agent).
    """
    axes = ("time", "agent", "feature")
    values = float64("frames", frames, axes)
    aligned, disparity = values.copy(), np.full(len(values), np.nan)
    for time in range(1, len(values)):
        aligned[time], disparity[time] = _align(
            aligned[time - 1], values[time], translation, scaling
        )
    coords = {axis: range(size) for axis, size in zip(axes, values.shape, strict=True)}
    how = f"{_title(translation, scaling)}, each time to the one before"
    return dataset({
        "aligned": Quantity(
            values=aligned, dims=axes, coords=coords, unit="embedding", estimator=how
        ),
        "disparity": Quantity(
            values=disparity,
            dims=axes[:1],
            coords={"time": coords["time"]},
            unit="1",
            estimator=f"{_DISPARITY}; NaN: nothing before the first time",
        ),
    })


_DISPARITY = "sum of squared residuals / that of the reference; NaN: a reference without extent"


def _title(translation: bool, scaling: bool) -> str:
    extras = [name for name, on in (("translation", translation), ("scaling", scaling)) if on]
    return " with ".join(["orthogonal Procrustes", *[" and ".join(extras)] * bool(extras)])


def _align(
    reference: Float[np.ndarray, "agent feature"],
    rows: Float[np.ndarray, "agent feature"],
    translation: bool,
    scaling: bool,
) -> tuple[Float[np.ndarray, "agent feature"], float]:
    origin, own = (_mean(r) if translation else np.zeros(r.shape[1]) for r in (reference, rows))
    target, source = reference - origin, rows - own
    # Few agents span a small part of a wide space: turning within it is enough, and far cheaper.
    basis = np.linalg.qr(np.concatenate([target, source]).T)[0]
    rotation, strength = orthogonal_procrustes(source @ basis, target @ basis)
    turned = source @ basis @ rotation @ basis.T
    if scaling and source.any():
        turned *= strength / np.square(source).sum()
    extent = np.square(target).sum()
    disparity = np.square(target - turned).sum() / extent if extent > 0 else np.nan
    return turned + origin, float(disparity)


def _mean(rows: Float[np.ndarray, "agent feature"]) -> Float[np.ndarray, " feature"]:
    # The mean of identical numbers need not be exactly that number.
    mean: Float[np.ndarray, " feature"] = rows.mean(0)
    return rows[0] if (rows == rows[0]).all() else mean
