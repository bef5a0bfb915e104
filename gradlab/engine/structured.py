"""The structured engine: one backward pass to the layers' outputs gives every sample's gradient.

The surrogate runs once, vectorised over agents and samples, and is differentiated with respect to
the outputs of the layers that read parameters; no weight's gradient is formed on the way. For a
linear layer, its inputs and those gradients are the factors of every sample's gradient (Goodfellow,
2015; "ghost norms" in private training). A parameter that no known layer reads gets a copy for
every sample instead, whose gradient is the per-sample gradient.
"""

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from gradlab.checks import UsageError
from gradlab.engine.part import Part, agent_axes, masked, without_agent_axis
from gradlab.engine.per_sample import Lookup, Outer, PerSample, Rows, SquaredLengths, Taken
from gradlab.engine.recorder import Recorder, Use
from gradlab.engine.surrogate import Surrogate, Theta, checked_loss, explained, unwritten


class Unstructured(Exception):
    """Some parameters are not, or not only, read by known layers.

    Attributes:
        names: Their names.
    """

    def __init__(self, names: Set[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


def structured_gradients(
    surrogate: Surrogate,
    theta: Mapping[str, Tensor],
    part: Part,
    formed: Set[str],
    *,
    plain: bool = False,
) -> Taken:
    """Gradients of all samples from one pass.

    Args:
        surrogate: The per-sample loss.
        theta: Parameters [agent, ...] or [1, ...] by name.
        part: The samples.
        formed: Names of the parameters whose per-sample gradients are to be formed.
        plain: Whether to take the agents' sums as well: the same backward pass goes on to the
            parameters themselves. `theta` must then be [agent, ...].

    Returns:
        The gradients of every parameter that the surrogate reads, by name.

    Raises:
        Unstructured: If further parameters must be formed.
    """
    agents, samples = part.sizes
    axes = agent_axes(theta, agents)
    leaves: Theta = {}
    for name, tensor in without_agent_axis(theta, axes).items():
        own = axes[name] == 0
        leaf = tensor
        if name in formed:
            leaf = tensor[:, None] if own else tensor[None, None]
            leaf = leaf.expand(agents, samples, *tensor.shape[1 if own else 0 :])
        leaves[name] = leaf.detach().requires_grad_()
    twins = {n: t.detach().requires_grad_() for n, t in leaves.items() if n not in formed}
    axes |= dict.fromkeys(formed, 0)
    recorder = Recorder(agents, samples)
    held = {**part.batch, **part.context}
    per_agent = [name for name in leaves if axes[name] == 0]
    twins_per_agent = [name for name in per_agent if name in twins]

    # `vmap` walks its arguments, so each level is handed what differs there and nothing else.
    def of_agent(zero: Tensor, *tensors: Tensor) -> Tensor:
        each = iter(tensors)
        mine = leaves | dict(zip(per_agent, each, strict=False))
        doubles = twins | dict(zip(twins_per_agent, each, strict=False))
        seen = dict(zip(held, each, strict=True))

        def of_sample(zero: Tensor, *tensors: Tensor) -> Tensor:
            each = iter(tensors)
            theta = mine | dict(zip(formed, each, strict=False))
            sample = seen | dict(zip(part.batch, each, strict=True))
            recorder.watch({name: theta[name] for name in doubles}, doubles, zero)
            return checked_loss(surrogate, theta, sample, recorder)

        of_samples = [mine[name] for name in formed] + [seen[name] for name in part.batch]
        losses: Tensor = vmap(of_sample)(zero, *of_samples)
        return losses

    of_agents = [leaves[name] for name in per_agent] + [twins[name] for name in twins_per_agent]
    zero = next(iter(leaves.values())).new_zeros(agents, samples)
    with torch.enable_grad(), explained(), unwritten({**theta, **held}):
        losses = vmap(of_agent)(zero, *of_agents, *held.values())
        _refuse_others(recorder)
        total = masked(losses, part.mask).sum()
        if not total.requires_grad:
            return Taken({}, {})
        uses: list[Any] = [use.output for use in recorder.uses]
        wanted = {n: leaves[n] for n in (*formed, *twins)}
        of_twins = twins if plain else {}
        gradients = torch.autograd.grad(
            total, [*uses, *wanted.values(), *of_twins.values()], allow_unused=True
        )
    of_leaves = dict(zip(wanted, gradients[len(uses) :], strict=False))
    missed = {name for name in twins if of_leaves[name] is not None}
    if missed:
        raise Unstructured(missed)
    found: dict[str, PerSample] = {
        name: Rows(masked(gradient, part.mask))
        for name, gradient in of_leaves.items()
        if gradient is not None
    }
    by_name: dict[str, list[tuple[Use, SquaredLengths, bool]]] = defaultdict(list)
    for use, gradient in zip(recorder.uses, gradients, strict=False):
        if gradient is None:
            continue
        gradient = gradient.to(zero.dtype)  # an autocast layer's is of lower precision
        d = SquaredLengths(masked(use.arrange(gradient, agents, samples), part.mask))
        if use.kind != "lookup" and (part.mask is not None or use.inputs.dtype != zero.dtype):
            # what was read for a sample that does not exist may be NaN
            use = replace(use, inputs=masked(use.inputs.to(zero.dtype), part.mask))
        for read, is_bias in ((use.weight, False), (use.bias, True)):
            if read is not None:
                by_name[read].append((use, d, is_bias))
    sums = dict(zip(of_twins, gradients[len(uses) + len(wanted) :], strict=True))
    if plain:
        sums |= {name: found[name].sum() for name in formed if name in found}
    shapes = {name: leaf.shape[0 if axes[name] is None else 1 :] for name, leaf in leaves.items()}
    found |= {name: _joined(uses, shapes[name]) for name, uses in by_name.items()}
    return Taken(
        per_sample={name: found[name] for name in theta if name in found},
        plain={name: tensor for name, tensor in sums.items() if tensor is not None},
    )


def _refuse_others(recorder: Recorder) -> None:
    """Raise for parameters that are read in an unknown way, or in two that do not add up."""
    roles: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for use in recorder.uses:
        if use.weight is not None:
            roles[use.weight].add((use.kind, False))
        if use.bias is not None:
            roles[use.bias].add(("", True))
    if any(use.inputs._version != use.version for use in recorder.uses):
        raise UsageError(
            "`surrogate` must not write in place. What a layer had read was written over before "
            "the gradient was taken; use the out-of-place form, e.g. `x = x + y` for `x += y`."
        )
    names = recorder.other | {name for name, found in roles.items() if len(found) > 1}
    if names:
        raise Unstructured(names)


def _joined(uses: list[tuple[Use, SquaredLengths, bool]], shape: torch.Size) -> PerSample:
    """All uses of one parameter, all in the same role, as one."""
    first, only, is_bias = uses[0]
    if first.kind == "linear" and len(uses) == 1 and only.vectors.dim() == 3:
        # Weight and bias of one layer: the output gradients' lengths serve both.
        if is_bias:
            return Rows(only.vectors, only)
        return Outer(first.inputs[:, :, None], only.vectors[:, :, None], only)
    own = len(shape)  # axes of what one use returns
    if not is_bias:
        own = {"linear": 1, "affine": own, "lookup": own - 1}[first.kind]
    d = _side_by_side([_with_one_use_axis(d.vectors, own) for _, d, _ in uses])
    if is_bias:
        return Rows(_sum_of_uses(d))
    read = 0 if first.kind == "lookup" else own
    a = _side_by_side([_with_one_use_axis(use.inputs, read) for use, *_ in uses])
    if first.kind == "lookup":
        return Lookup(a, d, shape)
    return Rows(_sum_of_uses(a * d)) if first.kind == "affine" else Outer(a, d)


def _with_one_use_axis(tensor: Tensor, own: int) -> Tensor:
    """[agent, sample, *use, *own] as [agent, sample, use, *own]."""
    uses = tensor.dim() - 2 - own
    return tensor.flatten(2, 1 + uses) if uses else tensor.unsqueeze(2)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _sum_of_uses(values: Tensor) -> Tensor:
    return values[:, :, 0] if values.shape[2] == 1 else values.sum(2)
