"""Recurrent cells and layers, written out in functions that `torch.func` can take apart.

torch's fused recurrent functions have no batching rule that keeps derivatives; the same equations
in linear layers and gates do (Elman, 1990; Cho et al., 2014, and Hochreiter & Schmidhuber, 1997, in
cuDNN's form).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from gradlab.checks import UsageError

State: TypeAlias = tuple[Tensor, ...]
"""A recurrent layer's state: (hidden,), or (hidden, cell) of an LSTM."""

Cell: TypeAlias = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""From the inputs' share of the gates, the state, and the state's weights and biases: the state."""


def plain_step(activation: Callable[[Tensor], Tensor]) -> Cell:
    """One step of a recurrent network without gates.

    Args:
        activation: What the new state goes through.

    Returns:
        The step.
    """

    def step(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
        return (activation(gates + functional.linear(state[0], weight, bias)),)

    return step


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
    return (gru_state(gates, functional.linear(hidden, weight, bias), hidden),)


def gru_state(from_input: Tensor, from_state: Tensor, hidden: Tensor) -> Tensor:
    """What the gates of a gated recurrent unit make of its state.

    Args:
        from_input: The inputs' share of the reset, update and new gate [*batch, 3 hidden].
        from_state: The state's share of the same.
        hidden: The state before [*batch, hidden].

    Returns:
        The state after.
    """
    reset_in, update_in, new_in = from_input.chunk(3, -1)
    reset_h, update_h, new_h = from_state.chunk(3, -1)
    update = torch.sigmoid(update_in + update_h)
    new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
    return new + update * (hidden - new)


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


def _cell(step: Cell) -> Callable[..., Tensor | State]:
    """A cell as torch's function for it is called."""

    def run(
        input: Tensor,
        state: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | State:
        gates = functional.linear(input, w_ih, b_ih)
        if isinstance(state, Tensor):
            return step(gates, (state,), w_hh, b_hh)[0]
        return step(gates, tuple(state), w_hh, b_hh)

    return run


def _network(step: Cell, kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """Layers over time as torch's function for them is called."""

    def run(
        input: Tensor,
        state: Tensor | Sequence[Tensor],
        *rest: Any,  # noqa: ANN401
    ) -> tuple[Tensor, ...]:
        if not isinstance(rest[1], bool):  # torch's other overload, with one argument more in front
            mend = "pad it, and leave what fills it up out of the loss"
            raise _refused(kind, "a packed sequence", mend)
        state = (state,) if isinstance(state, Tensor) else tuple(state)
        output, last = _layers(step, kind, input, state, *rest)
        return output, *last

    return run


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
    each = 4 if has_biases else 2
    got = None
    if bidirectional:
        got = "bidirectional=True"
    elif dropout > 0 and train:
        got = f"dropout={dropout} in training mode"
    elif not isinstance(params, tuple | list) or len(params) != num_layers * each:
        got = "projections"
    if got is not None:
        raise _refused(kind, got, f"loop over torch.nn.{kind}Cell")
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


def _refused(kind: str, got: str, mend: str) -> UsageError:
    return UsageError(
        f"torch.nn.{kind} under per-sample gradients must be unidirectional, without dropout, "
        f"projections and packed sequences. Got {got}; {mend}."
    )


RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.rnn_tanh_cell: _cell(plain_step(torch.tanh)),
    torch.rnn_relu_cell: _cell(plain_step(torch.relu)),
    torch.gru_cell: _cell(gru_step),
    torch.lstm_cell: _cell(lstm_step),
    torch.rnn_tanh: _network(plain_step(torch.tanh), "RNN"),
    torch.rnn_relu: _network(plain_step(torch.relu), "RNN"),
    torch.gru: _network(gru_step, "GRU"),
    torch.lstm: _network(lstm_step, "LSTM"),
}
"""What to compute in place of torch's functions."""
