"""SePS's two phases: agents share a network and are watched, then are put in groups.

Christianos et al. (2021), see `trainers.generators.seps`.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import davies_bouldin_score
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from gradlab.quantity import Quantity
from trainers.agent_encoder import encode_agents
from trainers.config import TrainConfig
from trainers.generators.seps import SePS
from trainers.off_policy import encoded
from trainers.policies import Policy
from trainers.replay import FOLLOWING, Replay, columns_of
from trainers.rollout import Played


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Agents in groups.

    Attributes:
        group: Number of each agent's group; groups are numbered in the order of their first agents.
        index: Davies-Bouldin index by the number of groups, where a number was chosen; NaN where
            there were not so many places to put groups.
    """

    group: Int[Tensor, " agent"]
    index: Mapping[int, float]


def cluster(
    rows: Float[Tensor, "agent feature"], groups: int | None, most: int, seed: int
) -> Groups:
    """Group agents by k-means.

    Args:
        rows: What to group them by.
        groups: How many groups; None: the number from 2 to `most` with the least Davies-Bouldin
            index (Davies & Bouldin, 1979), one group if no number has one.
        most: As above.
        seed: Of the first centres.

    Returns:
        The groups; fewer where agents have the same rows.
    """
    if groups is not None:
        return Groups(group=_ordered(_clustered(rows, groups, seed)), index={})
    found = {number: _clustered(rows, number, seed) for number in range(2, most + 1)}
    index = {
        number: float(davies_bouldin_score(rows.numpy(), labels.numpy()))
        if len(labels.unique()) == number
        else float("nan")
        for number, labels in found.items()
    }
    known = {number: value for number, value in index.items() if not np.isnan(value)}
    best = min(known, key=known.__getitem__) if known else None
    labels = torch.zeros(len(rows), dtype=torch.int64) if best is None else found[best]
    return Groups(group=_ordered(labels), index=index)


class Grouping:
    """Watches agents for so many frames, then puts them in groups, once.

    Attributes:
        experience: What they went through; None once they are in groups.
    """

    def __init__(
        self,
        config: TrainConfig,
        networks: Sequence[SePS],
        policy: Policy,
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Watch nothing yet.

        Args:
            config: All settings.
            networks: Those whose parameters the groups are to have.
            policy: The policies' form.
            optimiser: Trains the networks.

        Raises:
            UsageError: If the training ends before agents are in groups and have trained.
        """
        settings, of_update = config.seps, config.copies * config.steps
        last = (config.updates - 1) * of_update
        check(
            settings.pretraining_frames <= last,
            "seps.pretraining_frames",
            f"leave an update to train the groups in: be at most {last} with {config.frames} "
            f"frames (--frames), {of_update} in each update",
            settings.pretraining_frames,
        )
        self._config, self._settings = config, settings
        self._networks, self._policy, self._optimiser = networks, policy, optimiser
        self.experience: Replay | None = self._nothing()

    def watch(
        self, played: Played, seen: Mapping[str, Tensor], random: RandomGenerator
    ) -> dict[str, Quantity]:
        """Remember steps, and when there are enough, put agents in groups.

        Networks start afresh then, and so do their moments in the optimiser.

        Args:
            played: The steps.
            seen: What the networks read next, by name.
            random: Source of all that is drawn.

        Returns:
            Of agents that were put in groups: `group`; `davies_bouldin` by number of groups, if
            their number was chosen; and `encoder_loss`. Else nothing.
        """
        if self.experience is None:
            return {}
        watched = {"observation": seen["observation"]}
        columns = columns_of(played, watched, None)
        names = ("observation", FOLLOWING + "observation", "action", "left", "active")
        kept = {name: columns[name] for name in names}
        self.experience.add(kept | {"reward": played.columns["reward"]})
        if self.experience.added * self.experience.copies < self._settings.pretraining_frames:
            return {}
        held = self.experience.state()
        held["following"] = held.pop(FOLLOWING + "observation")
        held["action"] = encoded(self._policy, held["action"])
        encoding, loss = encode_agents(held, self._settings, random)
        seed = int(torch.randint(2**31, (), generator=random))
        most = self._networks[0].slices
        groups = cluster(encoding, self._settings.groups, most, seed)
        for network in self._networks:
            network.regroup(groups.group, encoding, random)
            for parameter in network.parameters():
                self._optimiser.state.pop(parameter, None)
        self.experience = None
        return _quantities(groups, loss)

    def state(self) -> dict[str, Tensor]:
        """What the rest of the training depends on, but for the networks.

        Returns:
            Tensors by name; none once agents are in groups.
        """
        return {} if self.experience is None else self.experience.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Args:
            tensors: That.
        """
        self.experience = self._nothing() if tensors else None
        if self.experience is not None:
            self.experience.load_state(tensors)

    def _nothing(self) -> Replay:
        copies = self._config.copies
        rows = -(-self._settings.pretraining_frames // copies)
        return Replay(rows * copies, copies)


def said(group: Sequence[int]) -> str:
    """Say who is with whom.

    Args:
        group: The group of each agent.

    Returns:
        Agents by group, e.g. "0 1 4 | 2 3".
    """
    members: dict[int, list[str]] = {}
    for agent, number in enumerate(group):
        members.setdefault(number, []).append(str(agent))
    return " | ".join(" ".join(members[number]) for number in sorted(members))


def _clustered(rows: Tensor, groups: int, seed: int) -> Tensor:
    with warnings.catch_warnings():
        # Said of agents with the same rows, which are then in one group.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = KMeans(groups, n_init=10, random_state=seed).fit_predict(rows.double().numpy())
    return torch.from_numpy(labels.astype(np.int64))


def _ordered(labels: Tensor) -> Tensor:
    """The same groups, numbered in the order of their first agents."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return torch.tensor([numbers[label] for label in labels.tolist()])


def _quantities(groups: Groups, loss: float) -> dict[str, Quantity]:
    agents = list(range(len(groups.group)))
    found = {
        "group": Quantity(
            values=groups.group.double().numpy(),
            dims=("agent",),
            coords={"agent": agents},
            unit="1",
            estimator="number of the group, from the update after this one on",
        ),
        "encoder_loss": Quantity.scalar(loss, "loss", "mean over samples of the last epoch"),
    }
    if groups.index:
        found["davies_bouldin"] = Quantity(
            values=np.array([*groups.index.values()]),
            dims=("groups",),
            coords={"groups": [*groups.index]},
            unit="1",
            estimator="of k-means with so many groups; the least is chosen",
        )
    return found
