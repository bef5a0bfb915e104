"""Diagnosing networks while somebody else's loop trains them."""

import functools
import importlib.metadata
import inspect
import itertools
import platform
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.func import functional_call

from gradlab.attach.samples import by_agent
from gradlab.attach.sharing import Generate, Sharing, copied, networks_of, sharing_of
from gradlab.checks import UsageError, check
from gradlab.engine.part import Part, batch_axes, in_precision
from gradlab.engine.rewrites import Rewrites
from gradlab.engine.surrogate import Surrogate, Theta, checked_loss
from gradlab.parameters import WHOLE
from gradlab.probe import LEVELS, Level, Network, NetworkProbe
from gradlab.quantity import Quantity, dataset
from gradlab.run import open_run
from gradlab.run_writer import RunWriter, is_run

Loss = Callable[..., Tensor]
"""A per-sample loss: the agent's policy (or its generated parameters) and one sample in."""

Batch = Mapping[str, Tensor]

P = ParamSpec("P")
R = TypeVar("R")

_CONSTANT = "constant/"
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


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
        policy: nn.Module,
        loss: Loss,
        *,
        agents: int | Sequence[str] | None = None,
        every: int = 10,
        out: str | Path | None = None,
        level: Level = "full",
        network: str = "actor",
        generate: Generate | None = None,
        target: nn.Module | None = None,
        environment: str = "own loop",
        config: Mapping[str, object] | None = None,
        resume: bool = False,
    ) -> None:
        """Attach to a policy.

        Args:
            policy: One module for all agents (that they read their IDs or not is all the same); an
                `nn.ModuleList` or `nn.ModuleDict` with a module for each, which may have parts in
                common; or a module with a method `generate(agent)`, which returns the parameters of
                agent 0, 1, ... by name.
            loss: Loss of one agent's single sample, that is minimised: called as
                `loss(policy, sample)` with a module that stands for the agent's policy, and the
                sample (without agent and sample axes). Where parameters are generated and there is
                no `target` it gets these by name in place of a module. Must work under
                `torch.func.vmap`.
            agents: Number of agents, or their names; not needed for a list or dictionary.
            every: Diagnose every so many calls.
            out: The run folder; by default a new one in runs/.
            level: "light" or "full", see docs/runs.md.
            network: What the network is called in the run: "actor" or "critic".
            generate: Makes the parameters of some agents at once: called with `policy` and agent
                numbers (int64, [agent]) it returns tensors [agent, ...] by name, or [1, ...] where
                all share one.
            target: The module that generated parameters are for.
            environment: What the run is to say of the environment.
            config: What else it is to say of the training; what JSON can hold.
            resume: Go on with the run in `out`, after its last update.

        Raises:
            UsageError: If something is not as it must be, or the folder can't be used.
        """
        _check_policy(policy)
        check(callable(loss), "loss", "be a function of a policy and one sample", loss)
        check(every >= 1, "every", "be at least 1", every)
        check(level in LEVELS and level != "off", "level", 'be "light" or "full"', level)
        check(network in ("actor", "critic"), "network", 'be "actor" or "critic"', network)
        names = _agent_names(policy, agents)
        self._agents, self._every, self._network = len(names), every, network
        self._policy = policy
        with _undisturbed(policy):
            self._sharing: Sharing = sharing_of(policy, self._agents, generate, target)
            form = target
            if form is None and self._sharing.kind != "generated":
                form = networks_of(policy, self._agents)[0]
            self._loss: Surrogate = (
                loss if form is None else _of_theta(loss, copied(form), self._sharing)
            )
            if form is target and target is not None:
                _check_target(self._sharing, target)
        of_network = Network(generator=self._sharing, surrogate=self._loss)
        self._probe = NetworkProbe({network: of_network}, level)
        self.findings: list[str] = []
        self._told: set[str] = set()
        self._tried = False
        folder = _new_folder() if out is None else Path(out)
        self.update = _updates_of(folder) if resume and is_run(folder) else 0
        self._writer = _opened(folder, resume=resume)
        self.path = folder
        self._config: dict[str, object] = {
            **(config or {}),
            "every": every,
            "diagnostics": level,
            "frozen": self._sharing.frozen,
        }
        self._writer.describe(
            method=self._sharing.kind,
            environment=environment,
            agents=self._agents,
            agent_names=list(names),
            attached=True,
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "gradlab": importlib.metadata.version("gradlab"),
            },
            config=self._config,
            state="running",
        )
        self._finish = weakref.finalize(self, _finished, self._writer)
        for sentence in self._sharing.frozen:
            self._tell(f"not trained, and so left out: {sentence}.")

    @property
    def due(self) -> bool:
        """Whether the next call diagnoses what it is given."""
        return self.update % self._every == 0

    def __call__(
        self,
        batch: Batch | Callable[[], Batch],
        *,
        agent: Int[Tensor, " _"] | None = None,
        copy: Int[Tensor, " _"] | None = None,
        mask: Bool[Tensor, "agent sample"] | None = None,
        scalars: Mapping[str, float | int] | None = None,
    ) -> xr.Dataset | None:
        """Diagnose what the loop is about to train on, if it is due.

        Args:
            batch: Tensors [agent, sample, ...] by name, what `loss` reads; or, with `agent`,
                [sample, ...]; or a function that makes them, called only when it is due.
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
            with _undisturbed(self._policy), _in_their_words():
                given = batch() if callable(batch) else batch
                _check_batch(given, next(self._sharing.parameters()).device)
                found = self._diagnose(given, agent, copy, mask)
        recorded = {name: Quantity.scalar(float(v)) for name, v in (scalars or {}).items()}
        if found or recorded:
            self._writer.write(self.update, found | recorded)
        self.update += 1
        return dataset(found) if found else None

    def _diagnose(
        self,
        batch: Batch,
        agent: Tensor | None,
        copy: Tensor | None,
        mask: Tensor | None,
    ) -> dict[str, Quantity]:
        batch = {name: tensor.detach() for name, tensor in batch.items()}
        if agent is not None:
            check(mask is None, "mask", "be left out where `agent` is given", "a mask")
            batch, mask, copy = by_agent(batch, agent, self._agents, copy)
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        if any(shape[:1] != (self._agents,) for shape in shapes.values()):
            raise UsageError(
                f"`batch` must tell its {self._agents} agents apart. Got {shapes}; hand in tensors "
                "[agent, sample, ...], or [sample, ...] with each sample's agent: "
                "probe(batch, agent=numbers)."
            )
        _, samples = batch_axes(batch)
        self._sharing.refresh()
        context = {_CONSTANT + name: tensor for name, tensor in self._sharing.own.items()}
        if not self._tried:
            _try(self._loss, self._sharing, Part(batch=batch, context=context, mask=mask))
        found = self._probe.diagnose(
            {self._network: batch}, copy, mask, context={self._network: context}
        )
        self.findings = list(self._probe.findings)
        if not self._tried:
            self.findings += _alike(found, batch, self._network)
            self._config["copies"] = 0 if copy is None else len(copy.unique())
            self._config["diagnosed_samples"] = samples
            self._writer.describe(engines=self._probe.engines, config=self._config)
            self._tried = True
        for sentence in self.findings:
            self._tell(sentence)
        return found

    def watch(
        self,
        function: Callable[P, R] | None = None,
        *,
        batch: Callable[P, Batch] | None = None,
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
            def made() -> Batch:
                if batch is not None:
                    return batch(*args, **kwargs)
                given: Batch = inspect.signature(function).bind(*args, **kwargs).arguments[taken]
                return given

            extra = {n: of(*args, **kwargs) for n, of in settings.items()} if self.due else {}
            self(made, **extra)  # type: ignore[arg-type]
            return function(*args, **kwargs)

        return watched

    def close(self) -> None:
        """Mark the run as done; nothing more is recorded."""
        if self._finish.detach():
            _close(self._writer, "done")

    def __enter__(self) -> "Probe":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            if self._finish.detach():
                _close(self._writer, "stopped")
        elif error is None:
            self.close()
        elif self._finish.detach():
            self._writer.__exit__(kind, error, traceback)

    def _tell(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            warnings.warn(f"gradlab: {sentence}", stacklevel=4)


class _Called(nn.Module):
    """A loss as a module that holds the policy, whose parameters can then be others for a call."""

    def __init__(self, policy: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.policy = policy
        self.loss = loss

    def forward(self, sample: dict[str, Tensor]) -> Tensor:
        return self.loss(self.policy, sample)


def _of_theta(loss: Loss, policy: nn.Module, sharing: Sharing) -> Surrogate:
    """The loss as the engine calls it: of an agent's parameters by name."""
    called = _Called(policy, loss)

    def surrogate(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        dtype = next(iter(theta.values())).dtype
        own = {name: sample.pop(name) for name in list(sample) if name.startswith(_CONSTANT)}
        tensors = in_precision(sharing.shared, dtype)
        tensors |= {name.removeprefix(_CONSTANT): tensor for name, tensor in own.items()} | theta
        named = {f"policy.{name}": tensor for name, tensor in tensors.items()}
        found: Tensor = functional_call(called, named, (sample,))
        return found

    return surrogate


def _check_policy(policy: object) -> None:
    check(isinstance(policy, nn.Module), "policy", "be an nn.Module", type(policy).__name__)
    assert isinstance(policy, nn.Module)
    for name, module in policy.named_modules():
        kind = type(module).__name__
        where = f"`policy.{name}`" if name else "`policy`"
        inner = "_orig_mod" if hasattr(module, "_orig_mod") else "module"
        if hasattr(module, "_orig_mod") or kind in _WRAPPERS:
            raise UsageError(
                f"{where} must be the module itself, as gradients are taken sample by sample. Got "
                f"{kind} around it; pass what it wraps, `.{inner}`, whose parameters are the same."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{where} must be a module in Python, as gradients are taken sample by sample. Got "
                f"{kind}; pass the module that it was made from."
            )
        if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters(recurse=False)):
            raise UsageError(
                f"{where} must know its parameters' shapes. Got {kind}, which has yet to see a "
                "batch; call the policy once before a probe is attached."
            )


def _agent_names(policy: nn.Module, agents: int | Sequence[str] | None) -> list[str]:
    """The agents' names."""
    own: list[str] | None = None
    if isinstance(policy, nn.ModuleDict):
        own = list(policy)
    elif isinstance(policy, nn.ModuleList):
        own = [f"agent {number}" for number in range(len(policy))]
    if agents is None:
        if own is None:
            raise UsageError(
                f"`agents` must be given, as {type(policy).__name__} does not tell them apart. "
                "Pass their number or names; and batches [agent, sample, ...], or each sample's: "
                "probe(batch, agent=numbers)."
            )
        agents = own
    if isinstance(agents, int):
        agents = own if own and len(own) == agents else [f"agent {i}" for i in range(agents)]
    names = [str(name) for name in agents]
    check(len(names) >= 2, "agents", "be at least 2, or there is no interference", len(names))
    if own is not None and len(own) != len(names):
        check(False, "agents", f"be {len(own)}, as `policy` has modules", len(names))
    return names


def _check_target(sharing: Sharing, target: nn.Module) -> None:
    with torch.no_grad():
        theta = sharing(torch.zeros(1, dtype=torch.long, device=next(sharing.parameters()).device))
    known = dict(target.named_parameters())
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in theta.items()}
    if wrong := [n for n, s in shapes.items() if n not in known or tuple(known[n].shape) != s]:
        has = {name: tuple(p.shape) for name, p in known.items()}
        raise UsageError(
            f"`target` must have what is generated. Got {wrong[0]!r} of shape "
            f"{shapes[wrong[0]]}, where it has {has}."
        )


def _check_batch(batch: object, device: torch.device) -> None:
    if not isinstance(batch, Mapping):
        check(False, "batch", "hold tensors by name", type(batch).__name__)
    assert isinstance(batch, Mapping)
    for name, tensor in batch.items():
        where = f"batch[{name!r}]"
        check(isinstance(tensor, Tensor), where, "be a tensor", type(tensor).__name__)
        if tensor.device != device:
            raise UsageError(
                f"`{where}` must be where the policy is, on {device}. Got it on {tensor.device}; "
                f"move it: .to({str(device)!r})."
            )


def _try(loss: Surrogate, sharing: Sharing, part: Part) -> None:
    """Call the loss once as plain PyTorch would, to say in its user's words what is wrong."""
    where = (0, 0)
    if part.mask is not None and part.mask.any():
        where = tuple(part.mask.nonzero()[0].tolist())
    agent = torch.tensor([where[0]], device=part.device)
    sample = {name: tensor[where] for name, tensor in part.batch.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in sample.items()}
    sample |= {name: tensor[where[0]] for name, tensor in part.context.items()}
    with torch.enable_grad():
        theta = {name: t[0].detach().requires_grad_() for name, t in sharing(agent).items()}
        try:
            value = checked_loss(loss, theta, dict(sample), Rewrites())
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                "`loss` must take one agent's single sample, without agent and sample axes: "
                f"{shapes}. It raised {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        found: Sequence[Tensor | None] = [None]
        if value.requires_grad:
            found = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
    if all(gradient is None for gradient in found):
        raise UsageError(
            "`loss` must use the policy that it is called with. Got a loss that does not depend on "
            "its first argument; another module, of an enclosing scope, stands for one agent only."
        )
    finite = all(t.isfinite().all() for t in [*sample.values(), *theta.values()])
    if finite and not value.isfinite():
        raise UsageError(
            f"`loss` must be finite for a finite sample. Got {value.item()} for the first one; "
            "does it reduce over the batch, as by a standard deviation? Do that beforehand."
        )


def _alike(found: Mapping[str, Quantity], batch: Batch, network: str) -> list[str]:
    """Say which agents' samples all have one gradient, though they are not the same sample."""
    if "variance_agent" not in found:
        return []
    place = {"network": network, "layer": WHOLE}
    of_all = dataset({name: found[name] for name in ("variance_agent", "norm")}).sel(place)
    varies = any((tensor != tensor[:, :1]).any() for tensor in batch.values())
    longest = float((of_all["norm"].sel(space="theta") ** 2).max())
    rounding = 1e-5 * longest  # of sums in float32; what differs at all differs by more
    if not varies or not (of_all["variance_agent"] <= rounding).all():
        return []
    return [
        "all samples of an agent have the same gradient, though they differ: does `loss` reduce "
        "over the batch? It is to be the loss of the one sample that it is given."
    ]


def _updates_of(folder: Path) -> int:
    """The number that follows the last update of a run."""
    run = open_run(folder)
    return 1 + max(
        itertools.chain.from_iterable(run.updates(name) for name in run.quantities), default=-1
    )


def _new_folder() -> Path:
    return next(
        folder for i in itertools.count() if not (folder := Path("runs", f"probe-{i}")).exists()
    )


def _opened(folder: Path, *, resume: bool) -> RunWriter:
    try:
        return RunWriter(folder, resume=resume)
    except UsageError as error:
        said = str(error).replace("another --out", "another `out`")
        raise UsageError(said.replace("add --resume", "pass resume=True")) from None


def _close(writer: RunWriter, state: str) -> None:
    writer.describe(state=state)
    writer.__exit__(None, None, None)


def _finished(writer: RunWriter) -> None:
    """A loop that ends, or a probe that nobody holds any more."""
    error = getattr(sys, "last_value", None)
    if isinstance(error, BaseException):
        writer.describe(state="failed", error=f"{type(error).__name__}: {error}")
        writer.__exit__(None, None, None)
    else:
        _close(writer, "done")


@contextmanager
def _undisturbed(policy: nn.Module) -> Iterator[None]:
    """Leave random states as they were, whatever user code draws."""
    devices = {p.device for p in policy.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(device.index or 0 for device in devices)):
        yield


@contextmanager
def _in_their_words() -> Iterator[None]:
    """Call things as the user handed them in."""
    try:
        yield
    except UsageError as error:
        said = str(error).replace("`surrogate`", "`loss`").replace("`generator`", "`policy`")
        raise UsageError(said) from error
