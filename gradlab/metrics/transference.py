r"""Whether interference matters: what one agent's step does to the others' losses.

Gradients that point against each other do harm only as far as a step of useful size along one
raises the other's loss, on samples that the step was not made from.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from gradlab.checks import UsageError, check
from gradlab.decomposition import decompose
from gradlab.engine.accumulate import DEFAULT_BUDGET
from gradlab.engine.clusters import EXACT
from gradlab.engine.part import Part, batch_axes
from gradlab.engine.per_sample import PerSample
from gradlab.engine.surrogate import Surrogate
from gradlab.factorisation import reads_observation
from gradlab.losses import sample_losses
from gradlab.quantity import Quantity, dataset

RELATIVE_LENGTH = 1e-3
"""Default length of a step over that of the trained parameters.

About what one step of Adam at the usual learning rate of 3e-4 moves weights of typical size 0.1 to
0.3; long enough for a loss's change to stand out from rounding in float32.
"""

Pairs = Float[np.ndarray, "agent agent_other"]


def transference(
    generator: nn.Module,
    surrogate: Surrogate,
    batch: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    *,
    mask: Bool[Tensor, "agent sample"] | None = None,
    held_out_mask: Bool[Tensor, "agent held_out_sample"] | None = None,
    context: Mapping[str, Tensor] | None = None,
    length: float | None = None,
    preconditioner: Mapping[str, Tensor] | None = None,
    budget: int = DEFAULT_BUDGET,
) -> xr.Dataset:
    r"""Change of each agent's held-out loss by a step along one agent's part of the gradient alone.

    With :math:`g_i = J_i^\top Z_i` from `batch`, a positive diagonal P, :math:`L_k` agent k's mean
    loss on `held_out`, and the same length :math:`\epsilon` for every agent,

    .. math:: \Delta_{i \to k} = L_k(\psi - \epsilon\, d_i) - L_k(\psi), \qquad
              d_i = \frac{P g_i}{\|P g_i\|}, \qquad
              \Delta_{i \to k} \approx -\epsilon\, d_i \cdot \nabla_\psi L_k .

    Negative: the step helps agent k. The lookahead loss of Fifty et al., "Measuring and Harnessing
    Transference in Multi-Task Learning" (2020), as a difference: a ratio of losses has no meaning
    where a surrogate loss is near 0. Touches no parameter, `.grad`,
    buffer or random state.

    Args:
        generator: As for `gradlab.decompose`.
        surrogate: As for `gradlab.decompose`.
        batch: Tensors [agent, sample, ...] by name, what the steps are made from.
        held_out: The same of other environment copies, see `gradlab.split_copies`; other time steps
            of the same copies would share their noise.
        mask: Which samples of `batch` exist; all by default.
        held_out_mask: Which samples of `held_out` exist; all by default.
        context: Tensors [agent, ...] by name that each of the agent's samples holds as well.
        length: Euclidean length of each step in the space of the trained parameters; by default
            1e-3 of their own length.
        preconditioner: P by trained parameter: what multiplies the gradient, none of it negative;
            see `gradlab.adam_preconditioner`. None: the gradient as it is.
        budget: As for `gradlab.gradient_moments`.

    Returns:
        Over (agent, agent_other), agent the one that steps and agent_other the one whose loss
        changes, in units of the loss:

        - `transference`, the change
        - `transference_predicted`, the same to first order

        Both are NaN in the row of an agent whose gradient is zero, and so has no direction, and in
        the column of one without held-out samples. Without axes:

        - `transference_agreement`, Pearson's correlation of the two over all pairs; NaN for fewer
          than two pairs, or where one's values are all equal to rounding
        - `transference_error`, the Frobenius norm of their difference over that of the prediction;
          NaN where that is 0
        - `transference_length`, the Euclidean length of each step

    Raises:
        UsageError: If the two batches differ in their agents, an argument is not as it must be, or
            as `gradlab.decompose` does.
    """
    return dataset(
        measure_transference(
            generator,
            surrogate,
            batch,
            held_out,
            mask=mask,
            held_out_mask=held_out_mask,
            context=context,
            length=length,
            preconditioner=preconditioner,
            budget=budget,
        )
    )


def measure_transference(
    generator: nn.Module,
    surrogate: Surrogate,
    batch: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    *,
    mask: Bool[Tensor, "agent sample"] | None = None,
    held_out_mask: Bool[Tensor, "agent held_out_sample"] | None = None,
    context: Mapping[str, Tensor] | None = None,
    length: float | None = None,
    preconditioner: Mapping[str, Tensor] | None = None,
    budget: int = DEFAULT_BUDGET,
) -> dict[str, Quantity]:
    """What `transference` labels.

    Args:
        generator: As for `transference`.
        surrogate: As for `transference`.
        batch: As for `transference`.
        held_out: As for `transference`.
        mask: As for `transference`.
        held_out_mask: As for `transference`.
        context: As for `transference`.
        length: As for `transference`.
        preconditioner: As for `transference`.
        budget: As for `transference`.

    Returns:
        The quantities by name.

    Raises:
        UsageError: As for `transference`.
    """
    agents, _ = batch_axes(batch)
    _check_held_out(held_out, agents)
    psi = {n: p.detach() for n, p in generator.named_parameters() if p.requires_grad}
    check(len(psi) > 0, "generator", "have parameters that require a gradient", [])
    length = _length(psi, length)
    weights = _weights(psi, preconditioner)
    shared: dict[str, Any] = {"context": context, "check": 0, "budget": budget}
    own = decompose(generator, surrogate, batch, mask=mask, **shared).contributions
    of_losses = decompose(generator, surrogate, held_out, mask=held_out_mask, **shared)
    products, norms = _products(own, of_losses.contributions, weights, agents, budget)
    scales = torch.where(norms > 0, length / norms, torch.nan)

    part = Part(batch=held_out, context=context or {}, mask=held_out_mask)
    count = part.counts()[:, 0]
    room = EXACT
    if reads_observation(generator):  # which makes parameters for each sample
        size = of_losses.theta_layout.size * next(iter(psi.values())).element_size()
        room = max(1, min(EXACT, budget // (agents * size)))

    def losses(psi: Mapping[str, Tensor]) -> Float[Tensor, "agent held_out_sample"]:
        starts = range(0, part.sizes[1], room)
        with torch.no_grad():
            return torch.cat(
                [sample_losses(generator, psi, surrogate, part.span(s, s + room)) for s in starts],
                dim=1,
            )

    before = losses(psi)
    changes = torch.full_like(products, torch.nan)
    for agent, scale in enumerate(scales.tolist()):
        if scale > 0:
            row = slice(agent, agent + 1)
            after = losses({
                name: value - scale * _direction(own[name], weights[name], row)[0]
                for name, value in psi.items()
            })
            # By sample first, so that the loss's own size does not add to the rounding.
            changes[agent] = (after - before).double().sum(1) / count
    without = torch.where(count > 0, 0.0, torch.nan)
    predicted = (without - scales[:, None] * products).cpu().numpy()
    return _quantities(predicted, changes.cpu().numpy(), length, before.dtype)


def _check_held_out(held_out: Mapping[str, Tensor], agents: int) -> None:
    axes = {name: tuple(tensor.shape[:2]) for name, tensor in held_out.items()}
    (first, *_) = axes.values() or [()]
    check(
        len(first) == 2 and first[0] == agents and first[1] > 0 and len(set(axes.values())) == 1,
        "held_out",
        f"hold tensors with the same two leading axes [agent, sample], of {agents} agents as "
        "`batch` and at least one sample",
        axes,
    )


def _length(psi: Mapping[str, Tensor], length: float | None) -> float:
    if length is None:
        norms = [torch.linalg.vector_norm(tensor.double()) for tensor in psi.values()]
        length = RELATIVE_LENGTH * float(torch.stack(norms).norm())
        if length == 0:
            raise UsageError(
                "`length` must be given where all trained parameters are 0, of which it is a "
                "share. Got length=None."
            )
    check(0 < length < float("inf"), "length", "be above 0 and finite", length)
    return float(length)


def _weights(
    psi: Mapping[str, Tensor], preconditioner: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    if preconditioner is None:
        return {name: tensor.new_ones(()) for name, tensor in psi.items()}
    rule = f"name the trained parameters, {', '.join(psi)}"
    check(set(preconditioner) == set(psi), "preconditioner", rule, list(preconditioner))
    for name, tensor in psi.items():
        weight, where = preconditioner[name], f"preconditioner[{name!r}]"
        rule = f"have the parameter's shape, {tuple(tensor.shape)}"
        check(weight.shape == tensor.shape, where, rule, tuple(weight.shape))
        allowed = weight.isfinite() & (weight >= 0)
        rule = "hold finite numbers, none below 0"
        check(bool(allowed.all()), where, rule, weight[~allowed][:1].tolist())
    return {name: preconditioner[name].detach().to(tensor) for name, tensor in psi.items()}


def _direction(
    contribution: PerSample, weight: Tensor, agents: slice
) -> Float[Tensor, " some *shape"]:
    """P g_i of some agents, for one parameter."""
    rows = contribution.some(agents).rows()[0]
    return rows.to(weight.dtype) * weight


def _products(
    own: Mapping[str, PerSample],
    of_losses: Mapping[str, PerSample],
    weights: Mapping[str, Tensor],
    agents: int,
    budget: int,
) -> tuple[Float[Tensor, "agent agent_other"], Float[Tensor, " agent"]]:
    """Inner products (P g_i) . h_k, and the lengths of all P g_i, in float64.

    One parameter after the other, of no more agents at once than the budget allows.
    """
    like = next(iter(weights.values()))
    products = like.new_zeros(agents, agents, dtype=torch.float64)
    squares = like.new_zeros(agents, dtype=torch.float64)
    for name, weight in weights.items():
        one = own[name].shape.numel() * weight.element_size()
        at_once = max(1, budget // (2 * max(1, one)))
        for ours in _stretches(agents, at_once):
            rows = _direction(own[name], weight, ours)
            rows = rows.reshape(len(rows), -1)
            squares[ours] += rows.double().square().sum(1)
            for theirs in _stretches(agents, at_once):
                others = of_losses[name].some(theirs).rows()[0].to(rows)
                products[ours, theirs] += (rows @ others.reshape(len(others), -1).mT).double()
    return products, squares.sqrt()


def _stretches(total: int, most: int) -> Iterator[slice]:
    return (slice(start, min(total, start + most)) for start in range(0, total, most))


def _quantities(
    predicted: Pairs, taken: Pairs, length: float, dtype: torch.dtype
) -> dict[str, Quantity]:
    agents = range(len(taken))

    def pairs(values: Pairs, how: str) -> Quantity:
        return Quantity(
            values=values,
            dims=("agent", "agent_other"),
            coords={"agent": agents, "agent_other": agents},
            unit="loss",
            estimator=f"held-out loss after a step along one agent's gradient less before, {how}",
        )

    known = np.isfinite(predicted) & np.isfinite(taken)
    x, y = predicted[known], taken[known]
    size = np.linalg.norm(x)
    error = np.linalg.norm(y - x) / size if size > 0 else np.nan
    return {
        "transference": pairs(taken, "evaluated"),
        "transference_predicted": pairs(predicted, "to first order"),
        "transference_agreement": Quantity.scalar(
            _correlation(x, y, torch.finfo(dtype).eps ** 0.5),
            "1",
            "correlation over agent pairs of evaluated and first-order transference",
        ),
        "transference_error": Quantity.scalar(
            float(error), "1", "|evaluated - first-order| / |first-order|, over agent pairs"
        ),
        "transference_length": Quantity.scalar(length, "1", "Euclidean length of each step"),
    }


def _correlation(
    x: Float[np.ndarray, " pair"], y: Float[np.ndarray, " pair"], resolution: float
) -> float:
    """Pearson's correlation; NaN where one side's values are equal to a relative resolution."""
    centred: list[NDArray[np.float64]] = []
    for values in (x, y):
        spread = values - values.mean() if len(values) else values
        if not (np.abs(spread) > resolution * np.abs(values).max(initial=0)).any():
            return float("nan")
        centred.append(spread / np.linalg.norm(spread))
    return float(centred[0] @ centred[1])
