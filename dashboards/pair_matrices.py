"""Panels with a cell for every two agents: cosines, coupling, transference."""

from typing import Any

import numpy as np

from dashboards.choices import Choices
from dashboards.lines import NOT_RECORDED
from dashboards.matrices import matrix_figure, order_part, pair_part
from dashboards.panel import Figure, Panel, Part
from dashboards.similar_agents import agent_order
from dashboards.style import nothing
from dashboards.tables import Runs, RunTables
from gradlab.verdicts import UNDECIDED

NO_LAYER = (
    "undefined: this space of this network has no such layer, all of its gradients are zero, "
    "or none stands out from noise"
)
_ESTIMATE = (
    "Debiased: the true gradients' cosine, blank where a gradient's length does not stand out from "
    "noise; plug-in: of this batch, pulled towards 0 by noise. Faded: noise leaves undecided "
    "whether the pair is in conflict or aligned. Grey: undefined."
)
COSINES = {
    "psi": (
        "cosine-g",
        "Cosine of g, after sharing",
        "Below 0 (red): the two agents' gradients point against each other. This is what the "
        "trained parameters get to feel.",
        "gᵢ = Jᵢᵀ Zᵢ: agent i's gradient with respect to the trained parameters ψ. ",
    ),
    "theta": (
        "cosine-z",
        "Cosine of Z, before sharing",
        "Below 0 (red): the two agents want opposite changes of a policy, whatever is shared.",
        "Zᵢ: agent i's gradient with respect to its policy's parameters θ. ",
    ),
}
_ZEROS = (
    " 0*: a structural zero; agents without shared parameters cannot interfere, so these zeros are "
    "no measurement."
)
_NO_COUPLING = (
    "not recorded: the run was made without --diagnostics full, is not that far yet, or its "
    "generator has no coupling in closed form"
)


def structural(of: RunTables, network: str, space: str) -> bool:
    """Tell whether agents of a network share nothing that is trained.

    Args:
        of: The run's.
        network: "actor" or "critic".
        space: "psi" or "theta".

    Returns:
        Whether their cosines are zero whatever they want.
    """
    alone = of.run.method_of(network) == "nops"
    settings = of.run.config.get("network", {})
    shared = isinstance(settings, dict) and settings.get("log_std") == "shared"
    return space == "psi" and alone and not (shared and network == "actor")


def cosine_panel(runs: Runs, space: str) -> Panel:
    """Draw the cosine of every two agents' gradients at the slider's update.

    Args:
        runs: The runs by name.
        space: "psi", of g, or "theta", of Z.

    Returns:
        The panel.
    """
    name, title, reading, definition = COSINES[space]

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {
            "update": choices.update,
            "network": choices.network,
            "space": space,
            "layer": choices.layer,
        }
        if of.array("cosine") is None:
            return nothing(NOT_RECORDED)
        debiased = choices.estimate == "debiased" and of.array("cosine_debiased") is not None
        values = of.values("cosine_debiased" if debiased else "cosine", **where)
        if values is None:
            return nothing(NO_LAYER)
        if debiased:
            values = values.copy()
            np.fill_diagonal(values, np.where(np.isnan(np.diag(values)), np.nan, 1.0))
        verdict = of.values("verdict", **where)
        return matrix_figure(
            values,
            of.agents,
            unit="cosine",
            limits=(-1.0, 1.0),
            diverging=True,
            faded=None if verdict is None else verdict == UNDECIDED,
            structural_zeros=structural(of, choices.network, space),
            empty=NO_LAYER,
        )

    return Panel(
        name=name,
        title=title,
        reading=reading,
        definition=definition + _ESTIMATE + (_ZEROS if space == "psi" else ""),
        parts=_matrix_parts(runs, "cosine", draw, ("network", "layer", "estimate")),
        height=460,
    )


def coupling_panel(runs: Runs) -> Panel:
    """Draw the coupling of every two agents at the slider's update.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"update": choices.update, "network": choices.network}
        values = of.values("coupling", **where, layer=choices.layer)
        if values is None:
            known = of.array("coupling") is not None
            return nothing(NO_LAYER if known else _NO_COUPLING)
        return matrix_figure(
            values,
            of.agents,
            unit="coupling",
            limits=(-1.0, 1.0),
            diverging=True,
            structural_zeros=structural(of, choices.network, "psi"),
            empty=NO_LAYER,
        )

    return Panel(
        name="coupling",
        title="Coupling",
        reading="1: whatever one agent wants is done to the other as well; 0: the two are kept "
        "apart.",
        definition="Kᵢₖ = Jᵢ Jₖᵀ: normalised trace, in closed form. Full sharing is 1 for all "
        "pairs, no sharing 0. Recorded with --diagnostics full, every --effects-every updates."
        + _ZEROS,
        parts=_matrix_parts(runs, "coupling", draw, ("network", "layer")),
        height=460,
    )


def transference_panel(runs: Runs) -> Panel:
    """Draw what every agent's step does to every other agent's loss.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        values = of.values("transference", update=choices.update, network=choices.network)
        if values is None:
            return nothing(NOT_RECORDED)
        everything = of.values("transference", network=choices.network)
        known = np.abs(everything[np.isfinite(everything)]) if everything is not None else values
        # One agent's own step dwarfs others: the scale ends where most of them are.
        end = float(np.quantile(known, 0.95)) if known.size else 1.0
        return matrix_figure(
            -values,
            of.agents,
            unit="fall of the other's loss",
            limits=(-(end or 1e-12), end or 1e-12),
            diverging=True,
            empty=NOT_RECORDED,
            form=".1e",
            rows="agent that steps",
            columns="agent whose loss changes",
        )

    return Panel(
        name="transference",
        title="Transference",
        reading="Red: a step along the row agent's gradient makes the column agent's loss worse; "
        "blue: better.",
        definition="Fall of the column agent's held-out loss after one step along the row agent's "
        "own gradient, so minus the recorded transference, in units of the loss; of whole "
        "networks. "
        "The scale ends at the 95th percentile over training. Recorded with --diagnostics full, "
        "every --effects-every updates.",
        parts=_matrix_parts(runs, "transference", draw, ("network",)),
        height=460,
    )


def _matrix_parts(runs: Runs, quantity: str, first: Any, depends: tuple[str, ...]) -> list[Part]:  # noqa: ANN401
    def order(choices: Choices) -> list[int]:
        return agent_order(runs[choices.run], choices.order)

    return [
        Part(
            depends=("run", *depends, "update"),
            draw=first,
            updates=lambda choices: runs[choices.run].updates(quantity),
        ),
        order_part(order),
        pair_part(order),
    ]
