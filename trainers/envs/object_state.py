"""The state of a simulator that has no such notion: every tensor and number that hangs on it."""

from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradlab.checks import UsageError

Scalar = bool | int | float | str | None


class Reference(NamedTuple):
    """Another place of an object that stands in several.

    Attributes:
        to: The path of the first.
    """

    to: str


Leaf = Tensor | Scalar | Reference


def capture(root: object, packages: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy what an object and the objects it holds keep.

    Walks attributes of instances of some packages' classes, lists, tuples and dictionaries. What is
    neither a tensor nor a plain scalar (functions, spaces) is taken to be fixed.

    Args:
        root: The object.
        packages: Names of the packages whose instances are walked into.

    Returns:
        Tensors by path, a tensor that stands in several places only once; and `aliases` (path ->
        path of the same tensor), `references` (path -> path of the same object) and `scalars` (path
        -> value).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    references: dict[str, str] = {}
    scalars: dict[str, Scalar] = {}
    first: dict[int, str] = {}
    for path, leaf in leaves(root, packages):
        if isinstance(leaf, Reference):
            references[path] = leaf.to
        elif not isinstance(leaf, Tensor):
            scalars[path] = leaf
        elif id(leaf) in first:
            aliases[path] = first[id(leaf)]
        else:
            first[id(leaf)] = path
            tensors[path] = leaf.detach().clone(memory_format=torch.contiguous_format)
    return tensors, {"aliases": aliases, "references": references, "scalars": scalars}


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
    state: dict[str, Leaf] = copies | values["scalars"]
    state |= {path: copies[same] for path, same in values["aliases"].items()}
    state |= {path: Reference(to) for path, to in values["references"].items()}
    placed: set[str] = set()

    def saved(path: str, present: Leaf) -> Leaf:  # noqa: ARG001
        if path not in state:
            raise UsageError(
                f"the saved simulator state lacks {path!r}. Resume with the version that saved it."
            )
        placed.add(path)
        return state[path]

    _walk(root, packages, saved)
    if missing := state.keys() - placed:
        raise UsageError(
            f"the simulator has no place for the saved {min(missing)!r}. Resume with the version "
            "that saved it."
        )


def leaves(root: object, packages: tuple[str, ...]) -> Iterator[tuple[str, Leaf]]:
    """Find every tensor, plain scalar and reference, as `capture` does.

    Args:
        root: The object.
        packages: As for `capture`.

    Returns:
        Each one's path, and itself.
    """
    found: list[tuple[str, Leaf]] = []

    def note(path: str, present: Leaf) -> Leaf:
        found.append((path, present))
        return present

    _walk(root, packages, note)
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


def _walk(root: object, packages: tuple[str, ...], new: Callable[[str, Leaf], Leaf]) -> None:
    """Walk breadth first; every leaf is replaced by what `new` gives for it.

    An object is named by where it hangs nearest to the root, so an agent's goal, which a reset may
    change, refers to one of the world's landmarks and not the other way round.
    """
    first = {id(root): ""}
    objects: dict[str, Any] = {"": root}
    waiting = deque([""])

    def placed(path: str, item: Any) -> Any:  # noqa: ANN401 -- anything may hang on a simulator
        if isinstance(item, Enum):
            return item
        if isinstance(item, Tensor | bool | int | float | str) or item is None:
            return put(path, item)
        if isinstance(item, tuple):
            parts = [placed(f"{path}/{i}", x) for i, x in enumerate(item)]
            same = all(a is b for a, b in zip(item, parts, strict=True))
            return item if same else tuple(parts)
        inside = f"{type(item).__module__}.".startswith(tuple(f"{name}." for name in packages))
        if not (inside or isinstance(item, list | dict)):
            return item
        if id(item) in first:
            return put(path, Reference(first[id(item)]))
        first[id(item)], objects[path] = path, item
        waiting.append(path)
        return item

    def put(path: str, leaf: Leaf) -> Any:  # noqa: ANN401
        replacement = new(path, leaf)
        return objects[replacement.to] if isinstance(replacement, Reference) else replacement

    while waiting:
        path = waiting.popleft()
        item = objects[path]
        if isinstance(item, list):
            item[:] = [placed(f"{path}/{i}", x) for i, x in enumerate(item)]
            continue
        held = item if isinstance(item, dict) else getattr(item, "__dict__", {})
        for position, key in enumerate(list(held)):
            # An object used as a key has no name that outlives the process; its place does.
            name = key if isinstance(key, str) else position
            held[key] = placed(f"{path}/{name}", held[key])
