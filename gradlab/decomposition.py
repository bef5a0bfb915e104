r"""A shared gradient taken apart into what each agent saw and who each agent is.

With agent i's policy parameters made by a generator, :math:`\theta_i = h_\psi(i)`, and the loss
:math:`L = \sum_i L_i(\theta_i)`, the gradient in the trained parameters is

.. math:: \nabla_\psi L = \sum_i J_i^\top Z_i, \quad
          Z_i = \nabla_{\theta_i} L_i, \quad J_i = \partial h_\psi(i) / \partial \psi

(Tessera et al., "HyperMARL", NeurIPS 2025, eq. 4). :math:`Z_i` carries all the sampling noise,
:math:`J_i` none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from gradlab.checks import UsageError, check
from gradlab.parameters import ParameterLayout, owning_module

Theta = dict[str, Tensor]
Surrogate = Callable[[Theta, dict[str, Tensor]], Tensor]
"""A per-sample loss: one agent's parameters and one sample in, a scalar that is minimised out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """The parts of one gradient of a loss that is minimised.

    The loss is the sum over agents of the mean over the agent's samples: the number of agents
    times the mean over all samples.

    Attributes:
        z: Z_i, gradient of agent i's mean loss with respect to its policy parameters.
        g: g_i = J_i^T Z_i, agent i's contribution to the gradient of the trained parameters.
        total: The sum of all g_i.
        residual: Norm of `total` minus plain autograd's gradient, over the latter's norm.
        theta_layout: Names, shapes and layers of the policy parameters.
        psi_layout: Names, shapes and layers of the trained parameters.
    """

    z: Float[Tensor, "agent theta"]
    g: Float[Tensor, "agent psi"]
    total: Float[Tensor, " psi"]
    residual: float
    theta_layout: ParameterLayout
    psi_layout: ParameterLayout


def decompose(
    generator: nn.Module, surrogate: Surrogate, batch: Mapping[str, Tensor]
) -> Decomposition:
    """Split the gradient of a surrogate loss by agent, and each part into J_i and Z_i.

    Touches no parameter, `.grad`, buffer or random state.

    Args:
        generator: Makes policy parameters: called with agent numbers (int64, [agent]) it returns
            tensors [agent, ...] by name, or [1, ...] where all agents share the tensor. Its
            parameters that require a gradient are the trained ones. An optional method
            `layer_of(parameter_name)` names the layer of a trained parameter.
        surrogate: Loss of one sample, given one agent's parameters (without the agent axis) and
            the sample (without agent and sample axes). Must work under `torch.func.vmap`.
        batch: Tensors [agent, sample, ...] by name, what `surrogate` reads.

    Returns:
        Z_i, g_i, their sum, and the residual against plain autograd.

    Raises:
        UsageError: If the batch's leading axes differ, or the surrogate does not return one
            scalar for one sample.
    """
    agents, _ = batch_axes(batch)
    psi = {n: p.detach() for n, p in generator.named_parameters() if p.requires_grad}
    numbers = torch.arange(agents, device=next(iter(batch.values())).device)

    def parameters_of(psi: dict[str, Tensor], agent: Int[Tensor, ""]) -> Theta:
        theta: Theta = functional_call(generator, psi, (agent[None],))
        return {name: tensor.squeeze(0) for name, tensor in theta.items()}

    def agent_gradient(theta: Theta, samples: dict[str, Tensor]) -> Theta:
        z: Theta = grad(lambda theta: mean_loss(surrogate, theta, samples))(theta)
        return z

    def contribution(agent: Int[Tensor, ""], z: Theta) -> dict[str, Tensor]:
        (g,) = vjp(lambda psi: parameters_of(psi, agent), psi)[1](z)
        return g  # type: ignore[no-any-return]

    theta = policy_parameters(generator, agents)
    z = vmap(agent_gradient)(theta, dict(batch))
    g = vmap(contribution)(numbers, z)
    theta_layout = ParameterLayout.of(theta, batch_dims=1)
    psi_layout = ParameterLayout.of(psi, layer_of=getattr(generator, "layer_of", owning_module))
    flat_g = psi_layout.flatten(g)
    total = flat_g.sum(0)
    reference = psi_layout.flatten(_plain_gradient(generator, surrogate, batch, psi))
    scale = reference.norm().item()
    difference = (total - reference).norm().item()
    return Decomposition(
        z=theta_layout.flatten(z),
        g=flat_g,
        total=total,
        residual=difference / scale if scale > 0 else difference,
        theta_layout=theta_layout,
        psi_layout=psi_layout,
    )


def policy_parameters(generator: nn.Module, agents: int) -> Theta:
    """Generate every agent's policy parameters, detached.

    Args:
        generator: As for `decompose`.
        agents: Number of agents.

    Returns:
        Tensors [agent, ...] by name; those that agents share are repeated as views.
    """
    device = next((p.device for p in generator.parameters()), None)
    with torch.no_grad():
        theta = generator(torch.arange(agents, device=device))
    return {
        name: tensor.detach().expand(agents, *tensor.shape[1:]) for name, tensor in theta.items()
    }


def mean_loss(surrogate: Surrogate, theta: Theta, samples: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Mean of a per-sample loss over one agent's samples.

    Args:
        surrogate: The per-sample loss.
        theta: One agent's policy parameters, without an agent axis.
        samples: Tensors [sample, ...] by name.

    Returns:
        The mean loss.

    Raises:
        UsageError: If the surrogate's value for one sample is not a scalar.
    """
    losses = vmap(surrogate, in_dims=(None, 0))(theta, samples)
    if losses.dim() != 1:
        raise UsageError(
            "`surrogate` must return one scalar for one sample. Got shape "
            f"{tuple(losses.shape[1:])}; sum or average over the extra axes."
        )
    return losses.mean()


def batch_axes(batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of agents and of samples in a batch.

    Args:
        batch: Tensors [agent, sample, ...] by name.

    Returns:
        Both numbers.

    Raises:
        UsageError: If the tensors disagree, or there is nothing in them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    leading = {shape[:2] for shape in shapes.values()}
    check(
        len(leading) == 1 and all(len(shape) == 2 and 0 not in shape for shape in leading),
        "batch",
        "hold tensors with the same two leading axes [agent, sample], neither of size 0",
        shapes,
    )
    ((agents, samples),) = leading
    return agents, samples


def _plain_gradient(
    generator: nn.Module,
    surrogate: Surrogate,
    batch: Mapping[str, Tensor],
    psi: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The same gradient by one ordinary backward pass, with nothing taken apart."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in psi.items()}
    agents, _ = batch_axes(batch)
    numbers = torch.arange(agents, device=next(iter(batch.values())).device)
    theta = functional_call(generator, leaves, (numbers,))
    theta = {name: tensor.expand(agents, *tensor.shape[1:]) for name, tensor in theta.items()}
    with torch.enable_grad():
        losses = vmap(lambda t, samples: mean_loss(surrogate, t, samples))(theta, dict(batch))
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))
