"""Running scales of observations and rewards, from all that a training has seen."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainers.processes import ALONE, Group

_SMALLEST_VARIANCE = 1e-8
"""Added to variances, so that what never changes is not divided by 0."""


class RunningMoments:
    """Count, mean and sum of squared deviations of rows, in float64.

    Batches are merged exactly (Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm
    for computing sample variances", 1979, eq. 2.1), so it does not matter how rows are cut into
    batches but for rounding.

    Several processes add their rows at the same time, and all have the moments of all rows.

    Attributes:
        count: Number of rows.
        mean: Their mean, 0 before the first.
        squares: Their summed squared deviations from it.
        group: The processes that add rows.
    """

    def __init__(self, *shape: int, group: Group = ALONE) -> None:
        self.group = group
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "row ..."]) -> None:
        """Take in more rows.

        Args:
            rows: They; there may be none.
        """
        rows = rows.double()
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        own = torch.stack([torch.full_like(mean, len(rows)), mean, squares])
        for more, mean, squares in self.group.whole(own[None], 0):
            if not more.any():
                continue
            total = self.count + more.flatten()[0]
            apart = mean - self.mean
            self.squares = self.squares + squares + apart.square() * (self.count * more / total)
            self.mean = self.mean + apart * (more / total)
            self.count = total

    def deviation(self) -> Float[Tensor, "..."]:
        """Standard deviation of the rows.

        Returns:
            The root of the plug-in variance plus 1e-8; 1 before the first row.
        """
        if not self.count:
            return torch.ones_like(self.mean)
        return (self.squares / self.count + _SMALLEST_VARIANCE).sqrt()

    def state(self) -> dict[str, Tensor]:
        """What the rest depends on.

        Returns:
            Tensors by name.
        """
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a state.

        Args:
            tensors: What `state` returned.
        """
        self.count, self.mean, self.squares = (
            tensors[name] for name in ("count", "mean", "squares")
        )


class ObservationNormaliser:
    """Shifts and scales each observed number by its running mean and standard deviation.

    All agents share them, whatever they share otherwise: agents keep what tells them apart, and
    all sharing schemes read the same.

    Attributes:
        moments: Of each observed number, over agents, copies and time.
        clip: Where what it makes is cut off.
    """

    def __init__(self, observation_size: int, clip: float, group: Group = ALONE) -> None:
        self.moments = RunningMoments(observation_size, group=group)
        self.clip = clip

    def learn(self, observation: Float[Tensor, "sample obs"]) -> None:
        """Take observations into the running moments.

        Args:
            observation: What agents act on.
        """
        self.moments.add(observation)

    def __call__(
        self, observation: Float[Tensor, "agent copy obs"]
    ) -> Float[Tensor, "agent copy obs"]:
        """Normalise by the moments as they stand.

        Args:
            observation: What the environment gave.

        Returns:
            What the networks read, cut off at plus and minus `clip`.
        """
        scaled = (observation - self.moments.mean) / self.moments.deviation()
        return scaled.clamp(-self.clip, self.clip).to(observation.dtype)

    def state(self) -> dict[str, Tensor]:
        """What the rest depends on.

        Returns:
            Tensors by name.
        """
        return self.moments.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a state.

        Args:
            tensors: What `state` returned.
        """
        self.moments.load_state(tensors)


class RewardNormaliser:
    """Scales rewards by the standard deviation of discounted returns (Engstrom et al., 2020).

    One scale for all agents, so that their rewards stay comparable; the mean is left alone, which
    would change what is optimal. (Section 3 of "Implementation Matters in Deep Policy Gradients".)

    Attributes:
        moments: Of the discounted sums of rewards so far in each episode, at every step.
        returns: Those sums [agent, copy], of this process's copies.
    """

    def __init__(
        self, agents: int, copies: int, *, discount: float, clip: float, group: Group = ALONE
    ) -> None:
        self.moments = RunningMoments(group=group)
        self.returns = torch.zeros(agents, copies, dtype=torch.float64)
        self._discount = discount
        self._clip = clip

    def __call__(
        self,
        reward: Float[Tensor, "agent copy"],
        ended: Bool[Tensor, " copy"],
        acted: Bool[Tensor, "agent copy"],
    ) -> Float[Tensor, "agent copy"]:
        """Learn from one step's rewards, and scale them.

        Args:
            reward: What the environment paid.
            ended: Where an episode ended with this step.
            acted: Which agents were still in their episode; the others' returns are not learned.

        Returns:
            What the critic learns from, cut off at plus and minus `clip`.
        """
        self.returns = self._discount * self.returns + reward
        self.moments.add(self.returns[acted])
        self.returns = self.returns * ~ended
        scaled = reward / self.moments.deviation()
        return scaled.clamp(-self._clip, self._clip).to(reward.dtype)

    def state(self) -> dict[str, Tensor]:
        """What the rest depends on.

        Returns:
            Tensors by name.
        """
        returns = self.moments.group.whole(self.returns, 1)
        return {**self.moments.state(), "returns": returns}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a state.

        Args:
            tensors: What `state` returned.
        """
        self.moments.load_state(tensors)
        group = self.moments.group
        self.returns = tensors["returns"].chunk(group.size, 1)[group.rank]
