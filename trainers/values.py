"""What the critics say of a rollout, once it is collected."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainers.critic_input import CriticInput, read_once
from trainers.memory import forgotten
from trainers.networks import MLP, Theta
from trainers.update import ROWS


@dataclass(frozen=True, kw_only=True)
class Critics:
    """All agents' value functions, as they stand while a rollout is collected.

    Attributes:
        network: Their form.
        theta: Their parameters for all agents, given what they read.
        reads: What they read of the observations, or world states.
    """

    network: MLP
    theta: Callable[[Tensor], Theta]
    reads: CriticInput

    def values(
        self,
        seen: Float[Tensor, "source following copy obs"],
        final: Mapping[int, Float[Tensor, "source copy obs"]],
        ended: Bool[Tensor, "time copy"],
        memory: Float[Tensor, "agent copy size"] | None,
    ) -> tuple[
        Float[Tensor, "agent time copy"],
        Float[Tensor, "agent time copy"],
        Float[Tensor, "agent copy size"] | None,
    ]:
        """Values of a rollout's observations, and of what followed each step.

        Args:
            seen: What all agents acted on at each step, and are to act on next: one more than
                there are steps; or how the world stood then, once for all agents.
            final: By step, what was seen before copies were reset, where that is asked for.
            ended: Where an episode ended.
            memory: What recurrent critics remember before the first observation.

        Returns:
            Values of what was acted on; values of what followed, in the steps of `final` of that;
            and what recurrent critics remember before they read the last observation.
        """
        steps = len(ended)
        if memory is None:
            value, of_final = self._at_once(seen, final)
        else:
            value, of_final, memory = self._in_turn(seen, final, ended, memory)
        following = value[:, 1:].clone()
        for step, value_then in of_final.items():
            following[:, step] = value_then
        return value[:, :steps], following, memory

    def _at_once(
        self, seen: Tensor, final: Mapping[int, Tensor]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        _, known, copies, _ = seen.shape
        agents = len(self.reads(seen[:, :1]))
        everything = torch.cat([seen, *(last[:, None] for last in final.values())], dim=1)
        # As in an update: few enough rows at once to stay in the processor's cache.
        parts = everything.split(max(1, ROWS // (agents * copies)), dim=1)
        value = torch.cat(
            [self._of(part.flatten(1, 2), None)[0].unflatten(1, (-1, copies)) for part in parts], 1
        )
        return value[:, :known], dict(zip(final, value[:, known:].unbind(1), strict=True))

    def _in_turn(
        self,
        seen: Tensor,
        final: Mapping[int, Tensor],
        ended: Tensor,
        memory: Tensor,
    ) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        values, of_final = [], {}
        for step, over in enumerate(ended):
            value, after = self._of(seen[:, step], memory)
            values.append(value)
            if step in final:
                of_final[step], _ = self._of(final[step], after)
            assert after is not None
            memory = forgotten(after, over)
        values.append(self._of(seen[:, -1], memory)[0])
        return torch.stack(values, 1), of_final, memory

    def _of(self, source: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Values [agent, copy] of one step, and what is remembered then."""
        seen = self.reads(source)
        theta = self.theta(seen)
        read, memory = self.network.read_next(theta, seen, memory)
        value = self.network.forward(theta, read_once(read, theta)).squeeze(-1)
        return value.expand(seen.shape[:2]), memory
