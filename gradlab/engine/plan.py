"""Which engine takes which parameter: found out once by a pass over one sample, then remembered."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradlab.engine.general import general_gradients
from gradlab.engine.part import Part
from gradlab.engine.per_sample import PerSample, Taken
from gradlab.engine.structured import Unstructured, structured_gradients
from gradlab.engine.surrogate import Surrogate

Engine: TypeAlias = Literal["auto", "general"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the gradients of one surrogate are taken.

    Attributes:
        engines: For each parameter "structured", "general" (its per-sample gradients are formed),
            or "unused".
        everything_formed: Whether `vmap` of `grad` does it all.
        bytes_per_sample: What is kept for one sample of every agent.
    """

    engines: dict[str, str]
    everything_formed: bool
    bytes_per_sample: int

    @property
    def formed(self) -> frozenset[str]:
        """Names of the parameters whose per-sample gradients are formed."""
        return frozenset(name for name, engine in self.engines.items() if engine == "general")


# A memo: what a surrogate does with its parameters depends on shapes only. Keeps nothing alive.
_KNOWN: WeakKeyDictionary[object, dict[Any, Plan]] = WeakKeyDictionary()


def plan_for(
    surrogate: Surrogate,
    theta: Mapping[str, Tensor],
    part: Part,
    engine: Engine = "auto",
    *,
    owner: object = None,
    warn: bool = True,
) -> Plan:
    """Find out how to take a surrogate's per-sample gradients.

    Args:
        surrogate: The per-sample loss.
        theta: Parameters [agent, ...] or [1, ...] by name.
        part: Samples of which the first is tried.
        engine: "general" to form all gradients.
        owner: With whom the plan is remembered, where the surrogate is made anew for each call;
            by default the surrogate itself.
        warn: Say once if a matrix's gradients have to be formed. A vector's are no larger than a
            layer's outputs and go unmentioned.

    Returns:
        The plan.
    """
    known, function = _memo(surrogate if owner is None else owner)
    key = (function, engine, _shapes(theta, 0), _shapes(part.batch, 2), _shapes(part.context, 1))
    if key not in known:
        # A copy, so that a surrogate that writes over its sample is found out at no harm.
        first = part.picked(torch.zeros(1, dtype=torch.int64, device=part.device))
        known[key] = _found_out(surrogate, theta, first, engine, warn=warn)
    return known[key]


def gradients(
    surrogate: Surrogate,
    theta: Mapping[str, Tensor],
    part: Part,
    plan: Plan,
    *,
    plain: bool = False,
) -> Taken:
    """Per-sample gradients by the engines that a plan names.

    Args:
        surrogate: The per-sample loss.
        theta: Parameters [agent, ...] or [1, ...] by name.
        part: The samples.
        plan: What `plan_for` returned.
        plain: Whether to take the agents' sums as well; `theta` must then be [agent, ...].

    Returns:
        The gradients of every parameter that the surrogate reads, by name.

    Raises:
        Unstructured: If the surrogate has come to read its parameters otherwise.
    """
    if plan.everything_formed:
        return general_gradients(surrogate, theta, part, plain=plain)
    found = structured_gradients(surrogate, theta, part, plan.formed, plain=plain)
    unplanned = {name for name in found.per_sample if plan.engines[name] == "unused"}
    if unplanned:
        raise Unstructured(unplanned)
    return found


def planned_gradients(
    surrogate: Surrogate,
    theta: Mapping[str, Tensor],
    part: Part,
    engine: Engine = "auto",
    *,
    owner: object = None,
    warn: bool = True,
) -> dict[str, PerSample]:
    """Plan and take per-sample gradients; a remembered plan that no longer fits is made anew.

    Args:
        surrogate: The per-sample loss.
        theta: Parameters [agent, ...] or [1, ...] by name.
        part: The samples.
        engine: As for `plan_for`.
        owner: As for `plan_for`.
        warn: As for `plan_for`.

    Returns:
        The gradients of every parameter that the surrogate reads, by name.
    """
    plan = plan_for(surrogate, theta, part, engine, owner=owner, warn=warn)
    try:
        return gradients(surrogate, theta, part, plan).per_sample
    except Unstructured:
        forget(surrogate if owner is None else owner)
    plan = plan_for(surrogate, theta, part, engine, owner=owner, warn=warn)
    return gradients(surrogate, theta, part, plan).per_sample


def forget(owner: object) -> None:
    """Drop what is remembered of a surrogate, which has come to read its parameters otherwise.

    Args:
        owner: The per-sample loss, or what its plan was remembered with.
    """
    _memo(owner)[0].clear()


def _memo(owner: object) -> tuple[dict[Any, Plan], object]:
    """What is remembered, and what tells an owner's functions apart."""
    lasting, function = owner, None
    if isinstance(owner, MethodType):  # made anew at each look-up; its object lasts
        lasting, function = owner.__self__, owner.__func__
    try:
        return _KNOWN.setdefault(lasting, {}), function
    except TypeError:  # no hash, or no weak reference: found out each time
        return {}, function


def _found_out(
    surrogate: Surrogate, theta: Mapping[str, Tensor], part: Part, engine: Engine, *, warn: bool
) -> Plan:
    formed = frozenset(theta) if engine == "general" else frozenset[str]()
    while True:
        try:
            found = structured_gradients(surrogate, theta, part, formed).per_sample
            break
        except Unstructured as more:
            formed |= more.names
    engines = {
        name: "unused" if name not in found else "general" if name in formed else "structured"
        for name in theta
    }
    matrices = [name for name in theta if name in formed and theta[name].dim() > 2]
    if warn and engine == "auto" and matrices:
        warnings.warn(
            f"Per-sample gradients of {', '.join(matrices)} are formed one by one, which takes "
            "more time and memory: no linear layer, layer norm, embedding or GRU cell reads them "
            "directly.",
            stacklevel=2,
        )
    return Plan(
        engines=engines,
        everything_formed=engine == "general",
        bytes_per_sample=sum(gradient.nbytes for gradient in found.values()),
    )


def _shapes(tensors: Mapping[str, Tensor], skip: int) -> tuple[Any, ...]:
    return tuple((name, t.shape[skip:], t.dtype) for name, t in tensors.items())
