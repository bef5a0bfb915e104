"""What a loop hands in: checked, and where all agents' samples stand in one row, sorted."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gradlab.checks import UsageError, check


def by_agent(
    batch: Mapping[str, Tensor],
    agent: Int[Tensor, " _"],
    agents: int,
    copy: Int[Tensor, " _"] | None = None,
) -> tuple[dict[str, Tensor], Bool[Tensor, "agent place"] | None, Int[Tensor, " place"] | None]:
    """Give each agent its samples.

    Each place is of one environment copy, so that an agent with fewer samples in a copy than
    another leaves places empty there.

    Args:
        batch: Tensors [sample, ...] by name.
        agent: Whose sample each is.
        agents: Number of agents.
        copy: The environment copy that each sample comes from.

    Returns:
        Tensors [agent, place, ...] by name; which places hold a sample, None if all do; and each
        place's copy, None if copies are not told apart.

    Raises:
        UsageError: If there is not one agent for each sample.

    >>> batch, mask, _ = by_agent({"x": torch.tensor([1, 2, 3])}, torch.tensor([1, 0, 1]), 2)
    >>> batch["x"], mask
    (tensor([[2, 2],
            [1, 3]]), tensor([[ True, False],
            [ True,  True]]))
    """
    lengths = {name: len(tensor) if tensor.dim() else 0 for name, tensor in batch.items()}
    samples = next(iter(lengths.values()), 0)
    check(
        samples > 0 and set(lengths.values()) == {samples},
        "batch",
        "hold tensors with one leading axis [sample] where `agent` is given",
        lengths,
    )
    rule = f"be whole numbers from 0 to {agents - 1}, one for each of the {samples} samples"
    whole = not (agent.is_floating_point() or agent.dtype == torch.bool)
    got = (agent.dtype, tuple(agent.shape))
    check(whole and agent.shape == (samples,), "agent", rule, got)
    found = agent.unique().tolist()
    check(found[0] >= 0 and found[-1] < agents, "agent", rule, found)
    agent = agent.long()
    copies, of_copy = torch.zeros(1, dtype=torch.long), torch.zeros_like(agent)
    if copy is not None:
        rule = f"have shape {(samples,)} as the batch has samples"
        check(copy.shape == (samples,), "copy", rule, tuple(copy.shape))
        copies, of_copy = copy.unique(return_inverse=True)
    cell = agent * len(copies) + of_copy.to(agent.device)
    count = torch.bincount(cell, minlength=agents * len(copies))
    order = cell.argsort(stable=True)
    first = count.cumsum(0) - count
    rank = torch.arange(samples, device=agent.device) - first[cell[order]]
    width = count.view(agents, -1).amax(0)  # of each copy
    start = width.cumsum(0) - width
    place = start[of_copy.to(agent.device)[order]] + rank
    index = torch.full((agents, int(width.sum())), -1, device=agent.device)
    index[agent[order], place] = order
    mask = index >= 0
    # An empty place is filled by some sample that there is: its gradient is finite as theirs.
    filled = torch.where(mask, index, order[0])
    found = {name: tensor[filled.to(tensor.device)] for name, tensor in batch.items()}
    places = None if copy is None else copies.repeat_interleave(width.to(copies.device))
    return found, None if mask.all() else mask, places


def check_samples(batch: object, device: torch.device, where: str = "batch") -> None:
    """Refuse a batch that no gradients can be taken of.

    Args:
        batch: What was handed in.
        device: Where the policy is.
        where: What the batch is called.

    Raises:
        UsageError: If it does not hold tensors by name, or they are elsewhere.
    """
    if not isinstance(batch, Mapping):
        check(False, where, "hold tensors by name", type(batch).__name__)
    assert isinstance(batch, Mapping)
    for name, tensor in batch.items():
        place = f"{where}[{name!r}]"
        check(isinstance(tensor, Tensor), place, "be a tensor", type(tensor).__name__)
        if tensor.device != device:
            raise UsageError(
                f"`{place}` must be where the policy is, on {device}. Got it on {tensor.device}; "
                f"move it: .to({str(device)!r})."
            )


def check_agents(batch: Mapping[str, Tensor], agents: int, where: str = "batch") -> None:
    """Refuse a batch whose agents are not told apart.

    Args:
        batch: Tensors by name.
        agents: Number of agents.
        where: What the batch is called.

    Raises:
        UsageError: If a tensor has not as many rows as there are agents.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    if any(shape[:1] != (agents,) for shape in shapes.values()):
        raise UsageError(
            f"`{where}` must tell its {agents} agents apart. Got {shapes}; hand in tensors "
            "[agent, sample, ...], or [sample, ...] with each sample's agent: "
            "probe(batch, agent=numbers)."
        )
