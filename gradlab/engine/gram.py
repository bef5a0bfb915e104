"""Inner products between the gradients of single samples."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradlab.checks import check
from gradlab.engine.part import checked_part
from gradlab.engine.plan import Engine, planned_gradients
from gradlab.engine.surrogate import Surrogate
from gradlab.parameters import WHOLE, ParameterLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleGram:
    """Gram matrices of per-sample gradients.

    Attributes:
        products: Inner products by layer, and under "all" of whole gradients.
        agent: Agent of each row.
        sample: Number of each row's sample in the batch.
    """

    products: dict[str, Float[Tensor, "row row_other"]]
    agent: Int[Tensor, " row"]
    sample: Int[Tensor, " row"]


def sample_gram(
    surrogate: Surrogate,
    theta: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    samples: Int[Tensor, " chosen"],
    *,
    mask: Bool[Tensor, "agent sample"] | None = None,
    context: Mapping[str, Tensor] | None = None,
    engine: Engine = "auto",
) -> SampleGram:
    """Inner products between the per-sample gradients of some samples of all agents.

    The matrices have (agents x chosen samples)^2 entries: meant for a few hundred samples.

    Args:
        surrogate: As for `gradient_moments`.
        theta: As for `gradient_moments`.
        batch: As for `gradient_moments`.
        samples: Numbers of the chosen samples, the same of every agent.
        mask: Which samples exist; the rows of others are 0.
        context: As for `gradient_moments`.
        engine: As for `gradient_moments`.

    Returns:
        The matrices in the batch's precision, and whose gradient each row is.

    Raises:
        UsageError: If a number is out of range, or as `gradient_moments` does.
    """
    whole = checked_part(theta, batch, mask=mask, context=context)
    agents, total = whole.sizes
    numbers = samples.dtype == torch.int64 and samples.dim() == 1 and len(samples) > 0
    check(
        numbers and bool(((samples >= 0) & (samples < total)).all()),
        "samples",
        f"be numbers from 0 to {total - 1}, at least one",
        samples.tolist(),
    )
    layout = ParameterLayout.of(theta, batch_dims=1)
    rows = agents * len(samples)
    like = next(iter(theta.values())).detach()
    products = {layer: like.new_zeros(rows, rows) for layer in layout.layers}
    found = planned_gradients(surrogate, theta, whole.picked(samples), engine)
    for name, gradient in found.items():
        products[layout.layer_of[name]] += gradient.gram()
    return SampleGram(
        products={WHOLE: torch.stack(list(products.values())).sum(0), **products},
        agent=torch.arange(agents, device=samples.device).repeat_interleave(len(samples)),
        sample=samples.repeat(agents),
    )
