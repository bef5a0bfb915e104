"""What off-policy algorithms remember: the last steps of every copy, in a ring."""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Generator as RandomGenerator
from torch import Tensor

from trainers.rollout import Played

FOLLOWING = "following_"
"""Prefix of the names of what was seen after a step, before any reset."""


class Replay:
    """Steps in the order in which they were made, the oldest overwritten by the newest.

    A step is a row: what all agents of all copies saw, did and earned, and what followed. Returns
    over several steps are made when they are drawn, so that they look as far ahead as was asked
    for wherever a rollout ended.

    Attributes:
        rows: Number of rows that there is room for.
        copies: Number of environment copies in each.
        added: Number of rows added so far.
    """

    def __init__(self, frames: int, copies: int) -> None:
        """Remember nothing yet.

        Args:
            frames: Environment steps to remember, summed over copies; rounded down to whole rows.
            copies: Number of copies.
        """
        self.rows = frames // copies
        self.copies = copies
        self.added = 0
        self._held: dict[str, Tensor] = {}  # [row * copy, agent, ...]

    @property
    def filled(self) -> int:
        """Number of rows that hold a step."""
        return min(self.added, self.rows)

    @property
    def frames(self) -> int:
        """Environment steps that are remembered, summed over copies."""
        return self.filled * self.copies

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Remember steps.

        Args:
            columns: Tensors [agent, time, copy, ...] by name, of [1, ...] where all agents share
                one; the same names every time. See `columns_of`.
        """
        steps = next(iter(columns.values())).shape[1]
        kept = min(steps, self.rows)
        at = torch.arange(self.added + steps - kept, self.added + steps) % self.rows
        for name, tensor in columns.items():
            rows = tensor[:, steps - kept :].movedim(0, 2)  # [time, copy, agent, ...]
            if name not in self._held:
                self._held[name] = rows.new_zeros(self.rows * self.copies, *rows.shape[2:])
            self._held[name].unflatten(0, (self.rows, self.copies))[at] = rows
        self.added += steps

    def draw(self, count: int, random: RandomGenerator) -> Int[Tensor, " sample"]:
        """Draw steps of copies, each as likely as any other.

        Args:
            count: How many, with replacement.
            random: Source of randomness.

        Returns:
            Their places, row * copies + copy.
        """
        return torch.randint(self.frames, (count,), generator=random)

    def spread(self, rows: int) -> Int[Tensor, " sample"]:
        """Choose steps of all copies, as evenly over what is remembered as can be.

        Args:
            rows: How many of each copy at most.

        Returns:
            Their places; copies follow each other.
        """
        chosen = min(rows, self.filled)
        some = torch.arange(chosen) * self.filled // chosen
        return (some[:, None] * self.copies + torch.arange(self.copies)).flatten()

    def take(
        self, places: Int[Tensor, " sample"], *, steps: int, discount: float
    ) -> dict[str, Tensor]:
        r"""Look up samples, with their returns over several steps.

        From step t on, with :math:`m \le n` steps until the episode ends or the newest step,

        .. math:: R = \sum_{k=0}^{m-1} \gamma^k r_{t+k}, \quad target = R + c \, Q(s_{t+m}),
                  \quad c = \gamma^m

        (Sutton & Barto, "Reinforcement Learning", 2018, eq. 7.1); c is 0, and nothing more is
        earned, from where an agent's episode is over or it has left it.

        Args:
            places: As `draw` returns them.
            steps: n.
            discount: Gamma.

        Returns:
            Tensors [agent, sample, ...] by name: what was seen and done at t, `active`; the
            `following_...` at t + m; `return` R and `bootstrap` c.
        """
        held = {name: t for name, t in self._held.items() if not name.startswith(FOLLOWING)}
        found = {name: self._at(places, name) for name in held if name not in _SUMMED}
        newest = (self.added - 1) % self.rows
        at = places
        ahead = torch.ones(len(places), dtype=torch.bool)  # whether `at` is still to be counted
        going = torch.ones_like(self._at(places, "left"))
        earned = torch.zeros_like(self._at(places, "paid"))
        power = torch.ones(len(places), dtype=earned.dtype)
        for step in range(steps):
            paid = self._at(at, "paid")
            earned += torch.where(going & ahead, discount**step * paid, 0.0)
            going &= ~(self._at(at, "left") & ahead)
            power = torch.where(ahead, power * discount, power)
            ahead = ahead & ~self._at(at, "ended")[0] & (at // self.copies != newest)
            if step + 1 < steps:
                at = torch.where(ahead, (at + self.copies) % (self.rows * self.copies), at)
        for name in self._held:
            if name.startswith(FOLLOWING):
                found[name] = self._at(at, name)
        return found | {"return": earned, "bootstrap": power * going}

    def state(self) -> dict[str, Tensor]:
        """What is remembered.

        Returns:
            Tensors by name.
        """
        held = {name: tensor[: self.frames] for name, tensor in self._held.items()}
        return {"added": torch.tensor(self.added), **held}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what was remembered.

        Args:
            tensors: What `state` returned.
        """
        self.added = int(tensors["added"])
        for name, tensor in tensors.items():
            if name != "added":
                room = tensor.new_zeros(self.rows * self.copies, *tensor.shape[1:])
                room[: len(tensor)] = tensor
                self._held[name] = room

    def _at(self, places: Tensor, name: str) -> Tensor:
        """[agent, sample, ...] of one column."""
        return self._held[name].index_select(0, places).movedim(0, 1)


_SUMMED = ("paid", "left", "ended")


def columns_of(
    played: Played, seen: Mapping[str, Tensor], mask: Tensor | None
) -> dict[str, Tensor]:
    """What is remembered of some steps.

    Args:
        played: The steps.
        seen: What the networks read next, by name.
        mask: What may be done then [agent, copy, action]; None: everything, always.

    Returns:
        Tensors [agent, time, copy, ...] by name: what was seen, and what followed it before any
        reset (`following_...`); `action`, `paid`, `left`, `active`, `ended`, and the `action_mask`
        before and after, if there is one.
    """
    columns = played.columns
    found = {name: columns[name] for name in (*seen, "action", "paid", "left", "active")}
    found["ended"] = played.ended[None]
    for name, now in seen.items():
        following = torch.cat([columns[name][:, 1:], now[:, None]], dim=1)
        for time, last in played.final.items():
            following[:, time] = last[name]
        found[FOLLOWING + name] = following
    if mask is not None:
        could = columns["action_mask"]
        following = torch.cat([could[:, 1:], mask[:, None]], dim=1)
        # Nobody says what could be done in a state that cut its episode off: as much as before it.
        cut = played.truncated[None, ..., None]
        found["action_mask"] = could
        found[FOLLOWING + "action_mask"] = torch.where(cut, could, following)
    return found
