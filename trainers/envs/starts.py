"""Starts of VMAS episodes: many made in one reset, handed out to the copies that finish."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainers.envs.object_state import leaf_at, leaves

MADE_AT_ONCE = 31
"""Starts made by one reset; an unusual number, so that an axis of this length numbers copies."""

_Written = dict[str, tuple[Tensor, Tensor]]


class _MoreThanTensorsError(Exception):
    """A reset writes something else than tensors of all copies."""


class Starts:
    """First states of episodes, from a second environment that is only ever reset.

    VMAS takes as long to reset one copy as to reset all of them. Most scenarios' resets write
    nothing but tensors with an axis of copies, whatever was there before; then a row of each, made
    ahead, starts a finished copy anew, and no other copy is touched. Whether that is so, and which
    tensors those are, is found by watching resets.

    Attributes:
        possible: Whether it is so in this scenario. If not, copies have to be reset one by one.
    """

    def __init__(
        self,
        env: Any,  # noqa: ANN401 -- vmas has no types
        packages: tuple[str, ...],
        stack: Callable[[list[Tensor]], Tensor],
    ) -> None:
        """Watch the scenario's resets.

        Args:
            env: A VMAS environment of `MADE_AT_ONCE` copies. Neither it nor this may be made in
                inference mode, in which tensors don't count how often they are written to.
            packages: What its state is made of, as for `object_state.capture`.
            stack: Makes one tensor [agent, copy, obs] of all agents' observations.
        """
        self._env = env
        self._packages = packages
        self._stack = stack
        try:
            self._paths = self._written_by_resets()
        except _MoreThanTensorsError:
            self._paths = ()
        self.possible = bool(self._paths)
        self._made: dict[str, Tensor] = {}
        self._used = MADE_AT_ONCE

    def into(
        self,
        env: Any,  # noqa: ANN401
        copies: Int[Tensor, " ended"],
        own: slice,
    ) -> tuple[Int[Tensor, " own"], Float[Tensor, "agent own obs"]]:
        """Start finished copies anew.

        Args:
            env: The environment that is played; it is written to in the mode (inference or not)
                that it was stepped in.
            copies: The numbers of all that have finished, each of which uses up a start.
            own: Which of all copies are in that environment.

        Returns:
            The numbers there of those that have finished, and their first observations.
        """
        started, observations = [], []
        while len(copies):
            if self._used == MADE_AT_ONCE:
                seen = self._stack(self._env.reset()).transpose(0, 1)
                made = {path: leaf_at(self._env, path) for path in self._paths}
                self._made, self._used = made | {"": seen}, 0
            now = copies[: MADE_AT_ONCE - self._used]
            rows = torch.arange(self._used, self._used + len(now))
            here = (now >= own.start) & (now < own.stop)
            places, rows = now[here] - own.start, rows[here]
            for path in self._paths:
                leaf_at(env, path).index_copy_(0, places, self._made[path][rows])
            started.append(places)
            observations.append(self._made[""][rows].transpose(0, 1))
            self._used += len(now)
            copies = copies[len(now) :]
        return torch.cat(started), torch.cat(observations, dim=1)

    def take_over(self, all_copies: Any, env: Any, own: slice) -> None:  # noqa: ANN401
        """Start all copies of an environment as others were just reset.

        Args:
            all_copies: An environment of the same scenario, after its reset. If it has not been
                stepped yet, it is then, as some attributes only come to be with the first step.
            env: The environment that is played, as for `into`; reset only if that is so.
            own: Which of those copies are in it.
        """
        made, there = (dict(leaves(each, self._packages)) for each in (all_copies, env))
        new = False
        for path in self._paths:
            start, place = made.get(path), there.get(path)
            if isinstance(start, Tensor) and isinstance(place, Tensor):
                place.copy_(start[own])
            else:
                new = True
        if new:
            self._step(all_copies)

    def state(self) -> dict[str, Tensor]:
        """What is left of the starts that were made.

        Returns:
            Tensors [start, ...] by path in the environment; under the empty path, observations
            [start, agent, obs].
        """
        return {path: made[self._used :] for path, made in self._made.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on with starts that were made before.

        Args:
            tensors: What `state` returned.
        """
        left = len(tensors[""]) if tensors else 0
        self._used = MADE_AT_ONCE - left
        self._made = {
            path: torch.cat([made.new_empty(self._used, *made.shape[1:]), made])
            for path, made in tensors.items()
        }

    def _written_by_resets(self) -> tuple[str, ...]:
        """Paths of the tensors that starting a copy takes; none if that is not enough."""
        env, row = self._env, MADE_AT_ONCE // 2

        def unseen() -> None:
            env.reset(return_observations=False)

        def alone() -> None:
            env.reset_at(row, return_observations=False)

        # Other random numbers each time, as a scalar may be drawn, but the same ones in the end.
        looked, *same = [self._watch(env.reset, seed) for seed in (1, 2, 3, 1)]
        full = [self._watch(unseen, seed) for seed in (4, 5)]
        one = [self._watch(alone, seed) for seed in (6, 7)]
        others = torch.arange(MADE_AT_ONCE) != row
        fit = (
            all(written.keys() == looked.keys() for written in same)
            and all(written.keys() == one[0].keys() for written in (*full, *one))
            and one[0].keys() <= looked.keys()
            and all(_equal(looked[path][1], same[-1][path][1]) for path in looked)
            and all(_equal(old[others], new[others]) for w in one for old, new in w.values())
        )
        # A tensor that hangs in several places is to be written once.
        first = {id(leaf_at(env, path)): path for path in reversed(looked)}
        return tuple(first.values()) if fit else ()

    def _step(self, env: Any) -> None:  # noqa: ANN401
        sizes = [env.get_agent_action_size(agent) for agent in env.agents]
        env.step([torch.ones(env.num_envs, size) for size in sizes])

    def _watch(self, reset: Callable[[], object], seed: int) -> _Written:
        """Copies of what a reset writes, before and after, by path.

        The environment is played for a step before.
        """
        env = self._env
        self._step(env)
        before = dict(leaves(env, self._packages))
        versions = {path: x._version for path, x in before.items() if isinstance(x, Tensor)}
        copies = {path: x.clone() for path, x in before.items() if isinstance(x, Tensor)}
        env.seed(seed)
        reset()
        after = dict(leaves(env, self._packages))
        written: _Written = {}
        if before.keys() != after.keys():
            raise _MoreThanTensorsError
        for path, new in after.items():
            old = before[path]
            if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
                if type(old) is not type(new) or old != new:
                    raise _MoreThanTensorsError
            elif new is not old or new._version != versions[path]:
                if new.shape != old.shape or new.shape[:1] != (MADE_AT_ONCE,):
                    raise _MoreThanTensorsError
                written[path] = copies[path], new.clone()
        return written


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
