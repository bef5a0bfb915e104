r"""The agent-conditioned part of a gradient, :math:`J_i = \partial \theta_i / \partial \psi`.

Only ever applied to vectors, by reverse mode (:math:`J_i^\top v`) and forward mode
(:math:`J_i u`); as large as (theta x psi), it is never formed.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from gradlab.checks import check
from gradlab.parameters import ParameterLayout, owning_module

Named = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Jacobian:
    """Every agent's Jacobian of its policy parameters with respect to the trained ones.

    A snapshot: later changes of the generator's parameters and buffers do not show. Takes part in
    no graph and touches no parameter, `.grad`, buffer or random state. Results have the
    generator's dtype and device, and vectors are brought to them.

    Attributes:
        generator: Makes policy parameters, as for `gradlab.decompose`.
        agents: Number of agents.
        theta_layout: Names, shapes and layers of the policy parameters.
        psi_layout: Names, shapes and layers of the trained parameters: those that require a
            gradient.

    Raises:
        UsageError: If there is no agent, nothing to train, or a J of its own for each sample.
    """

    generator: nn.Module = field(repr=False)
    agents: int
    theta_layout: ParameterLayout = field(init=False, repr=False)
    psi_layout: ParameterLayout = field(init=False, repr=False)
    _psi: Named = field(init=False, repr=False)
    _fixed: Named = field(init=False, repr=False)
    _numbers: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Take the snapshot."""
        generator, agents = self.generator, self.agents
        check(agents >= 1, "agents", "be at least 1", agents)
        check(
            not getattr(generator, "reads_observation", False),
            "generator",
            "not read the observation, which gives it another J_i for each sample",
            type(generator).__name__,
        )
        state = {**dict(generator.named_parameters()), **dict(generator.named_buffers())}
        psi = {name: t.detach().clone() for name, t in state.items() if t.requires_grad}
        check(len(psi) > 0, "generator", "have parameters that require a gradient", [])
        fixed = {name: t.detach().clone() for name, t in state.items() if name not in psi}
        numbers = torch.arange(agents, device=next(iter(psi.values())).device)
        layer_of = getattr(generator, "layer_of", owning_module)
        for name, value in (
            ("_psi", psi),
            ("_fixed", fixed),
            ("_numbers", numbers),
            ("psi_layout", ParameterLayout.of(psi, layer_of=layer_of)),
        ):
            object.__setattr__(self, name, value)
        with torch.no_grad():
            theta = self._theta(psi, numbers[:1])
        object.__setattr__(self, "theta_layout", ParameterLayout.of(theta, batch_dims=1))

    def vjp(self, vectors: Float[Tensor, "agent theta"]) -> Float[Tensor, "agent psi"]:
        r"""Each agent's :math:`J_i^\top v_i`: a gradient in theta brought to psi.

        Args:
            vectors: One vector for each agent.

        Returns:
            One vector for each agent. Where that is too much memory, `vjp_sum` and `vjp_agent`
            make one vector at a time.

        Raises:
            UsageError: If the vectors have another shape.
        """
        of_agents = self._named(vectors, "vectors", "theta", self.agents)
        return self.psi_layout.flatten(vmap(self._pull)(self._numbers, of_agents))

    def vjp_sum(self, vectors: Float[Tensor, "agent theta"]) -> Float[Tensor, " psi"]:
        r"""The sum over agents :math:`\sum_i J_i^\top v_i`, in one backward pass.

        Args:
            vectors: One vector for each agent.

        Returns:
            The sum; no agent's own part is formed.

        Raises:
            UsageError: If the vectors have another shape.
        """
        of_agents = self._named(vectors, "vectors", "theta", self.agents)

        def every(psi: Named) -> Named:
            theta = self._theta(psi, self._numbers)
            return {name: t.expand(self.agents, *t.shape[1:]) for name, t in theta.items()}

        (total,) = vjp(every, self._psi)[1](of_agents)
        return self.psi_layout.flatten(total)

    def vjp_agent(self, agent: int, vector: Float[Tensor, " theta"]) -> Float[Tensor, " psi"]:
        r"""One agent's :math:`J_i^\top v`.

        Args:
            agent: Which agent.
            vector: A vector in its theta-space.

        Returns:
            A vector in psi-space.

        Raises:
            UsageError: If there is no such agent, or the vector has another shape.
        """
        number = self._number(agent, "agent")
        return self.psi_layout.flatten(self._pull(number, self._named(vector, "vector", "theta")))

    def jvp(self, vectors: Float[Tensor, "*agent psi"]) -> Float[Tensor, "agent theta"]:
        r"""Each agent's :math:`J_i u_i`: how its policy moves when the trained parameters do.

        Args:
            vectors: One vector for each agent, or a single one for all.

        Returns:
            One vector for each agent.

        Raises:
            UsageError: If the vectors have another shape.
        """
        shared = vectors.dim() == 1
        given = self._named(vectors, "vectors", "psi", *([] if shared else [self.agents]))
        moved = vmap(self._push, in_dims=(0, None if shared else 0))(self._numbers, given)
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
            UsageError: If there is no such agent, or the vector has another shape.
        """
        moved, moving = self._number(agent, "agent"), self._number(other, "other")
        pulled = self._pull(moving, self._named(vector, "vector", "theta"))
        return self.theta_layout.flatten(self._push(moved, pulled))

    def singular_values(self, agent: int, count: int = 6, *, seed: int = 0) -> NDArray[np.float64]:
        r"""The largest singular values of an agent's Jacobian.

        By a Lanczos method (`scipy.sparse.linalg.eigsh`) on products with :math:`J_i J_i^\top` or
        :math:`J_i^\top J_i`, whichever is smaller; each value is then the length of J's product
        with its singular vector. Values below 1e-8 of the largest are not told from 0 in float64,
        below 1e-3 not in float32.

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
        sizes = (self.theta_layout.size, self.psi_layout.size)
        size = min(sizes)
        check(1 <= count < size, "count", f"be from 1 to {size - 1}", count)
        # svds would hold `count` vectors of the larger space at its end; this holds one.
        layout, there, back = (
            (self.theta_layout, self._pull, self._push)
            if size == sizes[0]
            else (self.psi_layout, self._push, self._pull)
        )
        like = self._like

        def through(vector: NDArray[np.float64]) -> Named:
            return there(number, layout.unflatten(torch.from_numpy(np.ravel(vector)).to(like)))

        def squared(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            return layout.flatten(back(number, through(vector))).double().cpu().numpy()

        operator = LinearOperator((size, size), matvec=squared, dtype=np.float64)
        _, vectors = eigsh(
            operator,
            k=count,
            v0=np.random.default_rng(seed).standard_normal(size),
            # 0 is float64's own precision, which products in float32 never reach
            tol=0 if like.dtype == torch.float64 else 10 * torch.finfo(like.dtype).eps,
        )
        lengths = [_length(through(np.ascontiguousarray(vector))) for vector in vectors.T]
        return np.array(sorted(lengths, reverse=True))

    @property
    def _like(self) -> Tensor:
        return next(iter(self._psi.values()))

    def _theta(self, psi: Named, numbers: Int[Tensor, " agent"]) -> Named:
        theta: Named = functional_call(self.generator, {**self._fixed, **psi}, (numbers,))
        return theta

    def _theta_of(self, psi: Named, agent: Int[Tensor, ""]) -> Named:
        return {name: t.squeeze(0) for name, t in self._theta(psi, agent[None]).items()}

    def _pull(self, agent: Int[Tensor, ""], vector: Named) -> Named:
        pulled: Named
        (pulled,) = vjp(lambda psi: self._theta_of(psi, agent), self._psi)[1](vector)
        return pulled

    def _push(self, agent: Int[Tensor, ""], vector: Named) -> Named:
        pushed: Named = jvp(lambda psi: self._theta_of(psi, agent), (self._psi,), (vector,))[1]
        return pushed

    def _number(self, agent: int, name: str) -> Int[Tensor, ""]:
        check(0 <= agent < self.agents, name, f"be from 0 to {self.agents - 1}", agent)
        return self._numbers[agent]

    def _named(self, given: Tensor, name: str, space: str, *batch: int) -> Named:
        """A user's vectors by parameter, detached and of the generator's kind."""
        layout = self.theta_layout if space == "theta" else self.psi_layout
        expected, found = (*batch, layout.size), tuple(given.shape)
        check(found == expected, name, f"have shape {expected}, the last being {space}", found)
        return layout.unflatten(given.detach().to(self._like))


def _length(tensors: Named) -> float:
    squares = torch.stack([tensor.double().square().sum() for tensor in tensors.values()])
    return float(squares.sum().sqrt())
