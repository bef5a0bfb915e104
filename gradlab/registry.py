"""Choices by name: one mapping from a name to what makes the thing."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from gradlab.checks import unknown_name

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping whose unknown-name error lists the names and the nearest one.

    >>> methods = Registry("method", {"fups": 1, "nops": 2})
    >>> methods["nops"]
    2
    >>> methods["nop"]
    Traceback (most recent call last):
    ...
    gradlab.checks.UsageError: Unknown method 'nop'. Did you mean 'nops'? Known: fups, nops.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise unknown_name(self.kind, name, self._entries) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
