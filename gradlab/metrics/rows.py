"""Arrays of numbers that users hand in, checked and in float64."""

from typing import Protocol, runtime_checkable

import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped

from gradlab.checks import UsageError, check


@runtime_checkable
class TensorLike(Protocol):
    """What can be taken over as a tensor of torch is, which need not be imported for it."""

    def detach(self) -> "TensorLike":
        """Leave the gradient behind."""

    def double(self) -> "TensorLike":
        """Convert to float64."""

    def cpu(self) -> "TensorLike":
        """Copy to the main memory."""

    def numpy(self) -> Shaped[np.ndarray, "..."]:
        """Share the memory."""


Array = TensorLike | Float[np.ndarray, "..."] | xr.DataArray


def float64(
    name: str, array: Array, axes: tuple[str, ...], *, finite: bool = True
) -> Float[np.ndarray, "..."]:
    """Take over an array, without its gradient or device.

    Args:
        name: The argument, as the user wrote it.
        array: The numbers.
        axes: Names of the axes that it must have.
        finite: Whether every number must be finite.

    Returns:
        The numbers.

    Raises:
        UsageError: If the array has other axes, an empty one, or a number that is not finite; the
            message names the latter's place.

    >>> float64("rows", np.array([[1.0], [np.nan]]), ("agent", "feature"))
    Traceback (most recent call last):
    ...
    gradlab.checks.UsageError: `rows` must be finite. Got nan at agent 1, feature 0. Leave it out, or find out where it comes from.
    """  # noqa: E501
    values = (
        array.detach().double().cpu().numpy()
        if isinstance(array, TensorLike)
        else np.asarray(array, dtype=np.float64)
    )
    check(
        values.ndim == len(axes) and values.size > 0,
        f"{name}.shape",
        f"be that of [{', '.join(axes)}], no axis empty",
        values.shape,
    )
    wrong = np.argwhere(~np.isfinite(values))
    if finite and len(wrong):
        place = tuple(int(position) for position in wrong[0])
        where = ", ".join(f"{axis} {p}" for axis, p in zip(axes, place, strict=True))
        raise UsageError(
            f"`{name}` must be finite. Got {values[place]} at {where}. Leave it out, or find out "
            "where it comes from."
        )
    return values
