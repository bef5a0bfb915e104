"""gradlab in an experiment of BenchMARL: a callback."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import benchmarl
import torch
from benchmarl.experiment import Callback
from benchmarl.models.common import SequenceModel
from benchmarl.models.gru import Gru
from benchmarl.models.mlp import Mlp
from tensordict import TensorDictBase
from torch import Tensor, nn

from gradlab.attach.network import undisturbed
from gradlab.checks import UsageError, check
from gradlab.integrations.agent_network import (
    Axis,
    Maker,
    Piece,
    Read,
    Views,
    maker_of,
    name_of,
    pieces,
    refusal,
    stacked,
)
from gradlab.integrations.hypermarl import HyperMarl
from gradlab.integrations.torchrl import LossProbe
from gradlab.probe import Level
from gradlab.run_writer import is_run


class GradlabCallback(Callback):  # type: ignore[misc]
    """Takes the gradients of an experiment's agents apart, and records them as a run of gradlab's.

    For IPPO, MAPPO and IDDPG with MLPs, GRUs (PPO's alone) and HyperMARL, whatever is shared. On
    policy it diagnoses all of what was collected, before the update, with the advantages that the
    algorithm will use; off policy the first minibatch of an iteration, after the step that was
    taken with it. Nothing about the training changes.

    The run is `gradlab` in the experiment's folder, or `out`; where several groups have two agents
    or more, each has a run of its name in it. It also records each iteration's mean return of the
    episodes that ended, of agents and episodes, as BenchMARL prints it.
    """

    def __init__(
        self, *, every: int = 10, out: str | Path | None = None, level: Level = "full"
    ) -> None:
        """Choose what to record.

        Args:
            every: Diagnose every so many iterations of the experiment.
            out: The run folder, or that of the groups' runs.
            level: "light" or "full", see docs/runs.md.
        """
        super().__init__()
        self._every, self._out, self._level = every, out, level
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """BenchMARL pickles its callbacks, to set the experiment up again from a file."""
        kept = ("_every", "_out", "_level")
        return {name: value for name, value in self.__dict__.items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.experiment: Any = None
        self._forget()

    def _forget(self) -> None:
        self._probes: dict[str, LossProbe] = {}
        self._waiting: dict[str, dict[str, float]] = {}

    def on_setup(self) -> None:
        """Open the runs.

        Raises:
            UsageError: If the experiment can't be diagnosed, or a folder can't be used.
        """
        self._forget()
        experiment = self.experiment
        if experiment.config.off_policy_use_prioritized_replay_buffer and not experiment.on_policy:
            raise UsageError(
                "a replay buffer must draw all samples alike, or their gradients have weights. Got "
                "off_policy_use_prioritized_replay_buffer=True; set it to False."
            )
        groups = {
            name: agents for name, agents in experiment.train_group_map.items() if len(agents) > 1
        }
        for group in experiment.train_group_map.keys() - groups.keys():
            warnings.warn(
                f"gradlab: group {group!r} has one agent, so nothing interferes there; left out.",
                stacklevel=2,
            )
        rule = "have a group of two agents or more"
        check(len(groups) > 0, "experiment", rule, dict(experiment.train_group_map))
        base = Path(experiment.folder_name, "gradlab") if self._out is None else Path(self._out)
        restored = experiment.config.restore_file is not None
        for group, agents in groups.items():
            out = base / group if len(groups) > 1 else base
            if is_run(out) and not restored:
                raise UsageError(
                    f"{out} already holds a run; nothing was overwritten. Give the callback "
                    "another `out`, or restore the experiment that wrote it."
                )
            self._probes[group] = LossProbe(
                experiment.losses[group],
                agents=list(agents),
                every=self._every,
                out=out,
                level=self._level,
                method=self._method(group),
                environment=f"{experiment.environment_name}/{experiment.task_name}",
                config=self._described(group),
                recurrent=experiment.algorithm.has_rnn,
                resume=restored,
            )
        self._run, experiment.run = experiment.run, self._run_and_close

    def on_load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002
        """Go on where the experiment goes on."""
        for probe in self._probes.values():
            probe.probe.rewind(self.experiment.n_iters_performed)

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        """Diagnose on policy; see the class."""
        experiment = self.experiment
        for group, probe in self._probes.items():
            scalars = _returns(batch, group)
            if not probe.due:
                probe(batch, scalars=scalars)
            elif experiment.on_policy:
                with undisturbed(set()):
                    of_group = batch.exclude(*experiment._get_excluded_keys(group)).detach()
                    # A copy of the containers: what is added must not stand in the batch itself.
                    of_group = of_group.to(experiment.config.train_device).clone(False)
                    ready = experiment.algorithm.process_batch(group, of_group)
                probe(ready, scalars=scalars)
            else:
                self._waiting[group] = scalars

    def on_train_step(self, batch: TensorDictBase, group: str) -> None:
        """Diagnose off policy; see the class."""
        if group in self._waiting:
            # Drawn one by one from all that the buffer holds: a sample is a cluster of its own.
            drawn = torch.arange(len(batch))
            self._probes[group](batch, copy=drawn, scalars=self._waiting.pop(group))

    def _run_and_close(self) -> None:
        try:
            self._run()
        except BaseException as error:
            for probe in self._probes.values():
                probe.close(error)
            raise
        for probe in self._probes.values():
            probe.close()

    def _method(self, group: str) -> str | None:
        actor = self.experiment.losses[group].actor_network
        made = any(isinstance(part, HyperMarl) for part in actor.modules())
        return "hypermarl" if made else None

    def _described(self, group: str) -> dict[str, object]:
        experiment = self.experiment
        config = experiment.config
        return {
            "benchmarl": benchmarl.__version__,
            "algorithm": experiment.algorithm_name,
            "algorithm_config": _plain(experiment.algorithm_config.__dict__),
            "model": experiment.model_name,
            "model_config": _plain(experiment.model_config.__dict__),
            "critic_model": experiment.critic_model_name,
            "critic_model_config": _plain(experiment.critic_model_config.__dict__),
            "task_config": _plain(experiment.task.config or {}),
            "experiment_config": _plain(config.__dict__),
            "group": group,
            "seed": experiment.seed,
        }


def _plain(settings: dict[str, Any]) -> dict[str, object]:
    """Settings as JSON can hold them."""
    plain = (str, int, float, bool, type(None))
    return {
        name: value if isinstance(value, plain) else getattr(value, "__name__", str(value))
        for name, value in settings.items()
        if not name.startswith("_")
    }


def _returns(batch: TensorDictBase, group: str) -> dict[str, float]:
    """The mean return of the episodes that ended in a batch; nothing if none did."""
    ended = batch.get(("next", "done"), None)
    of_agents = batch.get(("next", group, "episode_reward"), None)
    if ended is None:
        ended = batch.get(("next", group, "done")).any(-2)
    returns = batch.get(("next", "episode_reward")) if of_agents is None else of_agents.mean(-2)
    found = returns[ended.expand_as(returns)]
    return {"episode_return": found.mean().item()} if found.numel() else {}


@pieces.register
def _(module: SequenceModel) -> Iterator[Piece]:
    yield from pieces(module.models)


@pieces.register
def _(module: Mlp) -> Iterator[Piece]:
    check(module.num_feature_dims == 1, "a model", "read vectors", module.num_feature_dims)
    axis, make = _networks(module.mlp, module.share_params)
    yield Piece(
        name="mlp",
        reads=(Read(tuple(module.in_keys), axis),),
        writes=(name_of(module.out_key),),
        make=make,
        common=not module.output_has_agent_dim,
    )


@pieces.register
def _(module: Gru) -> Iterator[Piece]:
    check(not module.compile, "a Gru", "have compile=False", module.compile)
    keys = tuple(key for key in module.in_keys if key not in module.rnn_keys)
    if module.input_has_agent_dim:
        axis: Axis = "all" if module.centralised else "own"
        of = module.gru
        gru = stacked(of._empty_gru, lambda: of.params, shared=of.share_params)
    else:
        axis, gru = _networks(module.gru, module.share_params)
    of_memories, mlp = _networks(module.mlp, module.share_params)

    def make(agent: int, views: Views) -> nn.Module:
        # Centralised critics of each agent's own read the memories of all of them.
        whose = range(module.n_agents) if of_memories == "all" else (agent,)
        return _Recurrent([gru(other, views) for other in whose], mlp(agent, views))

    yield Piece(
        name="gru",
        reads=(Read(keys, axis), Read(("is_init",), "common")),
        writes=(name_of(module.out_key),),
        make=make,
        common=not module.output_has_agent_dim,
    )


class _Recurrent(nn.Module):
    """GRUs over a stretch of time from an empty memory, and the layers that read theirs."""

    def __init__(self, memories: Sequence[nn.Module], mlp: nn.Module) -> None:
        super().__init__()
        self.memories, self.mlp = nn.ModuleList(memories), mlp

    def forward(self, read: Tensor, starts: Tensor) -> Tensor:
        states = []
        for memory in self.memories:
            layers, size = int(memory.n_layers), int(memory.hidden_size)  # type: ignore[arg-type]
            empty = torch.zeros(layers, size, dtype=read.dtype, device=read.device)
            states.append(memory(read, starts, empty)[0])
        found: Tensor = self.mlp(torch.cat(states, dim=-1))
        return found


def _networks(module: nn.Module, shared: bool) -> tuple[Axis, Maker]:
    """What BenchMARL's models hold: a multi-agent network, or a list of those that read a state."""
    if not isinstance(module, nn.ModuleList):
        return maker_of(module)
    if not len(module):
        raise refusal(module)
    return "common", lambda agent, views: module[0 if shared else agent]  # noqa: ARG005
