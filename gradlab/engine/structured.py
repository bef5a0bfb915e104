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
from gradlab.engine.part import (
    Part,
    Surrogate,
    Theta,
    agent_axes,
    checked_loss,
    explained,
    masked,
    without_agent_axis,
)
from gradlab.engine.per_sample import Lookup, Outer, PerSample, Rows, SquaredLengths
from gradlab.engine.recorder import Recorder, Use


class Unstructured(Exception):
    """Some parameters are not, or not only, read by known layers.

    Attributes:
        names: Their names.
    """

    def __init__(self, names: Set[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


def structured_gradients(
    surrogate: Surrogate, theta: Mapping[str, Tensor], part: Part, formed: Set[str]
) -> dict[str, PerSample]:
    """Gradients of all samples from one pass.

    Args:
        surrogate: The per-sample loss.
        theta: Parameters [agent, ...] or [1, ...] by name.
        part: The samples.
        formed: Names of the parameters whose per-sample gradients are to be formed.

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
    axes |= dict.fromkeys(formed, 0)
    recorder = Recorder(agents, samples)
    held = {**part.batch, **part.context}

    def watched(zero: Tensor, *tensors: Tensor) -> Tensor:  # flat: `vmap` walks its arguments
        theta = dict(zip(leaves, tensors, strict=False))
        recorder.watch({n: t for n, t in theta.items() if n not in formed}, zero)
        sample = dict(zip(held, tensors[len(leaves) :], strict=True))
        return checked_loss(surrogate, theta, sample, recorder)

    of_samples = (0 if name in formed else None for name in leaves)
    of_held = (0 if name in part.batch and name not in part.context else None for name in held)
    over_samples = vmap(watched, in_dims=(0, *of_samples, *of_held))
    over_agents = vmap(over_samples, in_dims=(0, *axes.values(), *[0] * len(held)))
    zero = next(iter(leaves.values())).new_zeros(agents, samples)
    with torch.enable_grad(), explained():
        losses = over_agents(zero, *leaves.values(), *held.values())
        _refuse_others(recorder)
        wanted: list[Any] = [leaves[name] for name in formed]
        wanted += [use.output for use in recorder.uses]
        total = masked(losses, part.mask).sum()
        if not wanted or not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    found: dict[str, PerSample] = {
        name: Rows(masked(gradient, part.mask))
        for name, gradient in zip(formed, gradients, strict=False)
        if gradient is not None
    }
    by_name: dict[str, list[tuple[Use, SquaredLengths, bool]]] = defaultdict(list)
    for use, gradient in zip(recorder.uses, gradients[len(formed) :], strict=True):
        if gradient is None:
            continue
        d = SquaredLengths(masked(use.arrange(gradient, agents, samples), part.mask))
        if part.mask is not None and use.kind != "lookup":
            # what was read for a sample that does not exist may be NaN
            use = replace(use, inputs=masked(use.inputs, part.mask))
        for read, is_bias in ((use.weight, False), (use.bias, True)):
            if read is not None:
                by_name[read].append((use, d, is_bias))
    shapes = {name: leaf.shape[0 if axes[name] is None else 1 :] for name, leaf in leaves.items()}
    found |= {name: _joined(uses, shapes[name]) for name, uses in by_name.items()}
    return {name: found[name] for name in theta if name in found}


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
    own = len(shape) - 1 if first.kind == "lookup" else 1  # axes of what one use returns
    d = _side_by_side([_with_one_use_axis(d.vectors, own) for _, d, _ in uses])
    if is_bias:
        return Rows(_sum_of_uses(d).unflatten(-1, shape))
    if first.kind == "lookup":
        return Lookup(_side_by_side([_with_one_use_axis(u.inputs, 0) for u, *_ in uses]), d, shape)
    a = _side_by_side([_with_one_use_axis(use.inputs, 1) for use, *_ in uses])
    if first.kind == "affine":
        return Rows(_sum_of_uses(a * d).unflatten(-1, shape))
    return Outer(a, d)


def _with_one_use_axis(tensor: Tensor, own: int) -> Tensor:
    """[agent, sample, *use, *own] as [agent, sample, use, *own]."""
    uses = tensor.dim() - 2 - own
    return tensor.flatten(2, 1 + uses) if uses else tensor.unsqueeze(2)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _sum_of_uses(values: Tensor) -> Tensor:
    return values[:, :, 0] if values.shape[2] == 1 else values.sum(2)
