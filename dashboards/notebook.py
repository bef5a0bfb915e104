"""A run in a notebook: its panels as plotly figures, and a summary."""

import plotly.graph_objects as go

from dashboards.run_table import table_columns, table_rows
from dashboards.style import THEMES
from dashboards.text import for_html
from dashboards.view import View
from gradlab.checks import unknown_name
from gradlab.run import Run

METHODS = ("pca", "pca-3d", "tsne", "mds", "umap", "trajectories")


class Plots:
    """`run.plot`: every panel of the page as a plotly figure.

    Choices are those of `dashboards.choices.Choices`, by name: network, layer, space, estimate,
    update (the last by default), agent, other, order, colour, perplexity, quantity; and `theme`,
    "light" or "dark".
    """

    def __init__(self, run: Run) -> None:
        """Read nothing yet.

        Args:
            run: A run.
        """
        self._view = View([run])

    @property
    def panels(self) -> list[str]:
        """Names of all panels."""
        return list(self._view.panels)

    def __call__(self, panel: str, **choices: str | int) -> go.Figure:
        """Draw a panel.

        Args:
            panel: One of `panels`.
            **choices: What to show; all else as the page first shows it. `theme`: "light" or
                "dark".

        Returns:
            A figure.

        Raises:
            UsageError: If there is no such panel, choice or value.
        """
        panels = self._view.panels
        if panel not in panels:
            raise unknown_name("panel", panel, panels)
        theme = str(choices.pop("theme", THEMES[0]))
        if theme not in THEMES:
            raise unknown_name("theme", theme, THEMES)
        defaults = self._view.defaults()
        options = self._view.options(defaults.run)
        for name, value in choices.items():
            if name not in {*options, "update"} - {"tab", "run"}:
                raise unknown_name("choice", name, {*options, "update"} - {"tab", "run"})
            if name != "update" and str(value) not in options[name]:
                raise unknown_name(name, value, options[name])
        return panels[panel].figure(defaults.with_(**choices), theme)

    def embeddings(self, *, method: str = "pca", **choices: str | int) -> go.Figure:
        """Draw the agents' embeddings.

        Args:
            method: "pca", "pca-3d", "tsne", "mds", "trajectories", or "umap" if it is installed.
            **choices: As for a panel, e.g. update, network, colour, perplexity.

        Returns:
            A figure.

        Raises:
            UsageError: If there is no such method or choice.
        """
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        return self(method, **choices)

    def interference(self, *, space: str = "psi", **choices: str | int) -> go.Figure:
        """Draw the cosines between agents' gradients.

        Args:
            space: "psi" (g) or "theta" (Z).
            **choices: As for a panel, e.g. update, network, layer, estimate, order.

        Returns:
            A figure.
        """
        return self({"psi": "cosine-g", "theta": "cosine-z"}.get(space, space), **choices)

    def pair(self, agent: int, other: int, **choices: str | int) -> go.Figure:
        """Draw a pair's cosines over training, with intervals.

        Args:
            agent: One agent's number.
            other: The other's.
            **choices: As for a panel.

        Returns:
            A figure.
        """
        return self("pair-history", agent=agent, other=other, **choices)

    def coupling(self, **choices: str | int) -> go.Figure:
        """Draw the coupling of the agents.

        Args:
            **choices: As for a panel.

        Returns:
            A figure.
        """
        return self("coupling", **choices)

    def behaviour(self, **choices: str | int) -> go.Figure:
        """Draw the behavioural distances of the agents.

        Args:
            **choices: As for a panel.

        Returns:
            A figure.
        """
        return self("behavioural-distance", **choices)

    def over_training(self, quantity: str = "episode_return", **choices: str | int) -> go.Figure:
        """Draw any number over training.

        Args:
            quantity: A recorded quantity with no axes but network, space and layer.
            **choices: As for a panel.

        Returns:
            A figure.
        """
        return self("quantity-runs", quantity=quantity, **choices)


def summary(run: Run) -> str:
    """Describe a run in HTML, for a notebook.

    Args:
        run: A run.

    Returns:
        What the page's table says of it, and its problems.
    """
    view = View([run])
    problems = "".join(f"<li>{for_html(problem)}</li>" for problem in run.problems)
    return (
        f"<table><thead><tr>{table_columns()}</tr></thead>"
        f"<tbody>{table_rows(view.runs)}</tbody></table>"
        + (f"<ul>{problems}</ul>" if problems else "")
    )
