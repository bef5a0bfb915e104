r"""Traces and squared norms of :math:`K_{ik} = J_i J_k^\top`, from products with random vectors."""

from collections.abc import Set
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Generator as RandomGenerator
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from gradlab.contributions import agent_numbers
from gradlab.parameters import ParameterLayout

Named = dict[str, Tensor]
Samples = Float[np.ndarray, "probe group agent agent_other"]


def probe_coupling(
    generator: nn.Module,
    agents: int,
    layout: ParameterLayout,
    groups: Float[np.ndarray, "group parameter"],
    *,
    probes: int,
    random: RandomGenerator,
    budget: int,
) -> tuple[Samples, Samples]:
    r"""Estimate what each probe says of the traces and squared Frobenius norms of blocks of K.

    A probe has one vector v of independent signs for each policy parameter q, the same for all
    agents. :math:`K_{ik} v` gives the columns' share in the trace, :math:`v \cdot (K_{ik} v)_q`
    (Hutchinson, 1990), and in the squared norm, :math:`\|(K_{ik} v)_p\|^2` for each parameter p
    whose rows belong to the block. Both are unbiased.

    Args:
        generator: As for `gradlab.coupling`.
        agents: Number of agents.
        layout: The policy parameters.
        groups: 1 where a policy parameter belongs to a block's rows and columns, else 0.
        probes: Number of probes.
        random: Source of the signs.
        budget: As for `gradlab.coupling`.

    Returns:
        Traces, and squared norms, of each group's block for each pair of agents by each probe.
    """
    traces = np.zeros((probes, len(groups), agents, agents))
    squares = np.zeros_like(traces)
    makers = _makers(generator, agents)
    for position, (name, shape) in enumerate(layout.shapes.items()):
        if not makers[name]:
            continue
        columns = _Columns(generator, agents, name, makers[name])
        at_once = max(1, budget // columns.nbytes(layout.size))
        step = max(1, at_once // agents)
        for first in range(0, probes, step):
            some = slice(first, min(first + step, probes))
            # drawn one by one so that the budget does not change them
            vectors = torch.stack([
                2 * torch.randint(2, shape, generator=random, device=random.device) - 1
                for _ in range(some.start, some.stop)
            ])
            for start in range(0, agents, at_once):
                others = slice(start, min(start + at_once, agents))
                trace, squared = columns.couple(vectors, torch.arange(others.start, others.stop))
                own = groups[:, position, None, None]
                traces[some, :, :, others] += own * trace[:, None]
                squares[some, :, :, others] += own * np.einsum("gp,spik->sgik", groups, squared)
    # K_ki is the transpose of K_ik: both products tell of the same norm
    return traces, (squares + squares.swapaxes(-1, -2)) / 2


def _makers(generator: nn.Module, agents: int) -> dict[str, set[str]]:
    """By policy parameter, the trained parameters that it depends on."""
    leaves = {
        n: p.detach().requires_grad_() for n, p in generator.named_parameters() if p.requires_grad
    }
    numbers = agent_numbers(generator, agents)
    makers: dict[str, set[str]] = {}
    with torch.enable_grad():
        theta: Named = functional_call(generator, leaves, (numbers,))
        for name, tensor in theta.items():
            found = (
                torch.autograd.grad(
                    tensor.sum(), list(leaves.values()), allow_unused=True, retain_graph=True
                )
                if leaves and tensor.requires_grad
                else [None] * len(leaves)
            )
            makers[name] = {n for n, g in zip(leaves, found, strict=True) if g is not None}
    return makers


class _Columns:
    """The columns of all K_ik that belong to one policy parameter.

    Only the trained parameters that make it are moved: J_k^T v is zero elsewhere.
    """

    def __init__(self, generator: nn.Module, agents: int, name: str, moving: Set[str]) -> None:
        state = {**dict(generator.named_parameters()), **dict(generator.named_buffers())}
        self._generator, self._name = generator, name
        self._fixed = {n: t.detach() for n, t in state.items() if n not in moving}
        self._moving = {n: t.detach() for n, t in state.items() if n in moving}
        self._numbers = agent_numbers(generator, agents)

    def nbytes(self, theta_size: int) -> int:
        """Bytes of one J_k^T v and all agents' J_i J_k^T v."""
        size = next(iter(self._moving.values())).element_size()
        moving = sum(t.numel() for t in self._moving.values())
        return size * (moving + len(self._numbers) * theta_size)

    def couple(
        self, vectors: Int[Tensor, " probe *shape"], others: Int[Tensor, " agent_other"]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Take the products with some agents' columns.

        Args:
            vectors: What is multiplied.
            others: Whose columns.

        Returns:
            Inner products [probe, agent, agent_other] of vector and product, and the squared
            norms [probe, parameter, agent, agent_other] of the products' rows.
        """
        given = vectors.to(next(iter(self._moving.values())))

        def pull(number: Tensor) -> Named:
            back = vjp(partial(self._own, number), self._moving)[1]
            pulled: Named = vmap(lambda vector: back(vector)[0])(given)
            return pulled

        def push(tangents: Named) -> Named:
            moved: Named = jvp(self._all, (self._moving,), (tangents,))[1]
            return moved

        pulled = vmap(pull)(others.to(self._numbers))
        moved = vmap(push)({name: t.flatten(0, 1) for name, t in pulled.items()})
        size = (len(others), len(given))
        rows = {n: t.reshape(*size, t.shape[1], -1).double() for n, t in moved.items()}
        agents = len(self._numbers)
        trace = torch.einsum("ksit,st->sik", rows[self._name], given.flatten(1).double())
        squared = [
            torch.einsum("ksit,ksit->sik", part, part).expand(-1, agents, -1)
            for part in rows.values()
        ]
        return (
            trace.expand(-1, agents, -1).cpu().numpy(),
            torch.stack(squared, dim=1).cpu().numpy(),
        )

    def _all(self, moving: Named) -> Named:
        """Every agent's policy parameters, of those that are moved."""
        theta: Named = functional_call(self._generator, {**self._fixed, **moving}, (self._numbers,))
        return theta

    def _own(self, number: Tensor, moving: Named) -> Tensor:
        """One agent's policy parameter."""
        theta = functional_call(self._generator, {**self._fixed, **moving}, (number[None],))
        made: Tensor = theta[self._name].squeeze(0)
        return made
