"""The state of a simulator that has no such notion: every tensor and number that hangs on it."""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from gradlab.checks import UsageError

Scalar = bool | int | float | str | None


def capture(root: object, packages: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy what an object and the objects it holds keep.

    Walks attributes of instances of some packages' classes, lists, tuples and dictionaries. What is
    neither a tensor nor a plain scalar (functions, spaces) is taken to be fixed.

    Args:
        root: The object.
        packages: Names of the packages whose instances are walked into.

    Returns:
        Tensors by path, a tensor that stands in several places only once; and `aliases` (path ->
        path of the same tensor) and `scalars` (path -> value).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    scalars: dict[str, Scalar] = {}
    first: dict[int, str] = {}
    for path, leaf in leaves(root, packages):
        if not isinstance(leaf, Tensor):
            scalars[path] = leaf
        elif id(leaf) in first:
            aliases[path] = first[id(leaf)]
        else:
            first[id(leaf)] = path
            tensors[path] = leaf.detach().clone(memory_format=torch.contiguous_format)
    return tensors, {"aliases": aliases, "scalars": scalars}


def restore(
    root: object, packages: tuple[str, ...], tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Put back what `capture` copied.

    Args:
        root: An object of the same make.
        packages: As for `capture`.
        tensors: What `capture` returned first.
        values: What it returned second.

    Raises:
        UsageError: If the object is of another make: a place is missing.
    """
    copies = {path: tensor.clone() for path, tensor in tensors.items()}
    state: dict[str, Tensor | Scalar] = copies | values["scalars"]
    state |= {path: copies[same] for path, same in values["aliases"].items()}
    placed: set[str] = set()

    def saved(path: str, present: Tensor | Scalar) -> Tensor | Scalar:  # noqa: ARG001
        if path not in state:
            raise UsageError(
                f"the saved simulator state lacks {path!r}. Resume with the version that saved it."
            )
        placed.add(path)
        return state[path]

    _replace(root, "", packages, saved, set())
    if missing := state.keys() - placed:
        raise UsageError(
            f"the simulator has no place for the saved {min(missing)!r}. Resume with the version "
            "that saved it."
        )


def leaves(root: object, packages: tuple[str, ...]) -> Iterator[tuple[str, Tensor | Scalar]]:
    """Find every tensor and plain scalar, as `capture` does.

    Args:
        root: The object.
        packages: As for `capture`.

    Returns:
        Each one's path, and itself.
    """
    found: list[tuple[str, Tensor | Scalar]] = []

    def note(path: str, present: Tensor | Scalar) -> Tensor | Scalar:
        found.append((path, present))
        return present

    _replace(root, "", packages, note, set())
    return iter(found)


def leaf_at(root: Any, path: str) -> Tensor:  # noqa: ANN401
    """Find a tensor by its path.

    Args:
        root: The object.
        path: As in `leaves`.

    Returns:
        The tensor.
    """
    item = root
    for name in path.split("/")[1:]:
        if isinstance(item, list | tuple):
            item = item[int(name)]
        else:
            held = item if isinstance(item, dict) else item.__dict__
            item = held[name] if name in held else held[list(held)[int(name)]]
    assert isinstance(item, Tensor)
    return item


def _replace(
    item: Any,  # noqa: ANN401 -- anything may hang on a simulator
    path: str,
    packages: tuple[str, ...],
    new: Callable[[str, Tensor | Scalar], Tensor | Scalar],
    seen: set[int],
) -> Any:  # noqa: ANN401
    """Walk depth first; every tensor or scalar is replaced by what `new` gives for it."""
    if isinstance(item, Enum):
        return item
    if isinstance(item, Tensor | bool | int | float | str) or item is None:
        return new(path, item)
    if isinstance(item, tuple):
        parts = [_replace(x, f"{path}/{i}", packages, new, seen) for i, x in enumerate(item)]
        same = all(a is b for a, b in zip(item, parts, strict=True))
        return item if same else tuple(parts)
    if id(item) in seen:
        return item
    inside = f"{type(item).__module__}.".startswith(tuple(f"{name}." for name in packages))
    if not (inside or isinstance(item, list | dict)):
        return item
    seen.add(id(item))
    if isinstance(item, list):
        item[:] = [_replace(x, f"{path}/{i}", packages, new, seen) for i, x in enumerate(item)]
    else:
        held = item if isinstance(item, dict) else getattr(item, "__dict__", {})
        for position, key in enumerate(list(held)):
            # An object used as a key has no name that outlives the process; its place does.
            name = key if isinstance(key, str) else position
            held[key] = _replace(held[key], f"{path}/{name}", packages, new, seen)
    return item
