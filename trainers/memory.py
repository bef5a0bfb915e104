"""What a recurrent network makes of all that its agent has seen in an episode."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradlab.engine.recurrent import gru_state
from trainers.linear import linear

ENCODER, GRU = "encoder", "gru"
"""Names of its layers."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A dense layer with ReLU, then a gated recurrent unit; its parameters are handed in.

    The form of the official recurrent networks (HyperMARL; see Cho et al., 2014, for the unit, here
    with torch's two biases). The state is forgotten where an episode begins. What the layers after
    it read is the new state.

    Attributes:
        inputs: Length of an observation.
        size: Width of the dense layer, and of the state.
    """

    inputs: int
    size: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by name, in order."""
        return {
            f"{ENCODER}.weight": (self.size, self.inputs),
            f"{ENCODER}.bias": (self.size,),
            f"{GRU}.weight_ih": (3 * self.size, self.size),
            f"{GRU}.weight_hh": (3 * self.size, self.size),
            f"{GRU}.bias_ih": (3 * self.size,),
            f"{GRU}.bias_hh": (3 * self.size,),
        }

    def empty(self, *batch: int) -> Float[Tensor, "*batch size"]:
        """The state in which an episode begins.

        Args:
            batch: Sizes of the axes before the state's.

        Returns:
            Zeros.
        """
        return torch.zeros(*batch, self.size)

    def over_time(
        self,
        theta: dict[str, Tensor],
        observation: Float[Tensor, "*batch time obs"],
        state: Float[Tensor, "*batch size"],
        starts: Bool[Tensor, "*batch time"] | None = None,
    ) -> Float[Tensor, "*batch time size"]:
        """Follow segments of trajectories.

        Args:
            theta: Parameters by name, of one agent (*batch is then empty), or with a leading axis
                [agent] or [1] (*batch is then [agent, segment]).
            observation: What is seen at each step.
            state: The state before the first step; no gradient goes back further.
            starts: Where an episode begins, with an empty state; None: nowhere.

        Returns:
            The state after each step.
        """
        read = linear(observation, theta[f"{ENCODER}.weight"], theta[f"{ENCODER}.bias"]).relu()
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        gru = [theta[f"{GRU}.{kind}"] for kind in kinds]
        shared = observation.dim() > 2 and all(len(parameter) == 1 for parameter in gru)
        follow = _fused if shared else _step_by_step
        return follow(read, state, starts, *gru)


def forgotten(
    state: Float[Tensor, "*batch size"], where: Bool[Tensor, "*where"]
) -> Float[Tensor, "*batch size"]:
    """Empty the state where an episode begins.

    Args:
        state: States.
        where: Where, for the last axes before the state's.

    Returns:
        The states that are left.
    """
    return torch.where(where[..., None], torch.zeros((), dtype=state.dtype), state)


def _step_by_step(
    read: Tensor,
    state: Tensor,
    starts: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Tensor:
    """One agent's segment, or all agents' with parameters of their own: batched, not looped."""
    states = []
    for time, from_input in enumerate(linear(read, weight_ih, bias_ih).unbind(-2)):
        if starts is not None:
            state = forgotten(state, starts[..., time])
        state = gru_state(from_input, linear(state, weight_hh, bias_hh), state)
        states.append(state)
    return torch.stack(states, -2)


def _fused(
    read: Tensor, state: Tensor, starts: Tensor | None, *parameters: Tensor
) -> Float[Tensor, "agent segment time size"]:
    """All agents' segments with the same parameters: torch's own loop, from reset to reset."""
    shape = read.shape
    rows = read.flatten(0, 1).transpose(0, 1)  # [time, row, size]
    state, cuts = state.flatten(0, 1)[None], [0, shape[2]]
    if starts is not None:
        starts = starts.flatten(0, 1).mT
        cuts = sorted({*cuts, *starts.any(1).nonzero().flatten().tolist()})
    own = [parameter[0] for parameter in parameters]
    states = []
    for first, last in pairwise(cuts):
        if starts is not None:
            state = forgotten(state, starts[first])
        stretch, state = torch.gru(rows[first:last], state, own, True, 1, 0.0, False, False, False)
        states.append(stretch)
    found: Tensor = torch.cat(states).transpose(0, 1).unflatten(0, shape[:2])
    return found
