"""Functions that `torch.func` cannot take apart, written out in ones that it can.

torch's fused recurrent cells have no batching rule that keeps derivatives; the same equations (Cho
et al., 2014, and Hochreiter & Schmidhuber, 1997, in cuDNN's form) in linear layers and gates do.
A single number as an index makes torch ask for its value; selecting rows does not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradlab.checks import UsageError

State: TypeAlias = tuple[Tensor, ...]
"""A recurrent layer's state: (hidden,) of a GRU, (hidden, cell) of an LSTM."""

Cell: TypeAlias = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""From the inputs' share of the gates, the state, and the state's weights and biases: the state."""


class Rewrites(TorchFunctionMode):
    """While active, functions are computed in the form that transforms understand."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Called by torch in place of each of its functions."""
        rewrite = rewrite_of(func, args)
        if rewrite is None:
            return func(*args, **(kwargs or {}))
        with self:  # what it is made of may be of interest to a subclass
            return rewrite(*args, **(kwargs or {}))


def gru_step(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """One step of a gated recurrent unit.

    Args:
        gates: The inputs' share of the reset, update and new gate [*batch, 3 hidden].
        state: The state before, ([*batch, hidden],).
        weight: Weights of the state [3 hidden, hidden].
        bias: Biases [3 hidden].

    Returns:
        The state after.
    """
    (hidden,) = state
    reset_in, update_in, new_in = gates.chunk(3, -1)
    reset_h, update_h, new_h = functional.linear(hidden, weight, bias).chunk(3, -1)
    update = torch.sigmoid(update_in + update_h)
    new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
    return (new + update * (hidden - new),)


def lstm_step(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """One step of a long short-term memory.

    Args:
        gates: The inputs' share of the input, forget, cell and output gate [*batch, 4 hidden].
        state: The state before, (hidden, cell), each [*batch, hidden].
        weight: Weights of the state [4 hidden, hidden].
        bias: Biases [4 hidden].

    Returns:
        The state after.
    """
    hidden, cell = state
    gates = gates + functional.linear(hidden, weight, bias)
    enter, forget, new, out = gates.chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(cell), cell


def _gru_cell(
    input: Tensor,
    hidden: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    return gru_step(functional.linear(input, w_ih, b_ih), (hidden,), w_hh, b_hh)[0]


def _lstm_cell(
    input: Tensor,
    state: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    return lstm_step(functional.linear(input, w_ih, b_ih), tuple(state), w_hh, b_hh)


def _gru(input: Tensor, hx: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    output, (last,) = _layers(gru_step, "GRU", input, (hx,), *rest)
    return output, last


def _lstm(input: Tensor, hx: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    output, last = _layers(lstm_step, "LSTM", input, tuple(hx), *rest)
    return output, *last


def _layers(
    step: Cell,
    kind: str,
    input: Tensor,
    state: State,
    params: object,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, State]:
    """Layers of a recurrent network over time, as torch's fused functions take them."""
    each = 4 if has_biases else 2
    plain = isinstance(params, tuple | list) and len(params) == num_layers * each
    if bidirectional or (dropout > 0 and train) or not plain:
        raise UsageError(
            f"An {kind} under per-sample gradients must be unidirectional, without dropout, "
            f"projections and packed sequences. Got bidirectional={bidirectional}, "
            f"dropout={dropout}; for other forms, loop over torch.nn.{kind}Cell."
        )
    assert isinstance(params, tuple | list)
    time = 1 if batch_first and input.dim() == 3 else 0
    last: list[State] = []
    for layer in range(num_layers):
        w_ih, w_hh, *biases = params[layer * each : (layer + 1) * each]
        b_ih, b_hh = biases if has_biases else (None, None)
        now = tuple(part[layer] for part in state)
        outputs = []
        for gates in functional.linear(input, w_ih, b_ih).unbind(time):
            now = step(gates, now, w_hh, b_hh)
            outputs.append(now[0])
        input = torch.stack(outputs, time)
        last.append(now)
    return input, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def rewrite_of(func: Callable[..., Any], args: Sequence[object]) -> Callable[..., Any] | None:
    """What to call in place of a function.

    Args:
        func: One of torch's functions.
        args: What it was called with.

    Returns:
        The rewrite; None if the function itself will do.
    """
    if func is Tensor.__getitem__:
        index = args[1]
        rows = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
        return _rows if rows else None
    return _REWRITES.get(func)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    rows = torch.index_select(tensor, 0, index.flatten())
    return rows.view((*index.shape, *tensor.shape[1:]))


_REWRITES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.gru_cell: _gru_cell,
    torch.lstm_cell: _lstm_cell,
    torch.gru: _gru,
    torch.lstm: _lstm,
}
