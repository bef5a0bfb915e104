"""Colours and markers: one for each agent and one for each run, the same on the whole page."""

from dataclasses import dataclass

import plotly.colors

# Okabe and Ito, "Color Universal Design", 2008: told apart with every kind of colour blindness;
# grey for black, which is lost on a dark page.
OKABE_ITO = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#7F7F7F",
    "#C9B800",
)
# Tol, "Colour Schemes", 2021, bright: runs must not look like agents.
_RUNS = (
    "#4477AA",
    "#EE6677",
    "#228833",
    "#B59410",
    "#AA3377",
    "#33A5C6",
    "#888888",
    "#EE7733",
)
_MANY: tuple[str, ...] = (
    *plotly.colors.qualitative.Dark24,
    *plotly.colors.qualitative.Light24,
)
# Beyond eight, colours alone are not told apart safely: shapes change with every eighth agent.
_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "star")

# ColorBrewer's red-white-blue, safe for colour blindness: for what has a zero, red for conflict.
DIVERGING = (
    (0.0, "#b2182b"),
    (0.25, "#f08a6c"),
    (0.5, "#f7f7f7"),
    (0.75, "#6aaed6"),
    (1.0, "#2166ac"),
)
# Nuñez, Anderton and Renslow, "cividis", 2018: perceptual, for what starts at zero.
SEQUENTIAL = tuple((n / 9, colour) for n, colour in enumerate(plotly.colors.sequential.Cividis))
UNDEFINED = "#a9b0b8"
FADED = "rgba(226,229,233,0.7)"  # over the cells that noise leaves undecided


@dataclass(frozen=True)
class Mark:
    """How one agent or one run looks.

    Attributes:
        label: Its name, not escaped.
        colour: As "#rrggbb".
        shape: Plotly's marker symbol.
    """

    label: str
    colour: str
    shape: str


def agent_marks(names: list[str]) -> list[Mark]:
    """Give each agent its colour, which depends on its number alone.

    Args:
        names: The agents' names in order.

    Returns:
        One mark for each agent.
    """
    palette = OKABE_ITO if len(names) <= len(OKABE_ITO) else _MANY
    return [
        Mark(
            name,
            palette[number % len(palette)],
            _SHAPES[number // len(OKABE_ITO) % len(_SHAPES)],
        )
        for number, name in enumerate(names)
    ]


def run_marks(names: list[str]) -> list[Mark]:
    """Give each run its colour.

    Args:
        names: The runs' names, made distinct.

    Returns:
        One mark for each run.
    """
    return [
        Mark(name, _RUNS[number % len(_RUNS)], _SHAPES[number // len(_RUNS) % len(_SHAPES)])
        for number, name in enumerate(names)
    ]
