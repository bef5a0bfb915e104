"""Calling a per-sample loss, and saying in its user's words what is wrong with it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor

from gradlab.checks import UsageError
from gradlab.engine.rewrites import Rewrites

Theta: TypeAlias = dict[str, Tensor]
Surrogate: TypeAlias = Callable[[Theta, dict[str, Tensor]], Tensor]
"""A per-sample loss: one agent's parameters and one sample in, a scalar that is minimised out."""


class _Held(dict[str, Tensor]):
    """What a surrogate is given, with a note of names that it looks up in vain."""

    missed: str | None = None

    def __missing__(self, name: str) -> Tensor:
        self.missed = name
        raise KeyError(name)


def checked_loss(
    surrogate: Surrogate, theta: Theta, sample: dict[str, Tensor], rewrites: Rewrites
) -> Tensor:
    """Call a per-sample loss and insist on a scalar.

    Args:
        surrogate: The loss.
        theta: One agent's parameters.
        sample: One sample.
        rewrites: The mode to call it under.

    Returns:
        The loss.

    Raises:
        UsageError: If it is not a scalar, not a floating-point tensor, or reads what there is not.
    """
    given = {"theta": _Held(theta), "batch": _Held(sample)}
    try:
        with rewrites:
            loss = surrogate(given["theta"], given["batch"])
    except KeyError as error:
        for where, held in given.items():
            if held.missed is not None and error.args == (held.missed,):
                raise UsageError(
                    f"`{where}` must hold what `surrogate` reads. Got no {held.missed!r} among "
                    f"{', '.join(held)}."
                ) from error
        raise
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            f"`surrogate` must return one scalar for one sample. Got {got}; sum or average over "
            "the extra axes."
        )
    if not loss.is_floating_point():
        raise UsageError(
            f"`surrogate` must return a floating-point number. Got {loss.dtype}, which has no "
            "gradient; convert with .float() before anything is rounded."
        )
    return loss


_EXPLAINED = {
    "randomness": (
        "`surrogate` must not draw random numbers. Dropout (or another random operation) was "
        "called; put the module into eval mode, or hand fixed masks in with the batch."
    ),
    "batch norm": (
        "`surrogate` must give each sample a loss of its own. Batch norm in training mode mixes "
        "samples; put the module into eval mode, or use layer norm."
    ),
    "inplace": (
        "`surrogate` must not write in place. An in-place operation met per-sample gradients; "
        "use its out-of-place form, e.g. `x = x + y` for `x += y`, torch.stack for `x[t] = y`."
    ),
    "data-dependent": (
        "`surrogate` must not branch on a tensor's value. Use torch.where instead of `if`, and no "
        "`.item()`."
    ),
    "pick": (
        "`surrogate` must not pick by a mask, as `x[mask]` does: how much is left would differ "
        "between samples. Use torch.where, or multiply by the mask."
    ),
    "unknown": (
        "`surrogate` must be made of functions that torch.func.vmap knows. Another one was called; "
        "write it out in others (in place of packed sequences, pad them and leave what fills them "
        "up out of the loss)."
    ),
    "autograd": (
        "`surrogate` must leave differentiation to the engine. Use torch.func.grad in place of "
        "torch.autograd.grad, requires_grad_() and backward()."
    ),
    "detach": "`surrogate` must not touch `.data`. Use `.detach()`.",
    "escape": (
        "`surrogate` must be a function of what it is given. A tensor of one call was used after "
        "it; keep none in attributes (a recurrent policy's state: set it when `surrogate` begins), "
        "and leave out torch.utils.checkpoint."
    ),
    "out of range": (
        "`surrogate` must look up numbers from 0 to the table's length less one, such as those of "
        "agents, actions or states. Got one outside; check the batch."
    ),
    "numpy": (
        "`surrogate` must be made of torch functions. A tensor's memory was asked for, as "
        "`.numpy()` does; use the torch function of the same name."
    ),
}
_SIGNS = {
    "randomness error mode": "randomness",
    "batch norm got a batched tensor": "batch norm",
    "running_mean": "batch norm",
    "expected more than 1 value per channel": "batch norm",
    "doesn't match the broadcast shape": "inplace",
    "inplace": "inplace",
    "in-place": "inplace",
    "single memory location": "inplace",
    "data-dependent control flow": "data-dependent",
    ".item() on a tensor": "data-dependent",
    "dynamic shape": "pick",
    "batching rule not implemented": "unknown",
    "tensor.requires_grad_()": "autograd",
    "does not require grad and does not have a grad_fn": "autograd",
    "backward() called inside a functorch transform": "autograd",
    "accessing `data`": "detach",
    "may have escaped": "escape",
    "cannot access data pointer": "numpy",
    "is out of bounds for dimension": "out of range",
    "index out of range": "out of range",
}


@contextmanager
def explained() -> Iterator[None]:
    """Say what is wrong with a surrogate in its user's words, where torch's are about `vmap`.

    Yields:
        Nothing.

    Raises:
        UsageError: In place of torch's error, where its cause is known.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, UsageError):
            raise
        message = str(error).lower()
        for sign, cause in _SIGNS.items():
            if sign in message:
                first = str(error).strip().splitlines()[0]
                raise UsageError(f"{_EXPLAINED[cause]} Torch says: {first}") from error
        raise


@contextmanager
def unwritten(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Insist that nobody writes over tensors meanwhile.

    Args:
        tensors: Parameters and batch by name.

    Yields:
        Nothing.

    Raises:
        UsageError: If one was written over.
    """
    before = [tensor._version for tensor in tensors.values()]
    yield
    for (name, tensor), version in zip(tensors.items(), before, strict=True):
        if tensor._version != version:
            raise UsageError(
                f"`surrogate` must not write in place. It wrote over {name!r}, which it was given; "
                "use the out-of-place form, e.g. `x = x + y` for `x += y`."
            )
