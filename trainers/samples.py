"""What a sample is, which there are, and what they weigh.

Of a feed-forward network a sample is one step of one agent in one copy: tensors [agent, sample,
...]. Of a recurrent one it is a segment of a trajectory, all steps of one copy in a rollout:
tensors [agent, segment, time, ...], with `starts`, where an episode begins, and with each network's
`memory` [agent, segment, size] before the first step. `active` says which steps their agent acted
in, if not all; agents that have left their episode have no samples. `world_state` [1, sample, ...],
once for all agents, is there where critics are to read it (`trainers.critic_input`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

READ = {
    "actor": ("observation", "action", "action_mask", "log_prob", "advantage"),
    "critic": ("observation", "world_state", "value", "target"),
}
"""What each network's loss may read of every sample, beside its `memory`, `starts` and `active`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    r"""Makes plain means over a minibatch of what is a mean over each agent's own samples.

    The loss of a rollout is :math:`\frac1N \sum_i \frac1{n_i} \sum_t \ell_{i,t}` over the
    :math:`n_i` samples that agent i has: 1/N times the one that `gradlab.decompose` takes apart.
    A sample weighs :math:`S / n_i`, S being the places for samples, in every minibatch: the
    minibatches' losses then agree on average with the rollout's, and an agent with few samples in
    one of them does not have these few count for all that it did.

    Attributes:
        values: The weights, 0 where there is no sample; None if all agents have all samples.
    """

    values: Float[Tensor, "agent sample"] | None

    @classmethod
    def of(cls, exist: Bool[Tensor, "agent sample"] | None) -> "Weights":
        """Weigh a rollout's samples.

        Args:
            exist: Which there are; None: all.

        Returns:
            The weights, in float64.
        """
        if exist is None:
            return cls(values=None)
        weights = exist.double()
        share = weights.mean(1, keepdim=True)
        return cls(values=weights / torch.where(share > 0, share, 1.0))

    def part(self, samples: Int[Tensor, " part"]) -> "Weights":
        """Those of some samples.

        Args:
            samples: Their numbers.

        Returns:
            The weights.
        """
        return self if self.values is None else Weights(values=self.values[:, samples])

    def __call__(self, values: Float[Tensor, "agent sample"]) -> Float[Tensor, "agent sample"]:
        """Weigh values.

        Args:
            values: One for each place.

        Returns:
            What the mean over agents and places is to be taken of.
        """
        if self.values is None:
            return values
        return torch.where(self.values > 0, values * self.values.to(values.dtype), 0.0)


def exist(samples: Mapping[str, Tensor]) -> Bool[Tensor, "agent sample"] | None:
    """Which samples there are: of segments, those in which their agent acted.

    Args:
        samples: Samples by name.

    Returns:
        Where there is one; None if there are all.
    """
    active = samples.get("active")
    return active if active is None or "starts" not in samples else active.any(-1)


def of_samples(
    values: Float[Tensor, "*batch"], samples: Mapping[str, Tensor]
) -> Float[Tensor, "*sample"]:
    """Reduce what belongs to steps: of a segment, the mean over the steps that its agent acted in.

    Args:
        values: One for each step.
        samples: Samples by name, with or without leading axes.

    Returns:
        One for each sample; 0 for a segment without such a step.
    """
    if "starts" not in samples:
        return values
    active = samples.get("active")
    if active is None:
        return values.mean(-1)
    total = torch.where(active, values, 0.0).sum(-1)
    return total / active.sum(-1).clamp(min=1)


def of_network(samples: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """Give samples the memory of the network that is to read them.

    Args:
        samples: Samples by name; of recurrent networks with `<network>_memory`.
        network: "actor" or "critic".

    Returns:
        The same with its `memory`, if it has one.
    """
    own = samples.get(f"{network}_memory")
    return dict(samples) if own is None else {**samples, "memory": own}
