"""Functions that `torch.func.vmap` refuses or gets wrong, in the form that it takes.

Under `vmap` of per-sample parameters torch 2.13 drops an embedding's padding row and reads another
sample's table where a row's number is out of range; asks for the value of a single number that
stands as an index; and has no rule for fused recurrent layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradlab.checks import UsageError
from gradlab.engine.recurrent import RECURRENT

Function: TypeAlias = Callable[..., Any]


class Rewrites(TorchFunctionMode):
    """While active, functions are computed in the form that transforms understand."""

    def __torch_function__(
        self,
        func: Function,
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        rewrite = rewrite_of(func, args, kwargs)
        if rewrite is None:
            return func(*args, **kwargs)
        with self:  # what it is made of may be of interest to a subclass
            return rewrite(*args, **kwargs)


def rewrite_of(
    func: Function, args: Sequence[object], kwargs: Mapping[str, object]
) -> Function | None:
    """What to call in place of a function.

    Args:
        func: One of torch's functions.
        args: What it was called with.
        kwargs: What it was called with by name.

    Returns:
        The rewrite; None if the function itself will do.
    """
    if func is Tensor.__getitem__:
        return _getitem if _by_number(args[1]) else None
    if func in _EXTREMA:
        return _EXTREMA[func] if len(args) == 1 and not kwargs else None
    return _REWRITES.get(func)


def _is_number(index: object, *, single: bool) -> bool:
    return (
        isinstance(index, Tensor)
        and index.dtype in (torch.int64, torch.int32)
        and (index.dim() == 0 or not single)
    )


def _by_number(index: object) -> bool:
    """Whether numbers in tensors pick what is indexed: rows, or one place of some axes."""
    if not isinstance(index, tuple):
        return _is_number(index, single=False)
    return any(isinstance(part, Tensor) for part in index) and all(
        _is_number(part, single=True)
        or part is None
        or part is Ellipsis
        or isinstance(part, slice)
        or (isinstance(part, int) and not isinstance(part, bool))
        for part in index
    )


def _getitem(tensor: Tensor, index: Tensor | tuple[Any, ...]) -> Tensor:
    if isinstance(index, Tensor):
        return _rows(tensor, _from_start(index, tensor.shape[0]))
    if isinstance(index[0], Tensor):
        rows = _getitem(tensor, index[0])
        return rows[index[1:]] if len(index) > 1 else rows
    consumed = sum(part is not None and part is not Ellipsis for part in index)
    axes, axis = [], 0
    for part in index:
        if isinstance(part, Tensor):
            axes.append((axis, part))
        if part is Ellipsis:
            axis += tensor.dim() - consumed
        elif part is None or isinstance(part, slice | Tensor):
            axis += 1
    picked = tensor[tuple(slice(None) if isinstance(part, Tensor) else part for part in index)]
    for axis, number in reversed(axes):
        rows = _from_start(number, picked.shape[axis]).reshape(1)
        picked = torch.index_select(picked, axis, rows).squeeze(axis)
    return picked


def _from_start(index: Tensor, length: int) -> Tensor:
    return torch.where(index < 0, index + length, index)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    rows = torch.index_select(table, 0, index.flatten())
    return rows.reshape((*index.shape, *table.shape[1:]))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq:
        raise UsageError(
            "An embedding under per-sample gradients must leave its table as it is and a sample's "
            f"gradient to the sample. Got max_norm={max_norm}, "
            f"scale_grad_by_freq={scale_grad_by_freq}; use neither."
        )
    rows = _rows(weight, input)
    if padding_idx is None:
        return rows
    padding = (input == padding_idx % weight.shape[0])[..., None]
    return torch.where(padding, rows.detach(), rows)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise UsageError(
            "torch.nn.functional.one_hot under per-sample gradients must be given `num_classes`. "
            "Got none, which would need all samples' values."
        )
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    if weight.numel() > 1 and input.dim() > 1:
        weight = weight.reshape(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, weight * input)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    groups = input.reshape(len(input), num_groups, -1)
    output = functional.layer_norm(groups, groups.shape[-1:], eps=eps).reshape(input.shape)
    channels = (-1, *[1] * (input.dim() - 2))
    if weight is not None:
        output = output * weight.reshape(channels)
    return output if bias is None else output + bias.reshape(channels)


_REWRITES: dict[Function, Function] = {
    **RECURRENT,
    functional.embedding: _embedding,
    functional.one_hot: _one_hot,
    functional.prelu: _prelu,
    functional.group_norm: _group_norm,
}

_EXTREMA: dict[Function, Function] = {
    # Of several equal values `vmap` gives one the whole gradient; torch otherwise divides it.
    torch.max: torch.amax,
    torch.min: torch.amin,
    Tensor.max: torch.amax,
    Tensor.min: torch.amin,
}
