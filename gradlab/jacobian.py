r"""The agent-conditioned part of a gradient, :math:`J_i = \partial \theta_i / \partial \psi`.

Only ever applied to vectors, by reverse mode (:math:`J_i^\top v`) and forward mode
(:math:`J_i u`); as large as (theta x psi), it is never formed.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from gradlab.checks import check
from gradlab.parameters import ParameterLayout, owning_module

Named = dict[str, Tensor]


class Jacobian:
    """Every agent's Jacobian of its policy parameters with respect to the trained ones.

    A snapshot: later changes of the generator's parameters do not show. Takes part in no graph and
    touches no parameter, `.grad`, buffer or random state.

    Attributes:
        agents: Number of agents.
        theta_layout: Names, shapes and layers of the policy parameters.
        psi_layout: Names, shapes and layers of the trained parameters.
    """

    def __init__(self, generator: nn.Module, agents: int) -> None:
        """Look at a generator.

        Args:
            generator: Makes policy parameters, as for `gradlab.decompose`.
            agents: Number of agents.

        Raises:
            UsageError: If there is no agent, or nothing to train.
        """
        check(agents >= 1, "agents", "be at least 1", agents)
        self.agents = agents
        self._generator = generator
        self._psi = {
            name: p.detach().clone() for name, p in generator.named_parameters() if p.requires_grad
        }
        check(len(self._psi) > 0, "generator", "have parameters that require a gradient", [])
        like = next(iter(self._psi.values()))
        self._numbers = torch.arange(agents, device=like.device)
        with torch.no_grad():
            theta = self._theta(self._psi, self._numbers[0])
        self.theta_layout = ParameterLayout.of(theta)
        self.psi_layout = ParameterLayout.of(
            self._psi, layer_of=getattr(generator, "layer_of", owning_module)
        )

    def vjp(self, vectors: Float[Tensor, "agent theta"]) -> Float[Tensor, "agent psi"]:
        r"""Each agent's :math:`J_i^\top v_i`: a gradient in theta brought to psi.

        Args:
            vectors: One vector for each agent.

        Returns:
            One vector for each agent; `vjp_sum` takes less memory where the sum is wanted.
        """
        of_agents = self.theta_layout.unflatten(self._checked(vectors, "theta"))
        return self.psi_layout.flatten(vmap(self._pull)(self._numbers, of_agents))

    def vjp_sum(self, vectors: Float[Tensor, "agent theta"]) -> Float[Tensor, " psi"]:
        r"""The sum over agents :math:`\sum_i J_i^\top v_i`, in one backward pass.

        Args:
            vectors: One vector for each agent.

        Returns:
            The sum; no agent's own part is formed.
        """
        of_agents = self.theta_layout.unflatten(self._checked(vectors, "theta"))

        def every(psi: Named) -> Named:
            theta: Named = functional_call(self._generator, psi, (self._numbers,))
            return {name: t.expand(self.agents, *t.shape[1:]) for name, t in theta.items()}

        (total,) = vjp(every, self._psi)[1](of_agents)
        return self.psi_layout.flatten(total)

    def jvp(self, vectors: Float[Tensor, "*agent psi"]) -> Float[Tensor, "agent theta"]:
        r"""Each agent's :math:`J_i u_i`: how its policy moves when the trained parameters do.

        Args:
            vectors: One vector for each agent, or a single one for all.

        Returns:
            One vector for each agent.
        """
        vectors = self._checked(vectors, "psi")
        shared = vectors.dim() == 1
        moved = vmap(self._push, in_dims=(0, None if shared else 0))(
            self._numbers, self.psi_layout.unflatten(vectors)
        )
        return self.theta_layout.flatten(moved)

    def couple(
        self, agent: int, other: int, vector: Float[Tensor, " theta"]
    ) -> Float[Tensor, " theta"]:
        r"""Apply the coupling :math:`K_{ik} = J_i J_k^\top`: how a step of agent k moves agent i.

        Args:
            agent: Agent i, who is moved.
            other: Agent k, whose gradient it is.
            vector: A vector in agent k's theta-space.

        Returns:
            A vector in agent i's theta-space.

        Raises:
            UsageError: If there is no such agent.
        """
        pulled = self._pull(self._number(other, "other"), self.theta_layout.unflatten(vector))
        return self.theta_layout.flatten(self._push(self._number(agent, "agent"), pulled))

    def singular_values(self, agent: int, count: int = 6, *, seed: int = 0) -> NDArray[np.float64]:
        """The largest singular values of an agent's Jacobian.

        By a Lanczos method on products with J_i and its transpose (`scipy.sparse.linalg.svds`).

        Args:
            agent: Which agent.
            count: How many, fewer than theta's and psi's sizes.
            seed: Of the starting vector.

        Returns:
            The values, largest first.

        Raises:
            UsageError: If there is no such agent, or not that many values.
        """
        number = self._number(agent, "agent")
        shape = (self.theta_layout.size, self.psi_layout.size)
        check(1 <= count < min(shape), "count", f"be from 1 to {min(shape) - 1}", count)
        start = np.random.default_rng(seed).standard_normal(min(shape))

        def applied(
            function: Callable[[Tensor, Named], Named], into: ParameterLayout, of: ParameterLayout
        ) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
            like = next(iter(self._psi.values()))

            def apply(vector: NDArray[np.float64]) -> NDArray[np.float64]:
                given = torch.from_numpy(np.ravel(vector)).to(like)
                result = into.flatten(function(number, of.unflatten(given)))
                return result.double().cpu().numpy()

            return apply

        operator = LinearOperator(
            shape,
            matvec=applied(self._push, self.theta_layout, self.psi_layout),
            rmatvec=applied(self._pull, self.psi_layout, self.theta_layout),
            dtype=np.float64,
        )
        values = svds(operator, k=count, v0=start, return_singular_vectors=False)
        return np.sort(np.asarray(values, dtype=np.float64))[::-1]

    def _theta(self, psi: Named, agent: Int[Tensor, ""]) -> Named:
        theta: Named = functional_call(self._generator, psi, (agent[None],))
        return {name: tensor.squeeze(0) for name, tensor in theta.items()}

    def _pull(self, agent: Int[Tensor, ""], vector: Named) -> Named:
        pulled: Named
        (pulled,) = vjp(lambda psi: self._theta(psi, agent), self._psi)[1](vector)
        return pulled

    def _push(self, agent: Int[Tensor, ""], vector: Named) -> Named:
        pushed: Named = jvp(lambda psi: self._theta(psi, agent), (self._psi,), (vector,))[1]
        return pushed

    def _number(self, agent: int, name: str) -> Int[Tensor, ""]:
        check(0 <= agent < self.agents, name, f"be from 0 to {self.agents - 1}", agent)
        return self._numbers[agent]

    def _checked(self, vectors: Tensor, space: str) -> Tensor:
        size = self.theta_layout.size if space == "theta" else self.psi_layout.size
        allowed = [(self.agents, size)] + ([(size,)] if space == "psi" else [])
        check(
            tuple(vectors.shape) in allowed,
            "vectors",
            f"have shape {' or '.join(map(str, allowed))}",
            tuple(vectors.shape),
        )
        return vectors
