"""What processes send each other beside tensors of known shapes: read, and never unpickled."""

import json
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, distributed

T = TypeVar("T")
_TENSOR = "\0tensor"


def packed(value: object) -> bytes:
    """Put a value into bytes that can do nothing but be read: safetensors with JSON in it.

    Args:
        value: Tensors of any type, and what JSON can hold.

    Returns:
        What `unpacked` takes.

    Raises:
        TypeError: If it is or holds something else.
    """
    tensors: dict[str, Tensor] = {}

    def named(item: object) -> dict[str, str]:
        if not isinstance(item, Tensor):
            raise TypeError(f"{type(item).__name__} can't be sent to another process")
        name = str(len(tensors))
        # A copy: safetensors takes no two that share memory.
        tensors[name] = item.detach().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}

    text = json.dumps(value, default=named).encode()
    return save({**tensors, "": _as_tensor(text, len(text))})


def unpacked(data: bytes) -> Any:  # noqa: ANN401 -- what was packed
    """Take out what was put into bytes.

    Args:
        data: What `packed` returned.

    Returns:
        The value; lists where there were tuples.
    """
    tensors = load(data)
    return json.loads(
        _as_bytes(tensors[""]),
        object_hook=lambda found: tensors[found[_TENSOR]] if _TENSOR in found else found,
    )


def gather_values(
    value: T,
    *,
    device: torch.device | None = None,
    group: distributed.ProcessGroup | None = None,
) -> list[T]:
    """Bring together what each process of a `torch.distributed` group has.

    Args:
        value: What this one has: tensors, and what JSON can hold.
        device: Where the group's tensors are; by default in main memory.
        group: The processes; all by default.

    Returns:
        What each has, in order; lists where there were tuples.

    Raises:
        TypeError: If it holds something else.
    """
    own = packed(value)
    sizes = [torch.tensor(0, device=device) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(sizes, torch.tensor(len(own), device=device), group=group)
    longest = int(max(sizes))
    found = [_as_tensor(b"", longest).to(device) for _ in sizes]
    distributed.all_gather(found, _as_tensor(own, longest).to(device), group=group)
    return [unpacked(_as_bytes(data[: int(size)])) for data, size in zip(found, sizes, strict=True)]


def broadcast_value(value: object) -> Any:  # noqa: ANN401 -- what process 0 has
    """Send what process 0 has to all.

    Args:
        value: Tensors, and what JSON can hold; of other processes it does not matter.

    Returns:
        Process 0's; lists where there were tuples.

    Raises:
        TypeError: If it holds something else.
    """
    own = packed(value) if distributed.get_rank() == 0 else b""
    size = torch.tensor(len(own))
    distributed.broadcast(size, 0)
    data = _as_tensor(own, int(size))
    distributed.broadcast(data, 0)
    return unpacked(_as_bytes(data))


def _as_bytes(data: Tensor) -> bytes:
    return data.cpu().numpy().tobytes()


def _as_tensor(data: bytes, size: int) -> Tensor:
    """A tensor of so many bytes, of which data is the first."""
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
