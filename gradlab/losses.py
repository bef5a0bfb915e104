"""Per-sample losses as a function of the trained parameters, nothing taken apart."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gradlab.engine.part import Part, masked
from gradlab.engine.rewrites import Rewrites
from gradlab.engine.surrogate import Surrogate, Theta, checked_loss, explained
from gradlab.factorisation import OBSERVATION, reads_observation


def sample_losses(
    generator: nn.Module, psi: Mapping[str, Tensor], surrogate: Surrogate, part: Part
) -> Float[Tensor, "agent sample"]:
    """Every sample's loss at given values of the trained parameters.

    Args:
        generator: As for `gradlab.decompose`.
        psi: What stands in place of its trained parameters, by name.
        surrogate: As for `gradlab.decompose`.
        part: The samples.

    Returns:
        The losses, with a graph as far as `psi` has one; 0 for a sample that does not exist.

    Raises:
        UsageError: If the surrogate cannot be called per sample.
    """
    agents, samples = part.sizes
    numbers = torch.arange(agents, device=next(iter(psi.values())).device)
    if not reads_observation(generator):
        with explained():
            theta = functional_call(generator, dict(psi), (numbers,))
        return losses_under(theta, surrogate, part)
    with explained():
        observation = part.batch[OBSERVATION].flatten(0, 1)
        repeated = numbers.repeat_interleave(samples)
        theta = functional_call(generator, dict(psi), (repeated, observation))
    theta = {
        name: tensor.expand(agents * samples, *tensor.shape[1:]).unflatten(0, (agents, samples))
        for name, tensor in theta.items()
    }
    return losses_under(theta, surrogate, part, per_sample=True)


def losses_under(
    theta: Mapping[str, Tensor], surrogate: Surrogate, part: Part, *, per_sample: bool = False
) -> Float[Tensor, "agent sample"]:
    """Every sample's loss under given policy parameters.

    Args:
        theta: Policy parameters by name, [agent, ...], or [1, ...] where the agents share one.
        surrogate: As for `gradlab.decompose`.
        part: The samples.
        per_sample: Whether each sample has parameters of its own, [agent, sample, ...].

    Returns:
        The losses, with a graph as far as `theta` has one; 0 for a sample that does not exist.

    Raises:
        UsageError: If the surrogate cannot be called per sample.
    """
    agents, _ = part.sizes

    def loss(theta: Theta, sample: dict[str, Tensor], context: dict[str, Tensor]) -> Tensor:
        return checked_loss(surrogate, theta, {**sample, **context}, Rewrites())

    each = {name: tensor.expand(agents, *tensor.shape[1:]) for name, tensor in theta.items()}
    with explained():
        losses = vmap(vmap(loss, in_dims=(0 if per_sample else None, 0, None)))(
            each, dict(part.batch), dict(part.context)
        )
    return masked(losses, part.mask)
