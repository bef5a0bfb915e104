"""What generators make of their parameters, made once, and gradients on their way back."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, vmap

from trainers.generators.generator import Generator
from trainers.networks import Theta


class Parameters:
    """What a generator makes, made once; gradients are collected before they go through it."""

    def __init__(self, generator: Generator) -> None:
        """Make it.

        Args:
            generator: Makes all agents' parameters.
        """
        self._generator = generator
        self._made: Theta = {} if generator.reads_observation else self.make()
        self._leaves = {name: x.detach().requires_grad_() for name, x in self._made.items()}

    def make(self, observation: Tensor | None = None) -> Theta:
        """Make them, with the graph of how.

        Args:
            observation: What is seen, if the generator reads it.

        Returns:
            As `Generator.policy_for`.
        """
        if observation is None:
            return self._generator.all_agents()
        return self._generator.policy_for(observation)

    def of(self, observation: Float[Tensor, "agent sample *step obs"]) -> Theta:
        """Parameters for samples.

        Args:
            observation: What is seen in them.

        Returns:
            As `Generator.policy_for`.
        """
        if self._generator.reads_observation:
            return self.make(observation)
        return self._leaves

    def backward(self) -> list[Tensor]:
        """Take the gradients that were collected back to what is trained.

        Returns:
            Of what the sum over all processes has to be put in their place, before `settle`.
        """
        found = {name: x.grad for name, x in self._leaves.items() if self._made[name].requires_grad}
        if found:
            torch.autograd.backward([self._made[name] for name in found], [*found.values()])
        return [p.grad for p in self._generator.parameters() if p.grad is not None]

    def settle(self) -> None:
        """Make of what `backward` returned the gradient of what is trained."""


class AgentParameters(Parameters):
    r"""The same, with every agent's gradient kept apart.

    Each agent's parameters are made of a copy of what is trained,
    :math:`\theta_i = h(\psi_i, i)` at :math:`\psi_i = \psi`. The gradient of the sum of all losses
    with respect to the copy :math:`\psi_i` is then agent i's gradient, in one backward pass for all
    agents: the rows of the Jacobian [agent, psi]. Their sum is the plain gradient.
    """

    def __init__(
        self,
        generator: Generator,
        aggregate: Callable[[Float[Tensor, "agent psi"]], Float[Tensor, " psi"]],
    ) -> None:
        """Make them.

        Args:
            generator: Makes all agents' parameters.
            aggregate: Makes one gradient of the agents', in float64.
        """
        self._aggregate = aggregate
        self._trained = {n: p for n, p in generator.named_parameters() if p.requires_grad}
        self._copies = {
            name: parameter.detach().expand(generator.agents, *parameter.shape).requires_grad_()
            for name, parameter in self._trained.items()
        }
        super().__init__(generator)

    def make(self, observation: Tensor | None = None) -> Theta:
        """See `Parameters.make`; all tensors have a leading axis [agent]."""
        generator = self._generator

        def of_agent(psi: Theta, agent: Int[Tensor, ""], *seen: Tensor) -> Theta:
            agents = agent.expand(len(seen[0]) if seen else 1)
            theta: Theta = functional_call(generator, psi, (agents, *seen))
            return {n: t if n in generator.made_by_step else t[0] for n, t in theta.items()}

        agents = torch.arange(generator.agents)
        read = () if observation is None else (observation,)
        made: Theta = vmap(of_agent)(self._copies, agents, *read)
        return made

    def backward(self) -> list[Tensor]:
        """See `Parameters.backward`: the agents' gradients."""
        super().backward()
        self._rows = torch.cat(
            [
                (torch.zeros_like(copy) if copy.grad is None else copy.grad).flatten(1).double()
                for copy in self._copies.values()
            ],
            dim=1,
        )
        return [self._rows]

    def settle(self) -> None:
        """Make one gradient of the agents', and take it to what is trained."""
        gradient = self._aggregate(self._rows)
        sizes = [parameter.numel() for parameter in self._trained.values()]
        for parameter, part in zip(self._trained.values(), gradient.split(sizes), strict=True):
            # As the parameter lies in memory, which fused Adam takes for granted.
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))
