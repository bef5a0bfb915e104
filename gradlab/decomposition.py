r"""A shared gradient taken apart into what each agent saw and who each agent is.

With agent i's policy parameters made by a generator, :math:`\theta_i = h_\psi(i)`, and the loss
:math:`L = \sum_i L_i(\theta_i)`, the gradient in the trained parameters is

.. math:: \nabla_\psi L = \sum_i J_i^\top Z_i, \quad
          Z_i = \nabla_{\theta_i} L_i, \quad J_i = \partial h_\psi(i) / \partial \psi

(Tessera et al., "HyperMARL", NeurIPS 2025, eq. 4). :math:`Z_i` carries all the sampling noise,
:math:`J_i` none.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradlab.cluster_products import CLUSTERS, ClusterProducts, pooled
from gradlab.contributions import (
    agent_numbers,
    contributions,
    policy_parameters,
    psi_products,
    row_products,
)
from gradlab.engine.accumulate import DEFAULT_BUDGET, gradient_moments
from gradlab.engine.clusters import Products
from gradlab.engine.moments import Moments
from gradlab.engine.part import Part, batch_axes, in_precision
from gradlab.engine.per_sample import PerSample, Rows
from gradlab.engine.plan import Engine
from gradlab.engine.processes import Group, Shared
from gradlab.engine.surrogate import Surrogate, Theta, explained
from gradlab.estimates import Estimates
from gradlab.factorisation import factorise, reads_observation
from gradlab.losses import sample_losses
from gradlab.parameters import ParameterLayout, owning_module


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """The parts of one gradient of a loss that is minimised.

    The loss is the sum over agents of the mean over the agent's samples: the number of agents
    times the mean over all samples, where all have equally many.

    Attributes:
        moments: Sums over samples of the per-sample gradients in theta-space.
        contributions: J_i^T Z_i by trained parameter, in the form that takes least memory; their
            samples are the agents (of a single "agent").
        factorisation_gap: How far the gradient is from a product of an agent-conditioned and an
            observation-conditioned factor, as for `gradlab.factorise`; 0 for a generator that does
            not read the observation.
        residual: Norm of `total` minus plain autograd's gradient, over the latter's norm; NaN if
            it was not asked for.
        theta_layout: Names, shapes and layers of the policy parameters.
        psi_layout: Names, shapes and layers of the trained parameters.
        products: If clusters are told apart, products of agents' sums over them: of the gradients
            in theta-space ("theta") and of what J_i makes of them ("psi"); where the generator
            reads the observation also of J_t^T Z ("jacobian"), whose spread is J's own noise.
        copies: Number of environment copies that the clusters hold, 0 if none are told apart.
    """

    moments: Moments
    contributions: dict[str, PerSample]
    factorisation_gap: float
    residual: float
    theta_layout: ParameterLayout
    psi_layout: ParameterLayout
    products: dict[str, ClusterProducts]
    copies: int

    @property
    def agents(self) -> int:
        """Number of agents."""
        return len(self.moments.count)

    @property
    def z(self) -> Float[Tensor, "agent theta"]:
        """Z_i, the gradient of agent i's mean loss with respect to its policy parameters."""
        return self.moments.mean

    @property
    def g(self) -> Float[Tensor, "agent psi"]:
        """g_i = J_i^T Z_i, agent i's contribution to the gradient of the trained parameters."""
        return self.psi_layout.flatten({n: p.rows()[0] for n, p in self.contributions.items()})

    @property
    def total(self) -> Float[Tensor, " psi"]:
        """The sum of all g_i, formed without them."""
        return self.psi_layout.flatten({n: p.sum()[0] for n, p in self.contributions.items()})

    @cached_property
    def estimates(self) -> Estimates[str] | None:
        """What the products say of the true gradients; None if clusters are not told apart."""
        return Estimates(self.products) if self.products else None

    def gram_theta(self) -> dict[str, Float[Tensor, "agent agent_other"]]:
        """Inner products Z_i . Z_k by policy layer, in float64."""
        return {layer: part @ part.mT for layer, part in self.theta_layout.split_by_layer(self.z)}

    def gram_psi(self) -> dict[str, Float[Tensor, "agent agent_other"]]:
        """Inner products g_i . g_k by layer, in float64; no g_i is formed where factors do."""
        return dict(self._gram_psi)

    @cached_property
    def _gram_psi(self) -> dict[str, Tensor]:
        layout = self.psi_layout
        products = row_products(self.contributions)
        grams = products.new_zeros(len(layout.layers), *products.shape[1:])
        grams.index_add_(0, layout.layer_index.to(products.device), products)
        return dict(zip(layout.layers, grams, strict=True))


def decompose(
    generator: nn.Module,
    surrogate: Surrogate,
    batch: Mapping[str, Tensor],
    *,
    mask: Bool[Tensor, "agent sample"] | None = None,
    context: Mapping[str, Tensor] | None = None,
    copy: Int[Tensor, " sample"] | None = None,
    clusters: int = CLUSTERS,
    coordinates: bool = False,
    check: int | None = None,
    precise: nn.Module | None = None,
    engine: Engine = "auto",
    budget: int = DEFAULT_BUDGET,
    group: Group | None = None,
) -> Decomposition:
    """Split the gradient of a surrogate loss by agent, and each part into J_i and Z_i.

    Touches no parameter, `.grad`, buffer or random state.

    Args:
        generator: Makes policy parameters: called with agent numbers (int64, [agent]) it returns
            tensors [agent, ...] by name, or [1, ...] where all agents share the tensor. Its
            parameters that require a gradient are the trained ones. An optional method
            `layer_of(parameter_name)` names the layer of a trained parameter. If an attribute
            `reads_observation` is true it is called with agent numbers [n] and observations
            [n, ...]; g_i is then the mean of J_t^T z_t. See `gradlab.factorise`.
        surrogate: Loss of one sample, given one agent's parameters (without the agent axis) and
            the sample (without agent and sample axes). Must work under `torch.func.vmap`.
        batch: Tensors [agent, sample, ...] by name, what `surrogate` reads.
        mask: Which samples exist; all by default. An agent that has left its episode has none: its
            means are over those that it has, and what stands in the others' place, be it NaN,
            changes nothing. Without any sample its Z_i and g_i are sums of nothing, 0, and all that
            is estimated from them is NaN.
        context: Tensors [agent, ...] by name that each of the agent's samples holds as well.
        copy: The environment copy that each sample comes from. If given, estimates can leave out
            products within a copy, and have intervals. Samples that share anything, such as the
            same environment run twice, belong to the same copy.
        clusters: Pool the copies into at most this many clusters: it costs less, and intervals from
            more are hardly narrower.
        coordinates: Whether the moments hold sums of squared coordinates.
        check: On how many samples of each agent, the first ones, to compute the residual; by
            default on all, which costs an ordinary gradient of the batch; 0 leaves it out.
        precise: The generator in float64. If given, J_i is applied and the residual is computed in
            float64: near convergence agents' gradients cancel, and in float32 the residual would
            measure that instead of the decomposition.
        engine: As for `gradient_moments`.
        budget: As for `gradient_moments`.
        group: Processes that call this with the same: each takes the gradients of some of the
            clusters, or samples, the moments are added up, and all return the same. Of a generator
            that reads the observation each takes all.

    Returns:
        Z_i and its moments (of several processes without the sums by copy), g_i, their sum, and the
        residual against plain autograd.

    Raises:
        UsageError: If the batch's leading axes differ, or the surrogate's gradient cannot be taken
            per sample.
    """
    agents, samples = batch_axes(batch)
    few = samples if check is None else min(check, samples)
    whole = Part(batch=batch, context=context or {}, mask=mask)
    last = precise or generator
    psi = {n: p for n, p in last.named_parameters() if p.requires_grad}
    layout = ParameterLayout.of(psi, layer_of=getattr(generator, "layer_of", owning_module))
    cluster = None if copy is None else pooled(copy, clusters)
    settings: dict[str, Any] = {"copy": cluster, "coordinates": coordinates, "budget": budget}
    shared = None
    if not reads_observation(generator):
        settings["engine"] = engine
        shared = Shared.of(group, samples, cluster)
    first = whole if few == samples and precise is None else _first(whole, few, last)
    # Made once for all that needs them: a hypernetwork costs about as much as what it makes.
    theta = None
    if not reads_observation(generator):
        theta = policy_parameters(last, agents, graph=few > 0)
    checking = {"plain": True} if few and theta is not None else {}
    if first is whole:
        settings |= checking
    own = whole
    if shared is not None:
        own = whole.picked(shared.samples)
        settings["copy"] = None if cluster is None else cluster[shared.samples]
    sides = [_take_apart(generator, surrogate, own, theta, layout, settings)]
    after = None
    if shared is not None:
        sides[0].moments, after = shared.added_up(sides[0].moments)
    if few and first is not whole:
        sides.append(_take_apart(last, surrogate, first, theta, layout, checking))
    if sides[0].pulled is None:
        # One backward pass for both: its cost is that of its many small operations.
        means = [side.moments.layout.unflatten(side.moments.mean) for side in sides]
        stacked = {n: torch.cat([z[n] for z in means]) for n in means[0]}
        both = contributions(last, stacked, agent_numbers(last, agents).repeat(len(sides)))
        for number, side in enumerate(sides):
            of_side = slice(number * agents, (number + 1) * agents)
            side.pulled = {name: part.some(of_side) for name, part in both.items()}
    residual = float("nan")
    if few:
        opposite = (
            _opposite_gradient(psi, last, surrogate, first)
            if theta is None
            else _through_generator(psi, theta, sides[-1].moments)
        )
        residual = _residual(sides[-1].pulled or {}, opposite)
    products = sides[0].products
    if copy is not None and not products:
        moments, pulled = sides[0].moments, sides[0].pulled or {}
        by_name = moments.parameter_products(after)
        of_psi = psi_products(generator, moments, by_name, pulled, budget, after)
        of_theta = Products.stacked(by_name.values())
        if shared is not None:
            of_theta, of_psi = shared.joined(of_theta), shared.joined(of_psi)
            sides[0].moments = replace(moments, copy_sums=None)
        products = {
            "theta": ClusterProducts.of(of_theta, moments.layout, moments.copy_count),
            "psi": ClusterProducts.of(of_psi, layout, moments.copy_count),
        }
    return Decomposition(
        moments=sides[0].moments,
        contributions=sides[0].pulled or {},
        factorisation_gap=sides[0].gap,
        residual=residual,
        theta_layout=sides[0].moments.layout,
        psi_layout=layout,
        products=products,
        copies=0 if copy is None else len(copy.unique()),
    )


@dataclass
class _Side:
    """What one batch says: moments in theta-space, and (later) what J_i^T makes of their means."""

    moments: Moments
    pulled: dict[str, PerSample] | None
    gap: float
    products: dict[str, ClusterProducts] = field(default_factory=dict)


def _take_apart(
    generator: nn.Module,
    surrogate: Surrogate,
    part: Part,
    theta: Theta | None,
    psi_layout: ParameterLayout,
    settings: Mapping[str, Any],
) -> _Side:
    what = {"mask": part.mask, "context": part.context, **settings}
    if theta is None:
        parts = factorise(generator, surrogate, part.batch, **what)
        of_psi = psi_layout.unflatten(parts.g)
        pulled: dict[str, PerSample] = {name: Rows(g[None]) for name, g in of_psi.items()}
        return _Side(parts.moments, pulled, parts.gap, parts.products)
    dtype = next(generator.parameters()).dtype
    fixed = in_precision({name: tensor.detach() for name, tensor in theta.items()}, dtype)
    return _Side(gradient_moments(surrogate, fixed, part.batch, **what), None, 0.0)


def _first(part: Part, samples: int, generator: nn.Module) -> Part:
    """The first samples of every agent, in a generator's precision."""
    dtype = next(generator.parameters()).dtype
    part = part.span(0, samples)
    batch, context = in_precision(part.batch, dtype), in_precision(part.context, dtype)
    return replace(part, batch=batch, context=context)


def _opposite_gradient(
    psi: Mapping[str, Tensor], generator: nn.Module, surrogate: Surrogate, part: Part
) -> dict[str, Tensor]:
    """Minus the gradient in the trained parameters by one ordinary backward pass."""
    part = part.filled()
    weights = 1 / part.counts().clamp(min=1).to(next(iter(psi.values())).dtype)
    with torch.enable_grad(), explained():
        losses = sample_losses(generator, psi, surrogate, part)
        total = (losses.sum(1) * -weights[:, 0]).sum()
        found = torch.autograd.grad(total, list(psi.values()), materialize_grads=True)
    return dict(zip(psi, found, strict=True))


def _through_generator(
    psi: Mapping[str, Tensor], theta: Theta, moments: Moments
) -> dict[str, Tensor]:
    """The same, where the pass as far as the policy parameters was made with the moments."""
    assert moments.plain is not None
    arrived = moments.layout.unflatten(moments.plain / -moments.count.clamp(min=1)[:, None])
    made = {name: tensor for name, tensor in theta.items() if tensor.requires_grad}
    gradients = [
        (arrived[name] if len(tensor) > 1 else arrived[name].sum(0, keepdim=True)).to(tensor.dtype)
        for name, tensor in made.items()
    ]
    with explained():
        found = torch.autograd.grad(
            list(made.values()), list(psi.values()), gradients, materialize_grads=True
        )
    return dict(zip(psi, found, strict=True))


def _residual(pulled: Mapping[str, PerSample], opposite: Mapping[str, Tensor]) -> float:
    """How far the parts' sum is from plain autograd's gradient, over the latter's length.

    Minus the plain gradient is written over: psi may be large.
    """
    scale = torch.stack(torch._foreach_norm(list(opposite.values()))).norm()
    held = Counter(tensor.untyped_storage().data_ptr() for tensor in opposite.values())
    differences = []
    for name, tensor in opposite.items():
        alone = held[tensor.untyped_storage().data_ptr()] == 1  # autograd may hand one out twice
        difference = (
            tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)
        )
        pulled[name].add_sums(difference[None, None])
        differences.append(difference)
    distance = torch.stack(torch._foreach_norm(differences)).norm()
    return float(distance / scale if scale > 0 else distance)
