"""One agent's part of a multi-agent tensordict module, with the framework's own parameters.

A multi-agent network holds the networks of all agents and runs them together. Here each agent's is
a module of its own, whose parameters are views of the framework's: what is trained there is seen
here, and no network runs for other agents' sake.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Literal, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.modules import MultiAgentMLP

from gradlab.checks import UsageError, check

Key: TypeAlias = str | tuple[str, ...]
Axis: TypeAlias = Literal["own", "all", "common"]
"""What is read of a tensor: the agent's own part; that of all agents, joined; or all of a tensor
that has no agent axis."""


def name_of(key: Key) -> str:
    """A tensordict's key as one word.

    Args:
        key: The key.

    Returns:
        Its parts, with slashes between them.
    """
    return key if isinstance(key, str) else "/".join(key)


@dataclass(frozen=True)
class Read:
    """What a network reads of a batch.

    Attributes:
        keys: The tensors' keys.
        axis: What of them.
    """

    keys: tuple[Key, ...]
    axis: Axis = "own"

    @property
    def name(self) -> str:
        """What it is called among an agent's samples."""
        joined = "+".join(name_of(key) for key in self.keys)
        return f"{joined} of all agents" if self.axis == "all" else joined

    @property
    def parts(self) -> tuple["Read", ...]:
        """What is to be taken from a batch for it."""
        if self.axis == "all":
            return (self,)
        return tuple(Read((key,), self.axis) for key in self.keys)

    def of(self, values: Mapping[str, Tensor]) -> Tensor:
        """Find it among an agent's tensors.

        Args:
            values: Tensors by name.

        Returns:
            The tensor, joined along its last axis where it has several keys.
        """
        found = [values[part.name] for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


@dataclass
class Views:
    """Parameters that are to be views of the framework's."""

    _of: list[tuple[Tensor, Callable[[], Tensor]]] = field(default_factory=list)

    def view(self, source: Callable[[], Tensor]) -> nn.Parameter:
        """Make a parameter that shares memory with the framework's.

        Args:
            source: Finds what it is a view of.

        Returns:
            The parameter, trained if the framework's is.
        """
        of = source()
        made = nn.Parameter(of.detach(), requires_grad=of.requires_grad)
        self._of.append((made, source))
        return made

    def look(self) -> None:
        """Look at where the framework's parameters are now, should they have been moved."""
        for made, source in self._of:
            of = source()
            made.data = of.detach()
            made.requires_grad_(of.requires_grad)


Maker: TypeAlias = Callable[[int, Views], nn.Module]
"""Makes an agent's module; that of agent 0 again where all share it."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One step of a network.

    Attributes:
        name: What it is called.
        reads: What it reads; several are arguments, in order.
        writes: Names of what it makes.
        make: Makes its module.
        common: Whether what it makes has no agent axis.
        generator: Makes the parameters of its module for each agent, if they are generated.
    """

    name: str
    reads: tuple[Read, ...]
    writes: tuple[str, ...]
    make: Maker
    common: bool = False
    generator: nn.Module | None = None


class AgentNetwork(nn.Module):
    """The steps of one agent's network, of tensors by name without an agent axis."""

    def __init__(self, pieces: Sequence[Piece], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._plan = [
            (name, piece.reads, piece.writes) for name, piece in zip(modules, pieces, strict=True)
        ]
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the steps.

        Args:
            sample: What they read by name.

        Returns:
            The same with what they make.
        """
        values = dict(sample)
        for name, reads, writes in self._plan:
            made = self.get_submodule(name)(*(read.of(values) for read in reads))
            made = made if isinstance(made, tuple) else (made,)
            values |= dict(zip(writes, made, strict=False))
        return values


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a group's agents.

    Attributes:
        policy: What `gradlab.Probe` takes: a list of `AgentNetwork`; or what generates the
            parameters of one, which then is `target`.
        target: See `policy`.
        reads: What they read of a batch.
        views: Of the framework's parameters.
    """

    policy: nn.Module
    target: AgentNetwork | None
    reads: tuple[Read, ...]
    views: Views


def networks(module: TensorDictModuleBase, agents: int) -> Networks:
    """Find each agent's network in a multi-agent module.

    Args:
        module: The module, without a distribution at its end.
        agents: Number of agents.

    Returns:
        The networks, and what they read.

    Raises:
        UsageError: If there is a part that can't be taken for one agent alone.
    """
    found = _numbered(_in_order(list(pieces(module)), agents))
    made: set[str] = set()
    reads: dict[Read, None] = {}
    for piece in found.values():
        for part in (part for read in piece.reads for part in read.parts):
            if not made & {name_of(key) for key in part.keys}:
                reads[part] = None
            elif part.axis == "all":
                raise UsageError(
                    "a network must not join what it has made of several agents itself. Got "
                    f"{piece.name!r}, which reads {part.name}."
                )
        made |= set(piece.writes)
    views, values = Views(), list(found.values())

    def network(agent: int) -> AgentNetwork:
        modules = {name: piece.make(agent, views) for name, piece in found.items()}
        return AgentNetwork(values, modules)

    generated = {name: p.generator for name, p in found.items() if p.generator is not None}
    if not generated:
        own = nn.ModuleList([network(agent) for agent in range(agents)])
        return Networks(policy=own, target=None, reads=tuple(reads), views=views)
    target = network(0)
    ((prefix, generator), *others) = generated.items()
    of_others = {name.partition(".")[0] for name, _ in target.named_parameters()} - {prefix}
    rule = "have all its trained parameters generated by one hypernetwork, or none"
    check(not (others or of_others), "a network", rule, sorted(found))
    policy = Renamed(generator, prefix)
    return Networks(policy=policy, target=target, reads=tuple(reads), views=views)


class Renamed(nn.Module):
    """A generator of a network that is part of another, by its parameters' names there."""

    def __init__(self, generator: nn.Module, prefix: str) -> None:
        super().__init__()
        self.generator = generator
        self._prefix = f"{prefix}."

    def forward(self, agents: Tensor) -> dict[str, Tensor]:
        """See `trainers.generators.generator.Generator.forward`."""
        return {self._prefix + name: tensor for name, tensor in self.generator(agents).items()}

    def pull_back(self, z: Mapping[str, Tensor], agents: Tensor) -> dict[str, object]:
        """See `gradlab.contributions.PullsBack`."""
        named = {name.removeprefix(self._prefix): tensor for name, tensor in z.items()}
        found = self.generator.pull_back(named, agents)  # type: ignore[operator]
        return {f"generator.{name}": gradient for name, gradient in found.items()}

    def layer_of(self, parameter: str) -> str:
        """See `trainers.generators.generator.Generator.layer_of`."""
        inside = parameter.removeprefix("generator.")
        return self._prefix + str(self.generator.layer_of(inside))  # type: ignore[operator]

    def representation(self) -> tuple[Tensor, str]:
        """See `trainers.generators.generator.Generator.representation`."""
        found: tuple[Tensor, str] = self.generator.representation()  # type: ignore[operator]
        return found


@singledispatch
def pieces(module: object) -> Iterator[Piece]:
    """Take a tensordict module to pieces; other frameworks register their own kinds.

    Args:
        module: The module.

    Yields:
        Its steps, in order.

    Raises:
        UsageError: If it can't be taken for one agent alone.
    """
    raise refusal(module)
    yield


@pieces.register
def _(module: TensorDictSequential) -> Iterator[Piece]:
    for part in module.module:
        if not isinstance(part, ProbabilisticTensorDictModule):
            yield from pieces(part)


@pieces.register
def _(module: TensorDictModule) -> Iterator[Piece]:
    axis, make = maker_of(module.module)
    name = "mlp" if _trained(module.module) else "map"
    keys = tuple(module.in_keys)
    joined = axis == "all" or name == "mlp"
    reads = (Read(keys, axis),) if joined else tuple(Read((key,), axis) for key in keys)
    writes = tuple(name_of(key) for key in module.out_keys)
    yield Piece(name=name, reads=reads, writes=writes, make=make)


def maker_of(module: object) -> tuple[Axis, Maker]:
    """Find out how to make one agent's part of a module of plain tensors.

    Args:
        module: A `MultiAgentMLP`; a sequence that begins with one; or what has no parameters.

    Returns:
        What it reads of the agents, and what makes its part.

    Raises:
        UsageError: If it is something else.
    """
    if isinstance(module, MultiAgentMLP):
        rule = "have agents on the last axis but one"
        check(module.agent_dim == -2, "a MultiAgentMLP", rule, module.agent_dim)
        return ("all" if module.centralized else "own"), stacked(
            module._empty_net, lambda: module.params, shared=module.share_params
        )
    if isinstance(module, nn.Sequential) and len(module):
        (axis, first), *others = [maker_of(part) for part in module]
        if any(other == "all" for other, _ in others):
            raise refusal(module)
        makers = [first, *(make for _, make in others)]
        return axis, lambda agent, views: _Sequence(*(make(agent, views) for make in makers))
    if not _trained(module) and callable(module):
        kept = module if isinstance(module, nn.Module) else _Function(module)
        return "own", lambda agent, views: kept  # noqa: ARG005
    raise refusal(module)


def stacked(empty: nn.Module, params: Callable[[], TensorDictBase], *, shared: bool) -> Maker:
    """Make agents' modules of parameters that are stacked along a leading agent axis.

    Args:
        empty: A module without values.
        params: Finds the values by the module's names, [agent, ...], or of all agents.
        shared: Whether all agents share them.

    Returns:
        What makes an agent's module.
    """
    made: dict[int, nn.Module] = {}

    def make(agent: int, views: Views) -> nn.Module:
        row = 0 if shared else agent
        if row not in made:
            module = copy.deepcopy(empty)
            for key in params().keys(True, True):
                path = (key,) if isinstance(key, str) else key
                owner = module.get_submodule(".".join(path[:-1]))

                def source(key: Key = key) -> Tensor:
                    tensor: Tensor = params().get(key)
                    return tensor if shared else _row(tensor, agent)

                if path[-1] in owner._buffers:
                    owner._buffers[path[-1]] = source().detach()
                else:
                    _set(owner, path[-1], views.view(source))
            made[row] = module
        return made[row]

    return make


def refusal(module: object) -> UsageError:
    """Say that a module can't be taken for one agent alone.

    Args:
        module: The module.

    Returns:
        The error.
    """
    return UsageError(
        "a network must be a MultiAgentMLP (alone, or first in an nn.Sequential or "
        "TensorDictSequential of modules without parameters), so that one agent's part can be "
        f"told apart. Got {type(module).__name__}."
    )


def _row(tensor: Tensor, agent: int) -> Tensor:
    """An agent's part, still said to be trained or not."""
    return tensor.detach()[agent].requires_grad_(tensor.requires_grad)


def _set(owner: nn.Module, name: str, value: nn.Parameter) -> None:
    owner.__dict__.pop(name, None)
    owner._parameters.pop(name, None)
    owner.register_parameter(name, value)


def _trained(module: object) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None


def _in_order(found: list[Piece], agents: int) -> list[Piece]:
    """Where a piece reads what has no agent axis, take the agent's row of what it makes of it."""
    common: set[str] = set()
    ordered = []
    for piece in found:
        if piece.common:
            common |= set(piece.writes)
        elif common & {name_of(key) for read in piece.reads for key in read.keys}:
            piece = _of_row(piece, agents)
        ordered.append(piece)
    return ordered


def _of_row(piece: Piece, agents: int) -> Piece:
    def make(agent: int, views: Views) -> nn.Module:
        return _Row(piece.make(agent, views), agent, agents)

    return Piece(name=piece.name, reads=piece.reads, writes=piece.writes, make=make)


def _numbered(found: list[Piece]) -> dict[str, Piece]:
    """Pieces by names of their own."""
    named: dict[str, Piece] = {}
    for piece in found:
        name, number = piece.name, 1
        while name in named:
            number += 1
            name = f"{piece.name}{number}"
        named[name] = piece
    return named


class _Sequence(nn.Module):
    """Modules one after the other, of which each may make several tensors."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for number, module in enumerate(modules):
            self.add_module(str(number), module)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for module in self.children():
            made = module(*tensors)
            tensors = made if isinstance(made, tuple) else (made,)
        return tensors


class _Function(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._function(*tensors)


class _Row(nn.Module):
    """The agent's row of what a module makes for all agents."""

    def __init__(self, module: nn.Module, agent: int, agents: int) -> None:
        super().__init__()
        self.module = module
        self._agents = agents
        self.register_buffer("agent", torch.tensor([agent]))

    def forward(self, *tensors: Tensor) -> Tensor:
        made: Tensor = self.module(*tensors)
        rule = f"have {self._agents} agents on its last axis but one"
        check(made.shape[-2:-1] == (self._agents,), "what is made", rule, tuple(made.shape))
        return made.index_select(-2, self.get_buffer("agent")).squeeze(-2)
