"""GRUs written out as linear layers, which every transform of `torch.func` understands.

torch's fused `gru_cell` and `gru` have no batching rule that keeps derivatives; the same equations
(Cho et al., 2014, in cuDNN's form) in linear layers and gates do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradlab.checks import UsageError


def gru_cell(
    input: Tensor,
    hidden: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a gated recurrent unit, as `torch.gru_cell`.

    Args:
        input: Inputs [*batch, in].
        hidden: State before [*batch, hidden].
        w_ih: Weights of the inputs [3 hidden, in]: reset, update and new gate.
        w_hh: Weights of the state [3 hidden, hidden].
        b_ih: Biases [3 hidden].
        b_hh: Biases [3 hidden].

    Returns:
        The state after [*batch, hidden].
    """
    return _step(functional.linear(input, w_ih, b_ih), hidden, w_hh, b_hh)


class GRUAsLinear(TorchFunctionMode):
    """While active, `torch.gru_cell` and `torch.gru` are computed by linear layers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Called by torch in place of each of its functions."""
        return _WRITTEN_OUT.get(func, func)(*args, **(kwargs or {}))


def _step(gates: Tensor, hidden: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """The rest of a step, given the inputs' share of the gates [*batch, 3 hidden]."""
    reset_in, update_in, new_in = gates.chunk(3, -1)
    reset_h, update_h, new_h = functional.linear(hidden, w_hh, b_hh).chunk(3, -1)
    update = torch.sigmoid(update_in + update_h)
    new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
    return new + update * (hidden - new)


def _gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    if bidirectional or (dropout > 0 and train) or not isinstance(params, tuple | list):
        raise UsageError(
            "A GRU under per-sample gradients must be unidirectional, without dropout and without "
            f"packed sequences. Got bidirectional={bidirectional}, dropout={dropout}."
        )
    time = 1 if batch_first and input.dim() == 3 else 0
    each = 4 if has_biases else 2
    last = []
    for layer in range(num_layers):
        w_ih, w_hh, *biases = params[layer * each : (layer + 1) * each]
        b_ih, b_hh = biases if has_biases else (None, None)
        gates = functional.linear(input, w_ih, b_ih)
        hidden, states = hx[layer], []
        for now in gates.unbind(time):
            hidden = _step(now, hidden, w_hh, b_hh)
            states.append(hidden)
        input = torch.stack(states, time)
        last.append(hidden)
    return input, torch.stack(last)


_WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.gru_cell: gru_cell,
    torch.gru: _gru,
}
