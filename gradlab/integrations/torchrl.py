"""gradlab on a training loop of TorchRL: from a loss module and a batch of tensordicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import tensordict
import torchrl
import xarray as xr
from jaxtyping import Int
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.modules import MultiAgentMLP

from gradlab.attach.network import undisturbed
from gradlab.attach.probe import Probe
from gradlab.checks import UsageError, check
from gradlab.integrations.group_batch import GroupBatch
from gradlab.integrations.losses import agent_loss
from gradlab.probe import Level


class LossProbe:
    """Takes the gradients of a multi-agent loss module apart while somebody else's loop trains it.

    Each agent's loss is the module's, of that agent's samples alone and in the mean over them: the
    module's own gradient is the mean of the agents' contributions. Nothing about the training
    changes. Close it when the training is done, or use it as a context manager.

    Attributes:
        probe: The probe that it feeds.
    """

    def __init__(
        self,
        loss: nn.Module,
        *,
        agents: int | Sequence[str] | None = None,
        every: int = 10,
        out: str | Path | None = None,
        level: Level = "full",
        method: str | None = None,
        environment: str = "TorchRL",
        config: Mapping[str, object] | None = None,
        recurrent: bool = False,
        resume: bool = False,
    ) -> None:
        """Attach to a loss module.

        Args:
            loss: A `ClipPPOLoss`, or a `DDPGLoss` whose critics read one agent alone; of networks
                that are `MultiAgentMLP`s, shared or not, centralised or not. Of PPO's policies the
                distribution is Categorical, MaskedCategorical, OneHotCategorical, IndependentNormal
                or TanhNormal.
            agents: Number of agents, or their names; by default as the networks say.
            every: See `gradlab.Probe`.
            out: See `gradlab.Probe`.
            level: See `gradlab.Probe`.
            method: See `gradlab.Probe`.
            environment: See `gradlab.Probe`.
            config: See `gradlab.Probe`.
            recurrent: Whether a sample is a copy's whole stretch of time, as recurrent networks
                need it.
            resume: See `gradlab.Probe`.

        Raises:
            UsageError: If something can't be taken apart, or is not as it must be.
        """
        if agents is None:
            agents = _agents_of(loss)
        number = agents if isinstance(agents, int) else len(agents)
        self._of = agent_loss(loss, number)
        self._number, self._segments, self._compared = number, recurrent, False
        networks = self._of.networks
        targets = {name: of.target for name, of in networks.items() if of.target is not None}
        versions = {"torchrl": torchrl.__version__, "tensordict": tensordict.__version__}
        self.probe = Probe(
            {name: of.policy for name, of in networks.items()},
            self._of.losses,
            agents=agents,
            every=every,
            out=out,
            level=level,
            generate={name: lambda policy, agents: policy(agents) for name in targets},
            target=targets,
            method=method,
            environment=environment,
            config={**(config or {}), "loss": type(loss).__name__, "frameworks": versions},
            resume=resume,
        )

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.probe.path

    @property
    def due(self) -> bool:
        """Whether the next call diagnoses what it is given."""
        return self.probe.due

    def __call__(
        self,
        batch: TensorDictBase,
        *,
        copy: Int[Tensor, " _"] | None = None,
        scalars: Mapping[str, float | int] | None = None,
    ) -> xr.Dataset | None:
        """Diagnose what the loop is about to train on, if it is due.

        Args:
            batch: What the loss module would be called with, advantages included: [copy, time] as
                vectorised environments are collected, or [sample]. The loss module's normalisation
                of advantages is done over all of it.
            copy: The environment copy of each sample, if the batch is [sample].
            scalars: Numbers to record with it, due or not.

        Returns:
            What was found, labelled, or None if it was not due.

        Raises:
            UsageError: If something is not as it must be, with how to mend it.
        """
        if not self.due:
            return self.probe({}, scalars=scalars)
        of = GroupBatch(batch, self._number, segments=self._segments)
        self._of.look()
        if not self._compared:
            with undisturbed(set()):
                self._of.compare(of)
            self._compared = True
        copy = of.copy if copy is None else copy
        return self.probe(lambda: self._of.batches(of), copy=copy, scalars=scalars)

    def close(self, error: BaseException | None = None) -> None:
        """Mark the run as done; nothing more is recorded.

        Args:
            error: What the training ended with, if with one.
        """
        self.probe.close(error)

    def __enter__(self) -> "LossProbe":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)


def _agents_of(loss: object) -> int:
    """How many agents a loss module's actor has."""
    actor = getattr(loss, "actor_network", None)
    if actor is None:
        raise UsageError(
            f"`loss` must be a TorchRL loss module with an actor. Got {type(loss).__name__}."
        )
    found = {part.n_agents for part in actor.modules() if isinstance(part, MultiAgentMLP)}
    rule = "be given, where no MultiAgentMLP of the actor says how many there are"
    check(len(found) == 1, "agents", rule, sorted(found))
    return int(found.pop())
