"""A sweep's YAML file, and where in it everything stands."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gradlab.checks import UsageError
from trainers.documents import read_document
from trainers.sweeps import plan


def read_sweep(file: Path) -> tuple[dict[str, Any], plan.Place]:
    """Read a sweep's file.

    Args:
        file: A YAML file.

    Returns:
        What `plan_runs` takes: the document, and what says where its parts stand.

    Raises:
        UsageError: If it can't be read, is not YAML, says something twice, or holds no settings.
    """
    document, root = read_document(file)
    marks = {} if root is None else dict(_marks(root, (), file, yaml.SafeLoader("")))
    if not isinstance(document, dict):
        raise UsageError(
            f"{file} must hold {', '.join(plan.PARTS)} by name. Got {type(document).__name__}."
        )

    def place(path: plan.Keys) -> str:
        while path and path not in marks:  # what comes by an anchor stands elsewhere
            path = path[:-1]
        return _place(file, marks[path]) if path else f"{file}: "

    return document, place


def _place(file: Path, mark: yaml.Mark) -> str:
    return f"{file}, line {mark.line + 1}, column {mark.column + 1}: "


def _marks(
    node: yaml.Node, path: plan.Keys, file: Path, loader: yaml.SafeLoader
) -> Iterator[tuple[plan.Keys, yaml.Mark]]:
    """Where keys, and the entries of lists, begin."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no setting's name
            name = loader.construct_object(key)  # as the document has it: 1 and 0x1 are one key
            if name in seen:
                raise UsageError(
                    f"{_place(file, key.start_mark)}{key.value!r} is given twice. Leave one out."
                )
            seen.add(name)
            yield (*path, name), key.start_mark
            yield from _marks(value, (*path, name), file, loader)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*path, number), value.start_mark
            yield from _marks(value, (*path, number), file, loader)
