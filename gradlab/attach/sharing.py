"""How the agents of somebody else's policy come by their parameters, seen as a generator."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradlab.checks import UsageError, check
from gradlab.contributions import PullsBack
from gradlab.engine.part import agent_axes
from gradlab.engine.per_sample import Lookup, PerSample, Rows
from gradlab.engine.surrogate import Theta
from gradlab.parameters import owning_module

Generate: TypeAlias = Callable[[nn.Module, Int[Tensor, " agent"]], Theta]
"""Makes parameters for some agents, [agent, ...] by name, of a policy and the agents' numbers."""

_ONE = "generate"
_Trained: TypeAlias = list[tuple[int, bool, torch.device, torch.dtype]]


class Sharing(nn.Module, ABC):
    """A copy of a policy's trained parameters that makes each agent's, theta_i = h(psi, i).

    Called as `gradlab.decompose` calls a generator.

    Attributes:
        kind: The scheme's name.
        frozen: What is not trained, a clause for each.
        shared: What an agent's network reads besides theta, by name, the same for all agents:
            buffers, frozen parameters; copies, as of the last `refresh`.
        own: The same of what differs between agents, [agent, ...].
    """

    kind: str
    frozen: list[str]
    shared: dict[str, Tensor]
    own: dict[str, Tensor]

    @abstractmethod
    def refresh(self) -> None:
        """Copy the policy's present parameters and buffers.

        Raises:
            UsageError: If they are no longer those that it was made with.
        """


class _Theirs:
    """What belongs to the user: a copy of what holds it holds the same, no copy of it."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = networks

    def __deepcopy__(self, memo: object) -> "_Theirs":
        return self

    def trained(self) -> "_Trained":
        """Which parameters there are, and whether each is trained."""
        return [
            (id(p), p.requires_grad, p.device, p.dtype)
            for network in self.networks
            for p in network.parameters()
        ]


class Selection(Sharing):
    """Every agent's network is a module; agents share those parameters that are the same object.

    One module for all, one for each, and all between: of each policy parameter, psi holds the
    distinct trained tensors as rows, and agent i selects its row.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        """Read off who shares what.

        Args:
            networks: Each agent's module; the same one again where agents share it.

        Raises:
            UsageError: If they differ in their parameters, or nothing is trained.
        """
        super().__init__()
        self._theirs = _Theirs(networks)
        self._flags = self._theirs.trained()
        self._agents = len(networks)
        named = [dict(network.named_parameters()) for network in networks]
        held = [dict(network.named_buffers()) for network in networks]
        for what in (named, held):
            _check_alike(what)
        self._first: dict[str, list[int]] = {}  # for each row, the first agent whose it is
        self._rows: dict[str, list[int]] = {}  # which row is whose
        self._trained_rows: dict[str, int] = {}  # the rest is frozen
        self.theta = nn.ParameterDict()
        self.frozen = []
        self._frozen_in_all: list[str] = []
        for name in named[0]:
            tensors = [of[name] for of in named]
            trained = list({id(t): t for t in tensors if t.requires_grad}.values())
            fixed = list({id(t): t for t in tensors if not t.requires_grad}.values())
            if not trained:
                self._frozen_in_all.append(name)
                continue
            place = {id(t): number for number, t in enumerate([*trained, *fixed])}
            self._trained_rows[name] = len(trained)
            self._rows[name] = [place[id(t)] for t in tensors]
            self._first[name] = [self._rows[name].index(row) for row in range(len(place))]
            if fixed:
                whose = [str(i) for i, t in enumerate(tensors) if not t.requires_grad]
                self.frozen.append(f"{name} of agents {', '.join(whose)}")
            stacked = torch.stack([t.detach() for t in trained])
            self.theta[_of_psi(name)] = nn.Parameter(stacked)
            if fixed:
                self.register_buffer(_fixed(name), torch.stack([t.detach() for t in fixed]))
        self.frozen = self._frozen_in_all + self.frozen
        check(len(self.theta) > 0, "policy", "have parameters that require a gradient", [])

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The scheme's name: "fups", "nops", or "partly-shared"."""
        distinct = {len(set(rows)) for rows in self._rows.values()}
        if distinct == {1}:
            return "fups"
        return "nops" if distinct == {self._agents} else "partly-shared"

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """Select the agents' parameters; [1, ...] of what all share."""
        theta = {}
        for name, rows in self._rows.items():
            tensor = self.theta[_of_psi(name)]
            if self._is_frozen_in_part(name):
                tensor = torch.cat([tensor, self.get_buffer(_fixed(name))])
            theta[name] = tensor[self._row(rows, agents)] if len(tensor) > 1 else tensor
        return theta

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `gradlab.contributions.PullsBack`: a row goes to where its agent's was selected."""
        found: dict[str, PerSample] = {}
        for name, rows in self._rows.items():
            tensor, gradients = self.theta[_of_psi(name)], z[name]
            row = self._row(rows, agents)
            if self._is_frozen_in_part(name):
                trained = row < len(tensor)
                shape = (-1, *[1] * (gradients.dim() - 1))
                gradients = torch.where(trained.view(shape), gradients, 0.0)
                row = torch.where(trained, row, 0)
            found[f"theta.{_of_psi(name)}"] = (
                Lookup(row[None, :, None], gradients[None, :, None], tensor.shape)
                if len(tensor) > 1
                else Rows(gradients[None, :, None])
            )
        return found

    def refresh(self) -> None:
        """See `Sharing.refresh`."""
        _check_same(self._flags, self._theirs.trained())
        named = [dict(network.named_parameters()) for network in self._theirs.networks]
        held = [dict(network.named_buffers()) for network in self._theirs.networks]
        _check_alike(held)
        with torch.no_grad():
            for name, first in self._first.items():
                ours: list[Tensor] = list(self.theta[_of_psi(name)].unbind())
                if self._is_frozen_in_part(name):
                    ours += self.get_buffer(_fixed(name)).unbind()
                torch._foreach_copy_(ours, [named[agent][name] for agent in first])
        tensors: dict[str, list[Tensor]] = {}
        tensors |= {name: [of[name] for of in named] for name in self._frozen_in_all}
        tensors |= {name: [of[name] for of in held] for name in held[0]}
        self.shared, self.own = {}, {}
        for name, of_agents in tensors.items():
            if all(tensor is of_agents[0] for tensor in of_agents):
                self.shared[name] = of_agents[0].detach().clone()
            else:
                self.own[name] = torch.stack([t.detach() for t in of_agents])

    def layer_of(self, parameter: str) -> str:
        """Name the policy layer that a trained parameter belongs to.

        Args:
            parameter: Its name in `named_parameters`.

        Returns:
            The module that owns it.
        """
        return owning_module(parameter.removeprefix("theta.").replace("/", "."))

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """What tells the agents apart: their weights.

        Returns:
            One row for each agent, and a sentence that says what the rows are.
        """
        agents = self._agents
        theta = self(torch.arange(agents, device=next(self.parameters()).device))
        rows = torch.cat(
            [t.detach().reshape(len(t), -1).expand(agents, -1) for t in theta.values()], dim=1
        )
        return rows, "each agent's weights" + (", the same for all" * (self.kind == "fups"))

    def _is_frozen_in_part(self, name: str) -> bool:
        return self._trained_rows[name] < len(self._first[name])

    @staticmethod
    def _row(rows: list[int], agents: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        return torch.tensor(rows, device=agents.device)[agents]


class Generated(Sharing):
    """A module that makes each agent's parameters."""

    kind = "generated"

    def __init__(
        self,
        policy: nn.Module,
        agents: int,
        generate: Generate | None = None,
        target: nn.Module | None = None,
    ) -> None:
        """Copy the module.

        Args:
            policy: Makes parameters.
            agents: Number of agents.
            generate: Makes them for some agents at once; by default by the method
                `generate(agent)`, called with each agent's number, an integer.
            target: The module that they are for.

        Raises:
            UsageError: If nothing is trained, or something else is made.
        """
        super().__init__()
        self._theirs = _Theirs([policy])
        self._target = _Theirs([] if target is None else [target])
        self._flags = self._theirs.trained()
        self.policy = copied(policy)
        self._agents = agents
        self._generate = generate
        self.frozen = [name for name, p in policy.named_parameters() if not p.requires_grad]
        trained = [name for name, p in policy.named_parameters() if p.requires_grad]
        check(len(trained) > 0, "policy", "have parameters that require a gradient", [])
        numbers = torch.arange(agents, device=next(policy.parameters()).device)
        try:
            with torch.no_grad():
                agent_axes(self(numbers), agents)
        except (IndexError, KeyError) as error:
            raise UsageError(
                f"`policy` must make parameters for all {agents} agents, 0 to {agents - 1}. Got "
                f"for one of them: {type(error).__name__}: {error}."
            ) from error

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """Make the agents' parameters."""
        if self._generate is not None:
            return dict(_checked(self._generate(self.policy, agents)))
        made = [self._of(agent) for agent in range(self._agents)]
        _check_alike(made)
        return {name: torch.stack([of[name] for of in made])[agents] for name in made[0]}

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `gradlab.contributions.PullsBack`: one backward pass for all rows of an agent.

        Where the policy pulls back itself, as gradlab's own generators do, it is asked.
        """
        if isinstance(self.policy, PullsBack):
            pulled = self.policy.pull_back(z, agents)
            return {f"policy.{name}": gradient for name, gradient in pulled.items()}
        psi = {name: p for name, p in self.named_parameters() if p.requires_grad}
        rows = len(agents)
        found = {name: p.new_zeros(rows, *p.shape) for name, p in psi.items()}
        with torch.enable_grad():
            every = None
            if self._generate is not None:
                every = self(torch.arange(self._agents, device=agents.device))
            for agent in agents.unique().tolist():
                theta = (
                    self._of(agent)
                    if every is None
                    else {n: t[agent if len(t) > 1 else 0] for n, t in every.items()}
                )
                theta = {name: t for name, t in theta.items() if t.requires_grad}
                if not theta:
                    continue
                own = (agents == agent).nonzero()[:, 0]
                found_here = torch.autograd.grad(
                    [*theta.values()],
                    [*psi.values()],
                    [z[name][own] for name in theta],
                    is_grads_batched=True,
                    retain_graph=True,
                    allow_unused=True,
                )
                for name, gradient in zip(psi, found_here, strict=True):
                    if gradient is not None:
                        found[name][own] = gradient
        return {name: Rows(gradient[None]) for name, gradient in found.items()}

    def refresh(self) -> None:
        """See `Sharing.refresh`."""
        _check_same(self._flags, self._theirs.trained())
        (theirs,) = self._theirs.networks
        to, of = tensors_of(self.policy), tensors_of(theirs)
        with torch.no_grad():
            torch._foreach_copy_([to[name] for name in of], list(of.values()))
        self.shared, self.own = {}, {}
        for target in self._target.networks:
            self.shared = {name: t.detach().clone() for name, t in tensors_of(target).items()}

    def layer_of(self, parameter: str) -> str:
        """Name the module that owns a trained parameter.

        Args:
            parameter: Its name in `named_parameters`.

        Returns:
            The module's name in the policy.
        """
        inside = parameter.removeprefix("policy.")
        of_policy = getattr(self.policy, "layer_of", None)
        return owning_module(inside) if of_policy is None else str(of_policy(inside))

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """What tells the agents apart: what the policy says, or what is generated for them.

        Returns:
            One row for each agent, and a sentence that says what the rows are.
        """
        of_policy = getattr(self.policy, "representation", None)
        if of_policy is not None:
            rows, what = of_policy()
            return rows, what
        theta = self(torch.arange(self._agents, device=next(self.parameters()).device))
        rows = [t.detach().reshape(len(t), -1).expand(self._agents, -1) for t in theta.values()]
        return torch.cat(rows, dim=1), "each agent's generated weights"

    def _of(self, agent: int) -> Mapping[str, Tensor]:
        make = getattr(self.policy, _ONE)
        return _checked(make(agent))


def sharing_of(
    policy: nn.Module,
    agents: int,
    generate: Generate | None = None,
    target: nn.Module | None = None,
) -> Sharing:
    """See a policy as a generator.

    Args:
        policy: One module for all agents; a list or dictionary with a module for each; or one
            that makes their parameters by a method `generate(agent)`.
        agents: Number of agents.
        generate: How it makes them, if it does so otherwise.
        target: The module that generated parameters are for.

    Returns:
        The generator.

    Raises:
        UsageError: If it is none of these.
    """
    if generate is not None or callable(getattr(policy, _ONE, None)):
        return Generated(policy, agents, generate, target)
    return Selection(networks_of(policy, agents))


def networks_of(policy: nn.Module, agents: int) -> list[nn.Module]:
    """Each agent's module; the same one for all if there is only one.

    Args:
        policy: As for `sharing_of`.
        agents: Number of agents.

    Returns:
        As many modules as there are agents.
    """
    if isinstance(policy, nn.ModuleList):
        return list(policy)
    if isinstance(policy, nn.ModuleDict):
        return list(policy.values())
    return [policy] * agents


def copied(module: nn.Module) -> nn.Module:
    """Copy a module to be looked into, in evaluation mode, so that nothing is drawn or updated.

    Args:
        module: The module; left as it is.

    Returns:
        The copy.

    Raises:
        UsageError: If it can't be copied.
    """
    try:
        return copy.deepcopy(module).eval()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UsageError(
            f"`policy` must be a module that copy.deepcopy can copy. Got {type(module).__name__}, "
            f"for which it says: {str(error).strip().splitlines()[0]} Keep no tensors with a graph "
            "(such as a last hidden state) and no open files in its attributes, or detach them."
        ) from error


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name.

    Args:
        module: The module.

    Returns:
        The tensors themselves.
    """
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _of_psi(name: str) -> str:
    return name.replace(".", "/")  # torch reserves the dot for submodules


def _fixed(name: str) -> str:
    return f"fixed/{_of_psi(name)}"


def _checked(made: object) -> Mapping[str, Tensor]:
    if isinstance(made, Mapping) and made and all(isinstance(t, Tensor) for t in made.values()):
        return made
    raise UsageError(
        "`generate` must return an agent's parameters, tensors by name. Got "
        f"{type(made).__name__}; a policy whose `generate` is something else needs `generate=`."
    )


def _check_alike(of_agents: Sequence[Mapping[str, Tensor]]) -> None:
    shapes = [{name: tuple(t.shape) for name, t in of.items()} for of in of_agents]
    for agent, other in enumerate(shapes):
        for name in shapes[0].keys() ^ other.keys():
            raise UsageError(
                f"`policy` must have networks of one form. Only one of agents 0 and {agent} has "
                f"{name!r}; attach a probe of its own to each group of agents that are alike."
            )
        for name, shape in other.items():
            if shape != shapes[0][name]:
                raise UsageError(
                    f"`policy` must have networks of one form. {name!r} has shape "
                    f"{shapes[0][name]} for agent 0 and {shape} for agent {agent}; attach a probe "
                    "of its own to each group of agents that are alike."
                )


def _check_same(before: _Trained, now: _Trained) -> None:
    if before != now:
        raise UsageError(
            "`policy` must keep its parameters, their device, and which of them are trained, as "
            "long as a probe is attached. Got others; attach another probe, with a new `out`."
        )
