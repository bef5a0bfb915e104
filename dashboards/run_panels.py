"""The panels of one run: its heatmaps and embeddings, or why there are none."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from analyses.curves import evenly_spaced
from analyses.embeddings import pca, tsne
from dashboards.colours import Mark, agent_marks
from dashboards.embedding_panels import pca_panel, tsne_panel
from dashboards.heatmap_panel import heatmap_panel
from dashboards.panel import Panel, message_panel
from dashboards.run_table import agent_names
from gradlab.run import Run

MOST_UPDATES = 40
_FEWEST_UPDATES = 8
_MOST_CELLS = 400_000  # of a run's heatmaps, about 2.5 MB
_COSINE_DIMS = ("update", "network", "space", "layer", "agent", "agent_other")
NOT_RECORDED = (
    "not recorded: the run was made without these diagnostics, is not that far yet, "
    "or its records are damaged"
)
_COSINE = (
    "Cosine similarity of two agents' gradients, g·g' / (|g| |g'|): plug-in estimate from one "
    "batch. The cosine of noisy gradients is biased towards 0. Grey: undefined."
)
_NEGATIVE = "Below 0 (red): the two agents' gradients point against each other."
_SPACES = {
    "psi": (
        "Cosine of g, after sharing",
        f"{_NEGATIVE} This is what the trained parameters get to feel.",
        "gᵢ = Jᵢᵀ Zᵢ: agent i's gradient with respect to the trained parameters ψ. " + _COSINE,
    ),
    "theta": (
        "Cosine of Z, before sharing",
        f"{_NEGATIVE} This is what the agents want of a policy, whatever is shared.",
        "Zᵢ: agent i's gradient with respect to its policy's parameters θ. " + _COSINE,
    ),
}


@dataclass(frozen=True)
class RunPanels:
    """One run's section of the page.

    Attributes:
        panels: In reading order.
        agents: The agents' marks.
        drawn: Updates that are drawn.
        recorded: How many updates there are.
    """

    panels: list[Panel]
    agents: list[Mark]
    drawn: list[int]
    recorded: int


def run_panels(run: Run) -> RunPanels:
    """Read one run's diagnostics and lay out its panels.

    Args:
        run: A run.

    Returns:
        Its panels; what was not recorded is said in the panel's place.
    """
    cosine = with_axes(run, "cosine", _COSINE_DIMS)
    embeddings = {
        network: points
        for network, points in run.embeddings.items()
        if points.dims == ("update", "agent", "feature") and points.size
    }
    arrays = [*([] if cosine is None else [cosine]), *embeddings.values()]
    recorded = sorted({int(update) for array in arrays for update in array["update"].to_numpy()})
    drawn = evenly_spaced(recorded, _limit(cosine))
    agents = max([0, *(array.sizes["agent"] for array in arrays)])
    embeddings = {n: points for n, points in embeddings.items() if points.sizes["agent"] == agents}
    marks = agent_marks(agent_names(run, agents))
    panels = [*_heatmaps(run, cosine, drawn, marks), *_embeddings(embeddings, drawn, marks)]
    return RunPanels(panels, marks, drawn, len(recorded))


def with_axes(run: Run, quantity: str, dims: tuple[str, ...]) -> xr.DataArray | None:
    """Read a quantity if it was recorded as expected.

    Args:
        run: A run.
        quantity: Its name.
        dims: The axes that are asked for.

    Returns:
        The quantity, or None if it is missing, empty, or has other axes (which is noted in the
        run's problems).
    """
    if quantity not in run.quantities:
        return None
    array = run.quantity(quantity)
    if array.dims != dims:
        run.problems.append(f"{quantity} has axes {array.dims}, expected {dims}: it is not shown")
        return None
    return array if array.size else None


def _limit(cosine: xr.DataArray | None) -> int:
    if cosine is None:
        return MOST_UPDATES
    cells = int(np.prod(cosine.shape[1:]))
    return int(np.clip(_MOST_CELLS // cells, _FEWEST_UPDATES, MOST_UPDATES))


def _heatmaps(
    run: Run, cosine: xr.DataArray | None, drawn: list[int], marks: list[Mark]
) -> list[Panel]:
    panels = []
    for space, (title, reading, definition) in _SPACES.items():
        if cosine is None or space not in cosine["space"].to_numpy():
            panels.append(message_panel(title, reading, definition, NOT_RECORDED))
            continue
        kept = cosine.sel(space=space, update=cosine["update"].isin(drawn))
        panels.append(
            heatmap_panel(
                kept,
                [mark.label for mark in marks],
                title=title,
                reading=reading,
                definition=definition,
                structural_zeros=space == "psi" and run.method == "nops",
            )
        )
    return panels


def _embeddings(
    embeddings: dict[str, xr.DataArray], drawn: list[int], marks: list[Mark]
) -> list[Panel]:
    if not embeddings:
        return [
            message_panel(title, reading, "", NOT_RECORDED)
            for title, reading in (
                ("Embeddings: principal components", "Points close together: similar agents."),
                ("Embeddings: t-SNE", "Shows who is next to whom."),
            )
        ]
    definition = " ".join(
        f"{network.capitalize()}: {points.attrs['estimator'] or 'one row for each agent'}."
        for network, points in embeddings.items()
    )
    updates = {
        network: [int(u) for u in points["update"].to_numpy() if u in drawn]
        for network, points in embeddings.items()
    }
    return [
        pca_panel(
            {network: pca(points) for network, points in embeddings.items()},
            updates,
            marks,
            definition=definition,
        ),
        tsne_panel(
            {
                network: tsne(points.sel(update=updates[network]))
                for network, points in embeddings.items()
            },
            marks,
            definition=definition,
        ),
    ]
