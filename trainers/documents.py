"""YAML from anybody: plain values, no larger and no deeper than settings are."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gradlab.checks import UsageError

_LARGEST = 1_000_000  # characters
_MOST = 100_000  # values, with all that anchors stand for written out


class Document(NamedTuple):
    """What a text holds.

    Attributes:
        content: Its values; None of an empty one.
        root: Its nodes, which say where everything stands; None of an empty one.
    """

    content: Any
    root: yaml.Node | None


def read_document(file: Path) -> Document:
    """Read a YAML file.

    Args:
        file: The file.

    Returns:
        What it holds.

    Raises:
        UsageError: If it can't be read, or is none that `parse_document` takes.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_LARGEST + 1)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{file} can't be read: {cause}. Give a YAML file.") from None
    return parse_document(text, str(file))


def parse_document(text: str, name: str) -> Document:
    """Take YAML for plain values; no tag makes anything else of it.

    Args:
        text: The YAML.
        name: What it is called in errors.

    Returns:
        What it holds.

    Raises:
        UsageError: If it is not YAML, holds an anchor that stands for itself, or is larger, written
            out, or deeper than any settings are.
    """
    if len(text) > _LARGEST:
        raise UsageError(f"{name} must have at most {_LARGEST:,} characters.")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return Document(None, None)
        # Before anything walks through it: a few lines of anchors can stand for billions of values.
        if _written_out(root, {}, name) > _MOST:
            raise UsageError(f"{name} must hold at most {_MOST:,} values, anchors written out.")
        return Document(loader.construct_document(root), root)
    except UsageError:
        raise
    except RecursionError:
        raise UsageError(f"{name} is nested deeper than any settings are.") from None
    except Exception as error:
        # PyYAML lets through whatever goes wrong with a value, e.g. of "2001-99-99" or "!!int x".
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name} is not YAML: {cause[:300]}.") from None


def _written_out(node: yaml.Node, known: dict[int, int], name: str) -> int:
    """Number of values below a node, each anchor's as often as it is referred to."""
    if id(node) not in known:
        known[id(node)] = 0  # under way
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_written_out(part, known, name) for part in parts)
    elif known[id(node)] == 0:
        raise UsageError(f"{name} holds an anchor that stands for itself. Write it out.")
    return known[id(node)]
