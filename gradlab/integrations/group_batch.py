"""A group's part of a tensordict batch, [agent, sample, ...] as gradlab takes it."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from tensordict import TensorDictBase
from torch import Tensor

from gradlab.checks import UsageError
from gradlab.integrations.agent_network import Key, Read, name_of


class GroupBatch:
    """A batch as a loss module takes it, and what agents' samples are in it.

    Attributes:
        tensors: The batch, [copy, time] or [sample].
        agents: Number of agents in the group.
        segments: Whether a sample is a copy's whole stretch of time, as recurrent networks need it.
    """

    def __init__(self, tensors: TensorDictBase, agents: int, *, segments: bool = False) -> None:
        """Look at a batch.

        Args:
            tensors: The batch.
            agents: Number of agents in the group.
            segments: Whether a sample is a copy's whole stretch of time.

        Raises:
            UsageError: If it has another form.
        """
        form = tuple(tensors.batch_size)
        if len(form) not in ((2,) if segments else (1, 2)) or 0 in form:
            expected = "[copy, time]" if segments else "[copy, time] or [sample]"
            raise UsageError(f"`batch` must be of {expected} and not empty. Got batch_size={form}.")
        self.tensors, self.agents, self.segments = tensors, agents, segments
        self._axes = len(form)

    @property
    def copy(self) -> Int[Tensor, " sample"] | None:
        """The environment copy of each sample; None where the batch does not tell."""
        if self._axes == 1:
            return None
        copies, steps = self.tensors.batch_size
        numbers = torch.arange(copies)
        return numbers if self.segments else numbers.repeat_interleave(steps)

    def holds(self, key: Key) -> bool:
        """Tell whether it has a tensor.

        Args:
            key: The tensor's key.

        Returns:
            Whether it is there.
        """
        return self.tensors.get(key, None) is not None

    def found(self, key: Key, mend: str | None = None) -> Tensor:
        """Look up a tensor.

        Args:
            key: Its key.
            mend: What to do if it is not there.

        Returns:
            The tensor, [*batch, ...].

        Raises:
            UsageError: If it is not there.
        """
        tensor = self.tensors.get(key, None)
        if tensor is None:
            has = ", ".join(sorted(map(name_of, self.tensors.keys(True, True))))
            raise UsageError(
                f"`batch` must hold {key!r}. Got {has}" + (f"; {mend}." if mend else ".")
            )
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    def read(self, reads: Iterable[Read]) -> dict[str, Tensor]:
        """Take what networks read.

        Args:
            reads: What that is.

        Returns:
            Tensors [agent, sample, ...] by name.

        Raises:
            UsageError: If something is missing.
        """
        return {read.name: self._read(read) for read in reads}

    def _read(self, read: Read) -> Tensor:
        if read.axis == "all":
            of_agents = torch.cat([self._of_agents(key) for key in read.keys], dim=-1)
            return self._for_all(of_agents.flatten(-2))
        (key,) = read.keys
        if read.axis == "common":
            return self._for_all(self.found(key))
        return self.by_agent(self._of_agents(key))

    def by_agent(self, tensor: Tensor) -> Tensor:
        """Put agents first.

        Args:
            tensor: What all agents have, [*batch, agent, ...].

        Returns:
            The same, [agent, sample, ...].
        """
        return self._samples(tensor.movedim(self._axes, 0), 1)

    def numbers(self, key: Key, tensor: Tensor | None = None) -> Tensor:
        """Take a number for each of the agents' samples.

        Args:
            key: Where it stands, [*batch, agent, 1].
            tensor: What stands there, if it has been changed.

        Returns:
            The numbers [agent, sample], or [agent, sample, time] of stretches of time.

        Raises:
            UsageError: If it has another form.
        """
        given = self.found(key) if tensor is None else tensor
        expected = (*self.tensors.batch_size, self.agents, 1)
        if given.shape != expected:
            raise self._form(key, expected, given)
        return self.by_agent(given.squeeze(-1))

    def one_each(self, key: Key) -> Tensor:
        """Take a number for each of the agents' samples that stands without an axis of its own.

        Args:
            key: Where it stands, [*batch, agent].

        Returns:
            As `numbers`.

        Raises:
            UsageError: If it has another form.
        """
        given, expected = self.found(key), (*self.tensors.batch_size, self.agents)
        if given.shape != expected:
            raise self._form(key, expected, given)
        return self.by_agent(given)

    def of_agents(self, key: Key) -> Tensor:
        """Take what each of the agents' samples holds.

        Args:
            key: Where it stands, [*batch, agent, ...].

        Returns:
            It, [agent, sample, ...].

        Raises:
            UsageError: If it is not there, or not of these agents.
        """
        return self.by_agent(self._of_agents(key))

    def _of_agents(self, key: Key) -> Tensor:
        tensor = self.found(key)
        expected = (*self.tensors.batch_size, self.agents)
        if tensor.shape[: self._axes + 1] != expected:
            raise self._form(key, (*expected, ...), tensor)
        return tensor

    def _for_all(self, tensor: Tensor) -> Tensor:
        samples = self._samples(tensor, 0)
        return samples.expand(self.agents, *samples.shape)

    def _samples(self, tensor: Tensor, axis: int) -> Tensor:
        if self._axes == 1 or self.segments:
            return tensor
        return tensor.flatten(axis, axis + 1)

    @staticmethod
    def _form(key: Key, expected: tuple[object, ...], got: Tensor) -> UsageError:
        form = ", ".join("..." if size is ... else str(size) for size in expected)
        return UsageError(
            f"`batch[{key!r}]` must tell agents apart and have shape [{form}]. Got "
            f"{list(got.shape)}."
        )
