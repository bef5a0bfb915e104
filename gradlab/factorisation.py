r"""Does a gradient factor into who an agent is and what it saw?

Where the generator reads nothing but the agent's number, :math:`J_i` is the same for all its
samples and :math:`E_t[J_i^\top z_t] = J_i^\top E_t[z_t]`. A generator that reads the observation as
well (HyperMARL without gradient decoupling) has a Jacobian :math:`J_{i,t}` for every sample, and
:math:`E_t[J_{i,t}^\top z_t] \ne E_t[J_{i,t}]^\top E_t[z_t]`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from gradlab.checks import check
from gradlab.cluster_products import ClusterProducts
from gradlab.engine.accumulate import DEFAULT_BUDGET, gradient_moments
from gradlab.engine.clusters import Products
from gradlab.engine.moments import Moments
from gradlab.engine.part import Part, batch_axes
from gradlab.engine.plan import plan_for
from gradlab.engine.surrogate import Surrogate, Theta
from gradlab.parameters import ParameterLayout, owning_module

OBSERVATION = "observation"
"""Name of what a generator reads, if it does, in a batch."""

_AGENT, _PSI, _OFFSET, _WEIGHT = "agent/", "psi/", "offset/", "weight/"


@dataclass(frozen=True, kw_only=True, eq=False)
class Factorisation:
    """A gradient and its two factors' product.

    Attributes:
        moments: Sums over samples of the gradients z_t in theta-space.
        g: E_t[J_t^T z_t] of each agent.
        factored: E_t[J_t]^T E_t[z_t] of each agent.
        psi_layout: Names, shapes and layers of the trained parameters.
        products: If clusters are told apart, products of their sums of z_t ("theta"), of
            J_t^T z_t ("psi"), and of J_t^T E[z] ("jacobian"), whose spread is J's own noise.
    """

    moments: Moments
    g: Float[Tensor, "agent psi"]
    factored: Float[Tensor, "agent psi"]
    psi_layout: ParameterLayout
    products: dict[str, ClusterProducts]

    @property
    def z(self) -> Float[Tensor, "agent theta"]:
        """E_t[z_t] of each agent."""
        return self.moments.mean

    @property
    def theta_layout(self) -> ParameterLayout:
        """Names, shapes and layers of the policy parameters."""
        return self.moments.layout

    @property
    def gap(self) -> float:
        r"""|sum_i (g_i - factored_i)| / |sum_i g_i|; 0 if the gradient factors."""
        return _ratio((self.g - self.factored).sum(0), self.g.sum(0)).item()

    @property
    def gap_agent(self) -> Float[Tensor, " agent"]:
        """The same for each agent's own part."""
        return _ratio(self.g - self.factored, self.g)


def factorise(
    generator: nn.Module,
    surrogate: Surrogate,
    batch: Mapping[str, Tensor],
    *,
    mask: Bool[Tensor, "agent sample"] | None = None,
    context: Mapping[str, Tensor] | None = None,
    copy: Int[Tensor, " sample"] | None = None,
    coordinates: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> Factorisation:
    """Compare the mean of products with the product of means, by one backward pass for each.

    Args:
        generator: As for `gradlab.decompose`; one whose attribute `reads_observation` is true is
            called with agent numbers [n] and observations [n, ...] and returns parameters [n, ...],
            or [1, ...] where all share one. Where a sample is a segment of several steps, it may
            name in an attribute `made_by_step` those that it returns one of for each step,
            [n, step, ...]; a sample's J is then the mean of its steps'.
        surrogate: Loss of one sample, as for `gradlab.decompose`.
        batch: Tensors [agent, sample, ...] by name, what `surrogate` reads; "observation" is what
            the generator reads.
        mask: Which samples exist; all by default.
        context: Tensors [agent, ...] by name that each of the agent's samples holds as well.
        copy: As for `gradient_moments`.
        coordinates: As for `gradient_moments`.
        budget: Bytes that what is kept for one part's gradients may take.

    Returns:
        Both sides, and how far they lie apart.

    Raises:
        UsageError: If the generator reads an observation that the batch lacks, or as
            `gradient_moments` does.
    """
    agents, _ = batch_axes(batch)
    generate = _Generate(generator)
    check(
        OBSERVATION in batch or not generate.reads_observation,
        "batch",
        f"hold {OBSERVATION!r}, which the generator reads",
        sorted(batch),
    )
    psi = {n: p.detach() for n, p in generator.named_parameters() if p.requires_grad}
    psi_layout = ParameterLayout.of(psi, layer_of=getattr(generator, "layer_of", owning_module))
    like = next(iter(psi.values()))
    numbers = torch.arange(agents, device=like.device)
    shared = {_PSI + name: tensor[None] for name, tensor in psi.items()}
    held = {**(context or {}), _AGENT: numbers}
    first = {name: tensor[0, 0] for name, tensor in batch.items()} | {_AGENT: numbers[0]}
    with torch.no_grad():
        shapes = {name: t.shape for name, t in generate.mean(psi, first).items()}
    offsets = {_OFFSET + name: like.new_zeros(agents, *shape) for name, shape in shapes.items()}

    def whole(parameters: Theta, sample: dict[str, Tensor]) -> Tensor:
        theta = generate(_under(_PSI, parameters), sample)
        return surrogate(
            {name: tensor + parameters[_OFFSET + name] for name, tensor in theta.items()},
            {name: tensor for name, tensor in sample.items() if name != _AGENT},
        )

    # An offset's gradients have to be formed, which is no news to anyone.
    plan_for(whole, shared | offsets, Part(batch=batch, context=held), warn=False)
    both = gradient_moments(
        whole,
        shared | offsets,
        batch,
        mask=mask,
        context=held,
        copy=copy,
        coordinates=coordinates,
        budget=budget,
    )
    moments = _of_theta(both, shapes)
    z = moments.layout.unflatten(moments.mean.to(like.dtype))

    def product(parameters: Theta, sample: dict[str, Tensor]) -> Tensor:
        theta = generate.mean(_under(_PSI, parameters), sample)
        return torch.stack([(t * sample[_WEIGHT + n]).sum() for n, t in theta.items()]).sum()

    weights = {_WEIGHT + name: tensor for name, tensor in z.items()}
    plan_for(product, shared, Part(batch=batch, context=held | weights), warn=False)
    factored = gradient_moments(
        product, shared, batch, mask=mask, context=held | weights, copy=copy, budget=budget
    )
    products = {}
    if copy is not None:
        products = {
            "theta": ClusterProducts.of(
                Products.stacked(moments.parameter_products().values()),
                moments.layout,
                moments.copy_count,
            ),
            "psi": _psi_products(both, psi_layout),
            "jacobian": _psi_products(factored, psi_layout),
        }
    return Factorisation(
        moments=moments,
        g=both.mean[:, : psi_layout.size],
        factored=factored.mean,
        psi_layout=psi_layout,
        products=products,
    )


def reads_observation(generator: nn.Module) -> bool:
    """Whether a generator makes other parameters for every sample.

    Args:
        generator: As for `factorise`.

    Returns:
        Its attribute `reads_observation`, false if it has none.
    """
    return bool(getattr(generator, "reads_observation", False))


class _Generate:
    """One sample's policy parameters."""

    def __init__(self, generator: nn.Module) -> None:
        self.generator = generator
        self.reads_observation = reads_observation(generator)

    def __call__(self, psi: Theta, sample: Mapping[str, Tensor]) -> Theta:
        arguments = [sample[_AGENT][None]]
        if self.reads_observation:
            arguments.append(sample[OBSERVATION][None])
        theta: Theta = functional_call(self.generator, psi, tuple(arguments))
        return {name: tensor.squeeze(0) for name, tensor in theta.items()}

    def mean(self, psi: Theta, sample: Mapping[str, Tensor]) -> Theta:
        """The same, the mean over a sample's steps where it has several."""
        made: frozenset[str] = getattr(self.generator, "made_by_step", frozenset())
        steps = tuple(range(sample[OBSERVATION].dim() - 1)) if made else ()
        return {
            name: tensor.mean(steps) if steps and name in made else tensor
            for name, tensor in self(psi, sample).items()
        }


def _under(prefix: str, tensors: Theta) -> Theta:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _of_theta(both: Moments, shapes: Mapping[str, torch.Size]) -> Moments:
    """What belongs to the offsets, which stand for the policy parameters."""
    layout = ParameterLayout(
        shapes=dict(shapes), layer_of={name: owning_module(name) for name in shapes}
    )
    columns = [both.layout.layers.index(_OFFSET + layer) for layer in layout.layers]
    return replace(
        both,
        layout=layout,
        engines={name: both.engines[_OFFSET + name] for name in shapes},
        sum=both.sum[:, both.layout.size - layout.size :],
        squared_norm=both.squared_norm[:, columns],
        non_finite=both.non_finite[:, columns],
        first_non_finite=both.first_non_finite[:, columns],
        square=None if both.square is None else both.square[:, both.layout.size - layout.size :],
        copy_sums=both.copy_sums and {n: both.copy_sums[_OFFSET + n] for n in shapes},
    )


def _psi_products(moments: Moments, layout: ParameterLayout) -> ClusterProducts:
    """Products of what belongs to the trained parameters, which come first."""
    sums, totals = moments.by_copy(), layout.unflatten(moments.sum[:, : layout.size])
    found = Products.stacked(sums[_PSI + name].products(totals[name]) for name in layout.shapes)
    return ClusterProducts.of(found, layout, moments.copy_count)


def _ratio(difference: Tensor, whole: Tensor) -> Tensor:
    scale, size = (torch.linalg.vector_norm(t, dim=-1) for t in (whole, difference))
    ratio: Tensor = size / torch.where(scale > 0, scale, torch.ones_like(scale))
    return ratio
