"""One network of somebody else's loop, as the instrument sees it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.func import functional_call

from gradlab.attach.sharing import Generate, copied, networks_of, sharing_of
from gradlab.checks import UsageError, check
from gradlab.engine.part import Part, in_precision
from gradlab.engine.rewrites import Rewrites
from gradlab.engine.surrogate import Surrogate, Theta, checked_loss, explained
from gradlab.parameters import WHOLE
from gradlab.probe import Network
from gradlab.quantity import Quantity, dataset

Loss = Callable[..., Tensor]
"""A per-sample loss: the agent's policy (or its generated parameters) and one sample in."""

Batch = Mapping[str, Tensor]

_CONSTANT = "constant/"
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


class AttachedNetwork:
    """A copy of one network's trained parameters, and the loss as the engine calls it.

    Attributes:
        sharing: How its agents come by their parameters.
        network: Both as `gradlab.probe.NetworkProbe` takes them.
    """

    def __init__(
        self,
        policy: nn.Module,
        loss: Loss,
        agents: int,
        generate: Generate | None = None,
        target: nn.Module | None = None,
    ) -> None:
        """Copy a network.

        Args:
            policy: As for `gradlab.Probe`.
            loss: As for `gradlab.Probe`.
            agents: Number of agents.
            generate: As for `gradlab.Probe`.
            target: As for `gradlab.Probe`.

        Raises:
            UsageError: If it can't be taken apart.
        """
        self.sharing = sharing_of(policy, agents, generate, target)
        form = target
        if form is None and self.sharing.kind != "generated":
            form = networks_of(policy, agents)[0]
        surrogate: Surrogate = loss if form is None else _of_theta(loss, copied(form), self)
        if target is not None:
            self._check_target(target)
        self.network = Network(generator=self.sharing, surrogate=surrogate)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.sharing.parameters()).device

    def refreshed(self) -> dict[str, Tensor]:
        """Copy the policy's present parameters and buffers.

        Returns:
            What each agent's samples read besides them, [agent, ...] by name.

        Raises:
            UsageError: If they are no longer those that it was made with.
        """
        self.sharing.refresh()
        return {_CONSTANT + name: tensor for name, tensor in self.sharing.own.items()}

    def attempt(
        self,
        batch: Batch,
        context: Mapping[str, Tensor],
        mask: Bool[Tensor, "agent sample"] | None,
    ) -> None:
        """Call the loss once as plain PyTorch would, to say in its user's words what is wrong.

        Args:
            batch: Tensors [agent, sample, ...] by name.
            context: What `refreshed` returned.
            mask: Which samples exist; all by default.

        Raises:
            UsageError: If something is.
        """
        theta, sample, shapes = self._first(batch, context, mask)
        with torch.enable_grad():
            try:
                value = self._value(theta, sample)
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
                "`loss` must use the policy that it is called with. Got a loss that does not "
                "depend on its first argument; another module, of an enclosing scope, stands for "
                "one agent only."
            )
        finite = all(t.isfinite().all() for t in [*sample.values(), *theta.values()])
        if finite and not value.isfinite():
            raise UsageError(
                f"`loss` must be finite for a finite sample. Got {value.item()} for the first one; "
                "does it reduce over the batch, as by a standard deviation? Do that beforehand."
            )

    def check_repeats(
        self,
        batch: Batch,
        context: Mapping[str, Tensor],
        mask: Bool[Tensor, "agent sample"] | None,
    ) -> None:
        """Refuse a loss that says something else of a sample when it is called again.

        At every diagnosis: in the first one, where all episodes begin, a state may be forgotten
        that later on is not.

        Args:
            batch: As for `attempt`.
            context: As for `attempt`.
            mask: As for `attempt`.

        Raises:
            UsageError: If it does.
        """
        theta, sample, _ = self._first(batch, context, mask)
        with torch.no_grad(), explained():
            first, second = (self._value(theta, sample) for _ in range(2))
        if not torch.allclose(first, second, rtol=1e-5, equal_nan=True):
            raise UsageError(
                "`loss` must be a function of the sample and the policy's parameters. Got "
                f"{first.item():.6g} and, called again with the same, {second.item():.6g}; if the "
                "policy keeps a state between its calls, hand the state in with the sample, and "
                "set it when `loss` begins."
            )

    def _first(
        self,
        batch: Batch,
        context: Mapping[str, Tensor],
        mask: Bool[Tensor, "agent sample"] | None,
    ) -> tuple[Theta, dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """The first sample there is: its agent's parameters, what `loss` reads, its shapes."""
        part = Part(batch=batch, context=context, mask=mask)
        where = (0, 0)
        if mask is not None and mask.any():
            where = tuple(mask.nonzero()[0].tolist())
        sample = {name: tensor[where] for name, tensor in part.batch.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in sample.items()}
        sample |= {name: tensor[where[0]] for name, tensor in part.context.items()}
        made = self.sharing(torch.tensor([where[0]], device=part.device))
        return {name: t[0].detach().requires_grad_() for name, t in made.items()}, sample, shapes

    def _value(self, theta: Theta, sample: Mapping[str, Tensor]) -> Tensor:
        with undisturbed({self.device}):  # so that each call draws the same, if it draws
            return checked_loss(self.network.surrogate, theta, dict(sample), Rewrites())

    def _check_target(self, target: nn.Module) -> None:
        with torch.no_grad():
            theta = self.sharing(torch.zeros(1, dtype=torch.long, device=self.device))
        known = dict(target.named_parameters())
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in theta.items()}
        if wrong := [n for n, s in shapes.items() if n not in known or tuple(known[n].shape) != s]:
            has = {name: tuple(p.shape) for name, p in known.items()}
            raise UsageError(
                f"`target` must have what is generated. Got {wrong[0]!r} of shape "
                f"{shapes[wrong[0]]}, where it has {has}."
            )


class _Called(nn.Module):
    """A loss as a module that holds the policy, whose parameters can then be others for a call."""

    def __init__(self, policy: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.policy = policy
        self.loss = loss

    def forward(self, sample: dict[str, Tensor]) -> Tensor:
        return self.loss(self.policy, sample)


def _of_theta(loss: Loss, policy: nn.Module, attached: AttachedNetwork) -> Surrogate:
    """The loss as the engine calls it: of an agent's parameters by name."""
    called = _Called(policy, loss)
    sharing = attached.sharing

    def surrogate(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        dtype = next(iter(theta.values())).dtype
        own = {name: sample.pop(name) for name in list(sample) if name.startswith(_CONSTANT)}
        tensors = in_precision(sharing.shared, dtype)
        tensors |= {name.removeprefix(_CONSTANT): tensor for name, tensor in own.items()} | theta
        named = {f"policy.{name}": tensor for name, tensor in tensors.items()}
        found: Tensor = functional_call(called, named, (sample,))
        return found

    return surrogate


def check_policy(policy: object) -> None:
    """Refuse modules of which no per-sample gradients can be taken.

    Args:
        policy: What was handed in.

    Raises:
        UsageError: If it is no module, or a compiled, wrapped or lazy one, with what to pass.
    """
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


def agent_names(policy: nn.Module, agents: int | Sequence[str] | None) -> list[str]:
    """The agents' names.

    Args:
        policy: As for `gradlab.Probe`.
        agents: Number of agents, or their names; None where a list or dictionary says it.

    Returns:
        A name for each.

    Raises:
        UsageError: If nothing says how many there are, or there are fewer than two.
    """
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


def alike(found: Mapping[str, Quantity], batch: Batch, network: str) -> list[str]:
    """Say whether agents' samples all have one gradient, though they are not the same sample.

    Args:
        found: What a diagnosis found.
        batch: What it was made of.
        network: The network that it is asked of.

    Returns:
        A sentence if they do.
    """
    if "variance_agent" not in found:
        return []
    place = {"network": network, "layer": WHOLE}
    of_all = dataset({name: found[name] for name in ("variance_agent", "norm")}).sel(place)
    varies = any((tensor != tensor[:, :1]).any() for tensor in batch.values())
    longest = float((of_all["norm"].sel(space="theta") ** 2).max())
    rounding = 1e-5 * longest  # of sums in float32; what differs at all differs by more
    vanishing = longest < torch.finfo(torch.float32).tiny  # which is said for itself
    if vanishing or not varies or not (of_all["variance_agent"] <= rounding).all():
        return []
    return [
        "all samples of an agent have the same gradient, though they differ: does `loss` reduce "
        "over the batch? It is to be the loss of the one sample that it is given."
    ]


@contextmanager
def undisturbed(devices: set[torch.device]) -> Iterator[None]:
    """Leave random states as they were, whatever user code draws.

    Args:
        devices: Where it may draw, besides the CPU.

    Yields:
        Nothing.
    """
    cuda = {device.index or 0 for device in devices if device.type == "cuda"}
    with torch.random.fork_rng(sorted(cuda)):
        yield


@contextmanager
def in_their_words(network: str | None = None) -> Iterator[None]:
    """Call things as the user handed them in.

    Args:
        network: The network that this is about, where there are several.

    Yields:
        Nothing.

    Raises:
        UsageError: In place of one that calls them otherwise.
    """
    try:
        yield
    except UsageError as error:
        said = str(error).replace("`surrogate`", "`loss`").replace("`generator`", "`policy`")
        for name in ("policy", "loss", "target", "generate"):
            if network is not None:
                said = said.replace(f"`{name}`", f"`{name}[{network!r}]`")
        raise UsageError(said) from error
