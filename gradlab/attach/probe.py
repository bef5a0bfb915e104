"""Diagnosing networks while somebody else's loop trains them."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gradlab.attach.folder import close, fail, finish, new_folder, next_update, opened
from gradlab.attach.network import (
    AttachedNetwork,
    Batch,
    Loss,
    agent_names,
    alike,
    check_policy,
    in_their_words,
    undisturbed,
)
from gradlab.attach.samples import by_agent, check_agents, check_samples
from gradlab.attach.sharing import Generate
from gradlab.checks import check
from gradlab.engine.part import batch_axes
from gradlab.probe import LEVELS, Level, NetworkProbe
from gradlab.quantity import Quantity, dataset
from gradlab.run_writer import NotWritten
from gradlab.sinks.known import make_sinks
from gradlab.sinks.sink import Sink

Given = Batch | Mapping[str, Batch]
"""A batch; of several networks, one for each."""

P = ParamSpec("P")
R = TypeVar("R")

NETWORKS = ("actor", "critic")


class Probe:
    """Takes a policy's gradients apart while somebody else's loop trains it.

    The loop stays as it is, to the bit: the probe works on copies and touches no parameter,
    `.grad`, buffer, mode or random state. What it finds goes into a run folder like any other.
    Close it when the training is done, or use it as a context manager.

    Attributes:
        path: The run folder.
        update: Number of the next call, from 0.
        findings: What is wrong with what the last diagnosis saw, a sentence each; the first time
            also a warning.
    """

    def __init__(
        self,
        policy: nn.Module | Mapping[str, nn.Module],
        loss: Loss | Mapping[str, Loss],
        *,
        agents: int | Sequence[str] | None = None,
        every: int = 10,
        out: str | Path | None = None,
        level: Level = "full",
        network: str = "actor",
        generate: Generate | Mapping[str, Generate] | None = None,
        target: nn.Module | Mapping[str, nn.Module] | None = None,
        method: str | None = None,
        environment: str = "own loop",
        config: Mapping[str, object] | None = None,
        resume: bool = False,
        sinks: Sequence[str | Sink] = (),
    ) -> None:
        """Attach to a policy, or to several networks: `{"actor": ..., "critic": ...}`.

        Args:
            policy: One module for all agents (that they read their IDs or not is all the same); an
                `nn.ModuleList` or `nn.ModuleDict` with a module for each, which may have parts in
                common; or a module with a method `generate(agent)`, which returns the parameters of
                agent 0, 1, ... by name. Of several networks a dictionary by their names in the run,
                "actor" and "critic"; then `loss`, `generate`, `target` and the batches are, too.
            loss: Loss of one agent's single sample, that is minimised: called as
                `loss(policy, sample)` with a module that stands for the agent's policy, and the
                sample (without agent and sample axes). Where parameters are generated and there is
                no `target` it gets these by name in place of a module. Must work under
                `torch.func.vmap`.
            agents: Number of agents, or their names; not needed for a list or dictionary.
            every: Diagnose every so many calls.
            out: The run folder; by default a new one in runs/.
            level: "light" or "full", see docs/runs.md.
            network: What a single network is called in the run: "actor" or "critic".
            generate: Makes the parameters of some agents at once: called with `policy` and agent
                numbers (int64, [agent]) it returns tensors [agent, ...] by name, or [1, ...] where
                all share one.
            target: The module that generated parameters are for.
            method: What the run is to call the way in which agents share parameters; by default
                "fups", "nops", "partly-shared" or "generated", as it is found.
            environment: What the run is to say of the environment.
            config: What else it is to say of the training; what JSON can hold.
            resume: Go on with the run in `out`, after its last update.
            sinks: Where else its records are to go: "tensorboard", "wandb", "mlflow", or objects
                that obey `gradlab.Sink`.

        Raises:
            UsageError: If something is not as it must be, or the folder can't be used.
        """
        check(every >= 1, "every", "be at least 1", every)
        check(level in LEVELS and level != "off", "level", 'be "light" or "full"', level)
        made = make_sinks(sinks)
        self._several = isinstance(policy, Mapping)
        if not self._several:
            check(network in NETWORKS, "network", 'be "actor" or "critic"', network)
        policies = dict(policy) if isinstance(policy, Mapping) else {network: policy}
        check(
            len(policies) > 0 and set(policies) <= set(NETWORKS),
            "policy",
            "be a network or a dictionary of networks named actor, critic",
            list(policies),
        )
        losses = self._of_each("loss", loss, policies)
        makers = {} if generate is None else self._of_each("generate", generate, policies)
        targets = {} if target is None else self._of_each("target", target, policies)
        self._every = every
        names: list[str] | None = None
        self._networks: dict[str, AttachedNetwork] = {}
        for name, module in policies.items():
            with in_their_words(name if self._several else None):
                check_policy(module)
                rule = "be a function of a policy and one sample"
                check(callable(losses[name]), "loss", rule, losses[name])
                found = agent_names(module, agents if agents is not None else names)
                names = names or found
                with undisturbed(_devices(module)):
                    self._networks[name] = AttachedNetwork(
                        module, losses[name], len(names), makers.get(name), targets.get(name)
                    )
        assert names is not None
        self._agents = len(names)
        networks = {name: attached.network for name, attached in self._networks.items()}
        self._probe = NetworkProbe(networks, level)
        self.findings: list[str] = []
        self._told: set[str] = set()
        self._tried = False
        folder = new_folder() if out is None else Path(out)
        self.update = next_update(folder) if resume else 0
        self._writer = opened(folder, resume=resume)
        self.path = folder
        frozen = [
            self._of(name, what)
            for name, of in self._networks.items()
            for what in of.sharing.frozen
        ]
        self._config: dict[str, object] = {
            **(config or {}),
            "every": every,
            "diagnostics": level,
            "frozen": frozen,
        }
        kinds = {name: method or of.sharing.kind for name, of in self._networks.items()}
        self._writer.describe(
            method=next(iter(kinds.values())),
            methods=kinds,
            environment=environment,
            agents=self._agents,
            agent_names=names,
            attached=True,
            config=self._config,
            state="running",
        )
        self._writer.forward(made, self.update, _warn)
        self._finish = weakref.finalize(self, finish, self._writer)
        for sentence in self._writer.notes:
            self._tell(sentence)
        for sentence in frozen:
            self._tell(f"not trained, and so left out: {sentence}.")

    @property
    def due(self) -> bool:
        """Whether the next call diagnoses what it is given."""
        return self.update % self._every == 0

    def __call__(
        self,
        batch: Given | Callable[[], Given],
        *,
        agent: Int[Tensor, " _"] | None = None,
        copy: Int[Tensor, " _"] | None = None,
        mask: Bool[Tensor, "agent sample"] | None = None,
        scalars: Mapping[str, float | int] | None = None,
    ) -> xr.Dataset | None:
        """Diagnose what the loop is about to train on, if it is due.

        Args:
            batch: Tensors [agent, sample, ...] by name, what `loss` reads; or, with `agent`,
                [sample, ...]; of several networks a dictionary of these by network, of the same
                samples; or a function that makes them, called only when it is due.
            agent: Whose sample each is, where samples of all agents stand in one row.
            copy: The environment copy that each sample comes from; without it nothing is debiased
                and there are no verdicts.
            mask: Which samples exist; all by default.
            scalars: Numbers to record with it, due or not, e.g. {"episode_return": 3.2}.

        Returns:
            What was found, labelled, or None if it was not due.

        Raises:
            UsageError: If something is not as it must be, with how to mend it.
        """
        check(self._finish.alive, "probe", "be open; attach another", "closed")
        found: dict[str, Quantity] = {}
        if self.due:
            devices = {attached.device for attached in self._networks.values()}
            with undisturbed(devices), in_their_words():
                given = batch() if callable(batch) else batch
                batches = self._batches(given)
                found = self._diagnose(batches, agent, copy, mask)
        recorded = {name: Quantity.scalar(float(v)) for name, v in (scalars or {}).items()}
        if found or recorded:
            with self._lost_but_said():
                self._writer.write(self.update, found | recorded)
        self.update += 1
        return self._labelled(found) if found else None

    def _labelled(self, found: Mapping[str, Quantity]) -> xr.Dataset:
        """As one dataset, in which each of several networks has an axis of features of its own."""
        if not self._several:
            return dataset(found)
        own = dict(found)
        for network in self._networks:
            if (rows := found.get(f"embedding_{network}")) is not None:
                axis = f"feature_{network}"
                coords = {"agent": rows.coords["agent"], axis: rows.coords["feature"]}
                own[f"embedding_{network}"] = replace(rows, dims=("agent", axis), coords=coords)
        return dataset(own)

    def _of_each(self, name: str, given: Any, networks: Collection[str]) -> dict[str, Any]:  # noqa: ANN401
        """An argument, or part of a batch, by network; of some alone if it is one of a few."""
        if not self._several:
            return dict.fromkeys(networks, given)
        whole = name in {"loss", "batch"}
        of = set(given) if isinstance(given, Mapping) else None
        if of is None or not of <= set(networks) or (whole and of != set(networks)):
            got = type(given).__name__ if of is None else sorted(map(str, of))
            check(False, name, f"be a dictionary by network, of {', '.join(networks)}", got)
        return dict(given)

    def _batches(self, given: object) -> dict[str, Batch]:
        """The batch of each network, of tensors that can be looked at."""
        batches = self._of_each("batch", given, self._networks)
        for name, attached in self._networks.items():
            check_samples(batches[name], attached.device, self._named(name))
        return {name: batches[name] for name in self._networks}

    def _diagnose(
        self,
        batches: Mapping[str, Batch],
        agent: Tensor | None,
        copy: Tensor | None,
        mask: Tensor | None,
    ) -> dict[str, Quantity]:
        batches = {
            network: {name: tensor.detach() for name, tensor in batch.items()}
            for network, batch in batches.items()
        }
        if agent is not None:
            check(mask is None, "mask", "be left out where `agent` is given", "a mask")
            row = copy
            for network, batch in batches.items():
                batches[network], mask, copy = by_agent(batch, agent, self._agents, row)
        for network, batch in batches.items():
            check_agents(batch, self._agents, self._named(network))
        samples = {network: batch_axes(batch)[1] for network, batch in batches.items()}
        rule = "hold the same samples of every network"
        check(len(set(samples.values())) == 1, "batch", rule, samples)
        context = {name: attached.refreshed() for name, attached in self._networks.items()}
        for name, attached in self._networks.items():
            with in_their_words(name if self._several else None):
                if not self._tried:
                    attached.attempt(batches[name], context[name], mask)
                attached.check_repeats(batches[name], context[name], mask)
        found = self._probe.diagnose(batches, copy, mask, context=context)
        self.findings = list(self._probe.findings)
        if not self._tried:
            for name, batch in batches.items():
                self.findings += [self._of(name, said) for said in alike(found, batch, name)]
            self._config["copies"] = 0 if copy is None else len(copy.unique())
            self._config["diagnosed_samples"] = next(iter(samples.values()))
            with self._lost_but_said():
                self._writer.describe(engines=self._probe.engines, config=self._config)
            self._tried = True
        for sentence in self.findings:
            self._tell(sentence)
        return found

    def watch(
        self,
        function: Callable[P, R] | None = None,
        *,
        batch: Callable[P, Given] | None = None,
        **settings: Callable[P, Tensor],
    ) -> Callable[P, R] | Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate the function that updates the policy: what it is called with is diagnosed first.

        Args:
            function: The function.
            batch: Makes the batch of what it is called with; by default the argument called
                `batch`, or the first one if none is.
            **settings: In the same way what else a call of the probe takes, e.g. `copy`.

        Returns:
            The function, which does and returns what it did.

        Raises:
            UsageError: If it has nothing to be diagnosed.
        """
        if function is None:
            return lambda function: self.watch(function, batch=batch, **settings)  # type: ignore[return-value]
        names = list(inspect.signature(function).parameters)
        check(bool(names), "function", "take a batch", f"{function} without arguments")
        taken = "batch" if "batch" in names else names[0]

        @functools.wraps(function)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            def made() -> Given:
                if batch is not None:
                    return batch(*args, **kwargs)
                given: Given = inspect.signature(function).bind(*args, **kwargs).arguments[taken]
                return given

            extra = {n: of(*args, **kwargs) for n, of in settings.items()} if self.due else {}
            self(made, **extra)  # type: ignore[arg-type]
            return function(*args, **kwargs)

        return watched

    def rewind(self, update: int) -> None:
        """Go on at another update, as a training does that goes back to a checkpoint.

        Args:
            update: Number of the next call; what was recorded of it and of later ones is dropped.
        """
        check(update >= 0, "update", "be at least 0", update)
        self._writer.discard_after(update - 1)
        self.update = update

    def close(self, error: BaseException | None = None) -> None:
        """Mark the run as done; nothing more is recorded.

        Args:
            error: What the training ended with, if with one: the run is marked as stopped if it
                was interrupted by hand, otherwise as failed.
        """
        if not self._finish.detach():
            return
        if error is None:
            close(self._writer, "done")
        elif isinstance(error, KeyboardInterrupt):
            close(self._writer, "stopped")
        else:
            fail(self._writer, error)

    def __enter__(self) -> "Probe":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)

    def _named(self, network: str) -> str:
        """What the batch of a network is called by who handed it in."""
        return f"batch[{network!r}]" if self._several else "batch"

    def _of(self, network: str, said: str) -> str:
        """A sentence or clause about one of the networks."""
        return f"{network}, {said}" if self._several else said

    @contextmanager
    def _lost_but_said(self) -> Iterator[None]:
        """Let the loop go on though the disk refuses what is written."""
        try:
            yield
        except NotWritten as error:
            self._tell(f"{str(error).partition(' (')[0]}: what was to be recorded is lost.")

    def _tell(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            _warn(sentence)


def _devices(module: nn.Module) -> set[torch.device]:
    return {p.device for p in module.parameters()}


def _warn(sentence: str) -> None:
    warnings.warn(f"gradlab: {sentence}", stacklevel=5)
