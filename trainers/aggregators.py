"""Aggregators of the agents' gradients, of the library torchjd: what stands in place of their sum.

The rows that they are given add up to the plain gradient. What combines rows as a mean does is
multiplied by the number of agents, so that it is the plain gradient where there is nothing to
remove. See docs/aggregation.md.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import JsonValue
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.checks import UsageError, check, unknown_name
from gradlab.extras import require
from gradlab.registry import Registry
from trainers.config import NONE

EXTRA = "aggregate"

_VECTORS = {"pref_vector", "leak"}
"""Arguments that torchjd takes as tensors: here a list, a number for each agent."""

_PROJECTOR = "projector"
_FUNCTIONS = {"f"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of torchjd's aggregators.

    Attributes:
        name: Its class in `torchjd.aggregation`.
        mean: Whether it combines rows as a mean does, not as a sum or to a length of its own.
        modules: Packages that it needs beside torchjd.
        defaults: Arguments for which torchjd has no default.
        agents: The argument that takes the number of rows, if there is one.
    """

    name: str
    mean: bool = True
    modules: tuple[str, ...] = ()
    defaults: Mapping[str, JsonValue] = field(default_factory=dict)
    agents: str | None = None


_QUADPROG = ("qpsolvers", "quadprog")

AGGREGATORS: Registry[Kind] = Registry(
    "aggregator",
    {
        "mean": Kind(name="Mean"),
        "upgrad": Kind(name="UPGrad", modules=_QUADPROG),
        "dualproj": Kind(name="DualProj", modules=_QUADPROG),
        "pcgrad": Kind(name="PCGrad", mean=False),
        "gradvac": Kind(name="GradVac", mean=False),
        "graddrop": Kind(name="GradDrop", mean=False),
        # The weight of the official code's default.
        "cagrad": Kind(name="CAGrad", modules=("cvxpy", "clarabel"), defaults={"c": 0.5}),
        "mgda": Kind(name="MGDA"),
        "imtl-g": Kind(name="IMTLG"),
        "aligned-mtl": Kind(name="AlignedMTL"),
        "config": Kind(name="ConFIG", mean=False),
        "nash-mtl": Kind(name="NashMTL", mean=False, modules=("cvxpy", "ecos"), agents="n_tasks"),
        # Proportional fairness, the official code's default.
        "fairgrad": Kind(name="FairGrad", mean=False, defaults={"alpha": 1.0}),
        "excess-mtl": Kind(name="ExcessMTL"),
        "trimmed-mean": Kind(name="TrimmedMean", defaults={"trim_number": 1}),
        "krum": Kind(name="Krum", defaults={"n_byzantine": 1}),
        "random": Kind(name="Random"),
    },
)
"""What torchjd offers for rows of equal standing.

Left out are those that ask for a primary row (PCD), for two independent minibatches (MoDo,
SDMGrad), and `Constant`, the weights of which nothing chooses.
"""


class CantAggregate(Exception):
    """An aggregator made nothing of rows; the message says why."""


class Aggregator:
    """Makes one gradient of the agents'.

    Attributes:
        name: Its name in `AGGREGATORS`.
    """

    def __init__(
        self, name: str, arguments: Mapping[str, JsonValue], shape: tuple[int, int]
    ) -> None:
        """Make one that has seen nothing yet.

        Args:
            name: Its name in `AGGREGATORS`.
            arguments: Arguments to torchjd's class, by their names there.
            shape: Number of agents and of trained parameters.

        Raises:
            UsageError: If there is no such aggregator or argument, an argument or the number of
                agents does not suit it, or a package is not installed.
        """
        kind = AGGREGATORS[name]
        require(EXTRA, "torchjd", *kind.modules, needs=f"the aggregator {name} needs")
        self.name = name
        self._kind, self._shape = kind, shape
        self._arguments = self._checked(arguments)
        self._scale = float(shape[0]) if kind.mean else 1.0
        try:
            self._rows = self._ready()  # tried before anything is trained
            self._rows = self._make()
        except Exception as error:  # whatever torchjd's classes find wrong, in their words
            shown = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
            raise UsageError(
                f"`aggregate` can't be {name} with {shape[0]} agents and arguments "
                f"{shown or 'none'}: {_line(error)}. Choose other ones with --aggregate-arg."
            ) from error

    def __call__(
        self, rows: Float[Tensor, "agent psi"], random: RandomGenerator
    ) -> Float[Tensor, " psi"]:
        """Combine the agents' gradients.

        Args:
            rows: The gradients, which add up to the plain one.
            random: Source of what is drawn.

        Returns:
            One gradient, on the scale of the rows' sum.

        Raises:
            CantAggregate: If the aggregator fails, or gives something that is not finite.
        """
        try:
            found = self._scale * _apart(self._rows, rows, random)
        except Exception as error:  # each of the solvers has its own kinds
            raise CantAggregate(_line(error)) from error
        if not found.isfinite().all():
            raise CantAggregate("what it gave is not finite")
        return found

    def state(self) -> dict[str, Tensor]:
        """What it remembers of the rows that it has seen.

        Returns:
            Tensors by name; none for most aggregators.
        """
        return {
            name: torch.as_tensor(value, dtype=torch.float64 if type(value) is float else None)
            for name, value in self._memory().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was remembered.

        Args:
            state: What `state` returned, of an aggregator of the same settings.
        """
        self._rows = self._ready()
        for name in {**self._memory(), **state}:
            path, _, attribute = name.rpartition(".")
            part = self._rows.get_submodule(path)
            kept = state.get(name)  # None: nothing of the kind is remembered yet
            value = None if kept is None else _like(getattr(part, attribute), kept.clone())
            setattr(part, attribute, value)

    def _checked(self, arguments: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        """All arguments that are given to torchjd's class, by name."""
        parameters = {*inspect.signature(self._class()).parameters}
        if _PROJECTOR in parameters:  # made of arguments of its own
            from torchjd.linalg import QuadprogProjector

            parameters |= {*inspect.signature(QuadprogProjector).parameters}
        known = sorted(parameters - _FUNCTIONS - {_PROJECTOR, self._kind.agents})
        for argument in arguments:
            if argument not in known:
                raise unknown_name(f"argument of the aggregator {self.name}", argument, known)
        return {**self._kind.defaults, **arguments}

    def _class(self) -> Callable[..., nn.Module]:
        from torchjd import aggregation

        found: Callable[..., nn.Module] = getattr(aggregation, self._kind.name)
        return found

    def _make(self) -> nn.Module:
        """Make torchjd's aggregator, which has seen nothing yet."""
        from torchjd.linalg import QuadprogProjector

        make = self._class()
        own = {*inspect.signature(make).parameters}
        given: dict[str, Any] = {n: v for n, v in self._arguments.items() if n in own}
        if _PROJECTOR in own:
            others: dict[str, Any] = {n: v for n, v in self._arguments.items() if n not in own}
            given[_PROJECTOR] = QuadprogProjector(**others)
        for name in _VECTORS & given.keys():
            given[name] = torch.tensor(given[name], dtype=torch.float64)
        if self._kind.agents:
            given[self._kind.agents] = self._shape[0]
        return make(**given)

    def _ready(self) -> nn.Module:
        """The same, with everything set up that rows make it set up."""
        made = self._make()
        _apart(made, torch.eye(*self._shape, dtype=torch.float64), RandomGenerator())
        return made

    def _memory(self) -> dict[str, Any]:
        """The numbers that torchjd's stateful parts keep, by path and attribute."""
        from torchjd import Stateful

        stateful: Any = Stateful  # a mixin of modules, which its type does not say
        return {
            f"{path}.{attribute}": value
            for path, part in self._rows.named_modules()
            if isinstance(part, stateful)
            for attribute, value in _held(part)
            if isinstance(value, Tensor | np.ndarray | int | float) and not isinstance(value, bool)
        }


def _held(part: nn.Module) -> list[tuple[str, Any]]:
    return [*vars(part).items(), *part.named_buffers(recurse=False)]


def _apart(aggregator: nn.Module, rows: Tensor, random: RandomGenerator) -> Tensor:
    """Aggregate, with what torchjd draws from torch's global generator drawn from this one."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # solvers warn of what shows in what they give
        torch.set_rng_state(random.get_state())
        try:
            found: Tensor = aggregator(rows)
        finally:
            random.set_state(torch.get_rng_state())
    return found


def _like(old: object, kept: Tensor) -> Tensor | np.ndarray | int | float:
    """What was kept as a tensor, in the form that torchjd holds it in."""
    if isinstance(old, np.ndarray):
        return kept.numpy()
    return kept.item() if isinstance(old, int | float) else kept


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def make_aggregator(
    name: str, arguments: Mapping[str, JsonValue], shape: tuple[int, int]
) -> Aggregator | None:
    """Make what is configured.

    Args:
        name: A name in `AGGREGATORS`, or "none".
        arguments: As for `Aggregator`.
        shape: Number of agents and of trained parameters.

    Returns:
        The aggregator; None for the plain gradient, which is made without the agents' own.

    Raises:
        UsageError: As `Aggregator`.
    """
    if name == NONE:
        check(not arguments, "aggregate_args", "be empty without an --aggregate", arguments)
        return None
    if name not in AGGREGATORS:
        raise unknown_name("aggregator", name, [NONE, *AGGREGATORS])
    return Aggregator(name, arguments, shape)
