"""What a reader has chosen to look at; one selection moves all panels, and fits in an address."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

Options = Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One selection.

    Attributes:
        tab: Name of the tab that is open.
        run: Name of the run that panels of a single run show.
        network: "actor" or "critic".
        layer: A layer's name, or "all".
        space: "psi" (what is trained) or "theta" (what a policy takes).
        estimate: "plug-in" or "debiased", of cosines.
        update: The update to show; where there is no record of it, the newest before.
        agent: The chosen agent's number.
        other: The number of the agent that it is paired with.
        order: How matrices order the agents, "number" or "similarity".
        quantity: What the panel of any quantity shows over training.
        perplexity: Of t-SNE: "low", "default" or "high".
        colour: What embeddings are coloured by, e.g. "agent".
        against: The method that others are compared with.
    """

    tab: str = "overview"
    run: str = ""
    network: str = "actor"
    layer: str = "all"
    space: str = "psi"
    estimate: str = "plug-in"
    update: int = 0
    agent: int = 0
    other: int = 1
    order: str = "number"
    quantity: str = "episode_return"
    perplexity: str = "default"
    colour: str = "agent"
    against: str = ""

    def with_(self, **changes: str | int) -> "Choices":
        """Choose something else.

        Args:
            **changes: New values by name; numbers may be given as text.

        Returns:
            A new selection.
        """
        numbers = {"update", "agent", "other"}
        typed: dict[str, Any] = {n: int(v) if n in numbers else str(v) for n, v in changes.items()}
        return replace(self, **typed)

    def query(self) -> str:
        """Write the selection as an address's query, without the question mark.

        Returns:
            All choices that are not empty, escaped.

        >>> Choices(run="a b", update=3).query().split("&")[:3]
        ['tab=overview', 'run=a+b', 'network=actor']
        """
        return urlencode({name: value for name, value in asdict(self).items() if value != ""})

    def read(self, query: str, options: Options) -> "Choices":
        """Choose what an address says; what is unknown or can't be had is passed over.

        Args:
            query: An address's query, from anybody.
            options: By name what can be chosen; names that it lacks stay as they are, but
                `update`, which may be any number from 0.

        Returns:
            A new selection.

        >>> Choices().read("network=critic&layer=x&update=7", {"network": ["actor", "critic"]})
        ... # doctest: +ELLIPSIS
        Choices(tab='overview', run='', network='critic', layer='all', ..., update=7, ...)
        """
        known = {field.name for field in fields(self)}
        changes: dict[str, str | int] = {}
        for name, value in parse_qsl(query.lstrip("?#"), max_num_fields=64):
            if name == "update":
                if value.isascii() and value.isdigit() and len(value) < 12:
                    changes[name] = value
            elif name in known and value in options.get(name, ()):
                changes[name] = value
        return self.with_(**changes)
