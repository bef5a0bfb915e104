"""Several processes that train one run together, as torchrun starts them.

Each steps some of the environment copies and learns from what they brought; what is the same for
all copies, as weights and random numbers, every process has whole, and equal to the bit.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, distributed

from gradlab.checks import Failed, TrainingFailed, UsageError
from gradlab.engine.messages import broadcast_value, gather_values

T = TypeVar("T")


class Group:
    """The processes that train together: this one alone.

    What every process calls, all call in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank = 0
    size = 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over the processes in place of tensors of the same shapes in each.

        Args:
            tensors: What is added up.

        Raises:
            TrainingFailed: As for all that processes do together: if another has failed, what it
                failed with; if it is gone, that it is.
        """

    def whole(self, tensor: Tensor, axis: int) -> Tensor:
        """Put the processes' tensors of the same shape side by side.

        Args:
            tensor: This one's.
            axis: Along which axis.

        Returns:
            All, in the order of the processes.
        """
        del axis
        return tensor

    def gather(self, value: T) -> list[T]:
        """Bring together what each process has.

        Args:
            value: What this one has: tensors, and what JSON can hold.

        Returns:
            What each has, in order; lists where there were tuples if there are other processes.
        """
        return [value]

    def first(self, make: Callable[[], T]) -> T:
        """Have process 0 do something for all.

        Args:
            make: What is to be done; it returns tensors, and what JSON can hold.

        Returns:
            What it returned there; lists where there were tuples if there are other processes.
        """
        return make()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Fail together: what one process fails with inside, all raise.

        Yields:
            Nothing.
        """
        yield

    def speaks(self, error: BaseException) -> bool:
        """Whether it is for this process to say what all have failed with.

        Args:
            error: What was raised.

        Returns:
            True for one of them, unless they can't agree.
        """
        del error
        return True


def command(processes: int) -> str:
    """Say how so many processes are started to train.

    Args:
        processes: Their number.

    Returns:
        A shell command, to be followed by options.
    """
    if processes == 1:
        return "gradlab train"
    return f"torchrun --standalone --nproc-per-node {processes} -m gradlab train"


ALONE = Group()
"""A single process."""


class Processes(Group):
    """Processes of `torch.distributed`, whose default group is there."""

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self._agreed: BaseException | None = None

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """See `Group.sum_`."""
        self._meet()
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        with self._connected():
            for same in by_type.values():
                flat = torch.cat([tensor.detach().flatten() for tensor in same])
                distributed.all_reduce(flat)
                parts = flat.split([tensor.numel() for tensor in same])
                for tensor, part in zip(same, parts, strict=True):
                    tensor.detach().copy_(part.view(tensor.shape))

    def whole(self, tensor: Tensor, axis: int) -> Tensor:
        """See `Group.whole`."""
        self._meet()
        own = tensor.detach().contiguous()
        plain = own.view(torch.uint8) if own.dtype is torch.bool else own
        found = [torch.empty_like(plain) for _ in range(self.size)]
        with self._connected():
            distributed.all_gather(found, plain)
        return torch.cat([each.view(own.dtype) for each in found], dim=axis)

    def gather(self, value: T) -> list[T]:
        """See `Group.gather`."""
        self._meet()
        return self._gathered(value)

    def first(self, make: Callable[[], T]) -> T:
        """See `Group.first`."""
        made = make() if self.rank == 0 else None
        self._meet()
        with self._connected():
            found: T = broadcast_value(made)
            return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Group.together`."""
        try:
            yield
        except (Failed, UsageError) as error:
            if error is self._agreed:
                raise
            self._meet(error)

    def speaks(self, error: BaseException) -> bool:
        """See `Group.speaks`."""
        return self.rank == 0 or isinstance(error, _LostError)

    def _meet(self, error: Failed | UsageError | None = None) -> None:
        """Find out whether another process has failed, before anything is done together.

        Args:
            error: What this one has failed with.

        Raises:
            BaseException: What the first of those that failed did so with.
        """
        failed = torch.tensor(int(error is not None))
        with self._connected():
            distributed.all_reduce(failed, distributed.ReduceOp.MAX)
        if not failed:
            return
        told = self._gathered(None if error is None else [_kind(error), str(error)])
        rank, (kind, said) = next((n, each) for n, each in enumerate(told) if each is not None)
        everywhere = all(each is not None for each in told)
        self._agreed = _made(kind, said if everywhere else f"process {rank} of {self.size}: {said}")
        raise self._agreed from None

    def _gathered(self, value: T) -> list[T]:
        with self._connected():
            return gather_values(value)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._agreed = _LostError(
                f"process {self.rank} of {self.size} has lost the others: one has ended, or can't "
                "be reached. To go on from the last checkpoint: "
                f"{command(self.size)} --resume --out and the run"
            )
            raise self._agreed from error


class _LostError(TrainingFailed):
    """Another process is gone, so that nothing can be agreed on."""


def _kind(error: Failed | UsageError) -> str:
    """What kind of error it is: its class, if that is made of a message alone."""
    return UsageError.__name__ if isinstance(error, UsageError) else type(error).__name__


def _made(kind: str, said: str) -> Failed | UsageError:
    """An error of a kind that another process has said."""
    kinds: list[type[Failed]] = [Failed]
    for known in kinds:  # which grows meanwhile
        kinds += known.__subclasses__()
    return next((known for known in kinds if known.__name__ == kind), UsageError)(said)


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """The environment copies that one of the processes has: neighbours, as many as any other.

    Of samples, which are numbered time * copies + copy, it is those of its copies; of recurrent
    networks a sample is a segment, one of each copy, to which the same applies.

    Attributes:
        group: The processes.
        of: Number of copies of all of them.
    """

    group: Group
    of: int

    @property
    def copies(self) -> int:
        """Number of its copies."""
        return self.of // self.group.size

    @property
    def first(self) -> int:
        """Number of the first of them."""
        return self.group.rank * self.copies

    @cached_property
    def own(self) -> slice:
        """Which they are."""
        return slice(self.first, self.first + self.copies)

    def drawn(self, draw: Callable[[torch.Size], Tensor], shape: Sequence[int]) -> Tensor:
        """Draw what all copies need, as every process does alike, and keep what its own do.

        Args:
            draw: Draws a tensor of a shape.
            shape: [agent, copy, ...] with its own copies.

        Returns:
            A tensor of that shape.
        """
        everything = draw(torch.Size((shape[0], self.of, *shape[2:])))
        return everything[:, self.own]

    def whole(self, samples: Tensor) -> Tensor:
        """Put all processes' samples together.

        Args:
            samples: [agent, sample, ...] of its own copies.

        Returns:
            [agent, sample, ...] of all copies.
        """
        if self.group.size == 1:
            return samples
        steps = samples.unflatten(1, (-1, self.copies))
        return self.group.whole(steps, 2).flatten(1, 2)

    def part(self, samples: Tensor) -> Tensor:
        """Keep the samples of its own copies.

        Args:
            samples: [agent, sample, ...] of all copies.

        Returns:
            [agent, sample, ...] of its own.
        """
        if self.group.size == 1:
            return samples
        own: Tensor = samples.unflatten(1, (-1, self.of))[:, :, self.own]
        return own.flatten(1, 2)

    def places(
        self, numbers: Int[Tensor, " sample"]
    ) -> tuple[Int[Tensor, " own"], Int[Tensor, " own"]]:
        """Find its own among samples.

        Args:
            numbers: Numbers of some samples of all copies.

        Returns:
            Where in `numbers` its own are, and their numbers among its own.
        """
        if self.group.size == 1:
            return torch.arange(len(numbers)), numbers
        copy = numbers % self.of - self.first
        places = ((copy >= 0) & (copy < self.copies)).nonzero()[:, 0]
        return places, (numbers // self.of * self.copies + copy)[places]

    def count(self, samples: int) -> int:
        """Count the samples of all processes.

        Args:
            samples: How many this one has.

        Returns:
            How many there are.
        """
        return samples * self.group.size

    def all(self, holds: Bool[Tensor, "..."]) -> bool:
        """Whether something holds everywhere in all processes.

        Args:
            holds: Where it does in this one.

        Returns:
            The same in each.
        """
        return bool(self.group.whole(holds.all()[None], 0).all())


@contextmanager
def joined() -> Iterator[Group]:
    """Join the processes that torchrun has started beside this one, if it has.

    Yields:
        They, as long as they are together; this process alone if there are no others.

    Raises:
        UsageError: If they can't be reached.
    """
    if not (distributed.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield ALONE
        return
    try:
        distributed.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the processes that torchrun started can't reach each other ({cause}). Check its "
            "--rdzv-endpoint, or use --standalone on one machine."
        ) from None
    try:
        yield Processes()
    finally:
        with suppress(RuntimeError):  # others may be gone
            distributed.destroy_process_group()
