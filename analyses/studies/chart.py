"""Line charts and scatter plots as small SVG files, for reports that any viewer shows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from analyses.studies.verdict import Estimate

_WIDTH, _HEIGHT = 300, 210
_LEFT, _TOP, _RIGHT, _BOTTOM = 44, 34, 12, 40
_ROW = 18
_LETTER = 6  # about as wide as a letter
_ASIDE = 3.0
# Okabe and Ito (2008), but for their yellow; and two of Tol's muted ones (2021).
_COLOURS = (
    *("#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#000000", "#888888"),
    *("#882255", "#999933"),
)
_GREY = "#888888"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel.

    Attributes:
        name: What the legend calls it; lines of the same name in several panels are one entry.
        values: Its heights, NaN where there is none.
        low: Lower ends of the heights' intervals; NaN, or empty, where there is none.
        high: Their upper ends.
        dashed: Whether it is dashed.
    """

    name: str
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False

    @classmethod
    def of(cls, name: str, estimates: Sequence[Estimate]) -> "Line":
        """Make a line of estimates with their intervals.

        Args:
            name: What the legend calls it.
            estimates: Its points.

        Returns:
            The line.
        """
        return cls(
            name=name,
            values=[x.value for x in estimates],
            low=[x.low for x in estimates],
            high=[x.high for x in estimates],
        )


@dataclass(frozen=True)
class Numbers:
    """A horizontal axis of numbers.

    Attributes:
        title: What they are.
        at: Where the lines' points stand, ascending.
        ticks: Numbers that are labelled; the first and last are its limits.
    """

    title: str
    at: Sequence[float]
    ticks: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot.

    Attributes:
        title: What its heights are.
        lines: What it shows.
        ticks: Heights that are labelled; the first and last are its limits.
        marks: Heights of grey lines: what is true.
        across: Its own axis of numbers, on which intervals are bands; None: the chart's labels.
    """

    title: str
    lines: Sequence[Line]
    ticks: Sequence[float]
    marks: Sequence[float] = ()
    across: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """One scatter plot, of a single scale for both axes.

    Attributes:
        title: What it shows.
        across: What the horizontal axis is.
        up: What the vertical axis is.
        points: Where each point lies, horizontally and vertically.
        marks: What stands there for it: a letter or number.
        groups: What each point is of; points of the same group have one colour in all plots.
    """

    title: str
    across: str
    up: str
    points: Sequence[tuple[float, float]]
    marks: Sequence[str]
    groups: Sequence[str]


def scatter(clouds: Sequence[Cloud]) -> str:
    """Draw scatter plots side by side.

    Args:
        clouds: The plots.

    Returns:
        An SVG file.
    """
    names = list(dict.fromkeys(name for cloud in clouds for name in cloud.groups))
    parts = _begin(len(clouds), len(names))
    for number, cloud in enumerate(clouds):
        parts.append(f'<g transform="translate({number * _WIDTH} 0)">')
        parts += _cloud(cloud, names)
        parts.append("</g>")
    for row, name in enumerate(names):
        y = _HEIGHT + _ROW * row + 10
        parts.append(f'<circle cx="{_LEFT + 15}" cy="{y}" r="4" fill="{_colour(row)}"/>')
        parts.append(f'<text x="{_LEFT + 38}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _begin(panels: int, names: int) -> list[str]:
    width, height = _WIDTH * panels, _HEIGHT + _ROW * names + 8
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]


def _cloud(cloud: Cloud, names: Sequence[str]) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    rows = [point for point in cloud.points if all(map(math.isfinite, point))]
    ends = [(min(axis), max(axis)) for axis in zip(*rows, strict=True)] or [(0.0, 0.0)] * 2
    spans = [high - low for low, high in ends]
    # One scale for both axes, and room for the marks.
    scale = min(
        (room - 16) / span if span > 0 else math.inf
        for room, span in zip((right - _LEFT, bottom - _TOP), spans, strict=True)
    )
    scale = scale if math.isfinite(scale) else 0.0
    middle = [(low + high) / 2 for low, high in ends]
    parts = [
        f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(cloud.title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}" '
        'fill="none" stroke="#e5e5e5"/>',
        f'<text x="{(_LEFT + right) / 2}" y="{bottom + 15}" text-anchor="middle">'
        f"{escape(cloud.across)}</text>",
        f'<text transform="translate({_LEFT - 8} {(_TOP + bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(cloud.up)}</text>',
    ]
    for point, mark, group in zip(cloud.points, cloud.marks, cloud.groups, strict=True):
        if all(map(math.isfinite, point)):
            x = (_LEFT + right) / 2 + scale * (point[0] - middle[0])
            y = (_TOP + bottom) / 2 - scale * (point[1] - middle[1])
            parts.append(
                f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" '
                f'fill="{_colour(names.index(group))}">{escape(mark)}</text>'
            )
    return parts


def chart(panels: Sequence[Panel], labels: Sequence[str] = (), axis: str = "") -> str:
    """Draw panels side by side.

    Args:
        panels: The panels.
        labels: Labels of the lines' points, equally spaced, in panels without an axis of numbers.
        axis: What the labels are.

    Returns:
        An SVG file.
    """
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    parts = _begin(len(panels), len(names))
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number * _WIDTH} 0)">')
        parts += _panel(panel, labels, axis, names)
        parts.append("</g>")
    for row, name in enumerate(names):
        y = _HEIGHT + _ROW * row + 10
        dashed = any(x.dashed for panel in panels for x in panel.lines if x.name == name)
        stroke = _stroke(names.index(name), dashed)
        parts.append(f'<path d="M{_LEFT} {y}h30" {stroke}/>')
        parts.append(f'<text x="{_LEFT + 38}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def ticks_for(estimates: Sequence[Estimate]) -> tuple[float, ...]:
    """Choose round heights that hold estimates, their intervals and 0.

    Args:
        estimates: What is to be drawn; what is not finite does not count.

    Returns:
        Heights for a panel's ticks.

    >>> ticks_for([Estimate(0.3, 0.1, 0.7)])
    (0.0, 0.2, 0.4, 0.6, 0.8)
    """
    numbers = (x for estimate in estimates for x in estimate.numbers().values())
    finite = [x for x in numbers if math.isfinite(x)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    rough = (high - low or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return tuple(round(number * step, 12) for number in range(first, max(last, first + 1) + 1))


def _panel(panel: Panel, labels: Sequence[str], axis: str, names: Sequence[str]) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    low, high = panel.ticks[0], panel.ticks[-1]
    across = panel.across
    if across is None:
        places: Sequence[float] = [float(place) for place in range(len(labels))]
        begin, end = -0.5, len(labels) - 0.5
        named = list(zip(places, labels, strict=True))
    else:
        places = across.at
        begin, end = across.ticks[0], across.ticks[-1]
        named = [(tick, f"{tick:g}") for tick in across.ticks]
        axis = across.title

    def x(place: int | float) -> float:
        return _LEFT + (right - _LEFT) * (place - begin) / (end - begin)

    def y(value: float) -> float:
        return bottom - (bottom - _TOP) * (min(max(value, low), high) - low) / (high - low)

    parts = [f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(panel.title)}</text>']
    for tick in panel.ticks:
        parts.append(f'<path d="M{_LEFT} {y(tick):.1f}H{right}" stroke="#e5e5e5"/>')
        parts.append(
            f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    parts += [f'<path d="M{_LEFT} {y(m):.1f}H{right}" stroke="{_GREY}"/>' for m in panel.marks]
    room = (right - _LEFT) / len(named)
    crowded = across is None and max(map(len, labels)) * _LETTER > room
    lines = (15, 26) if crowded else (15, 15)  # every other label below its neighbours
    parts += [
        f'<text x="{x(place):.1f}" y="{bottom + lines[number % 2]}" '
        f'text-anchor="middle">{escape(label)}</text>'
        for number, (place, label) in enumerate(named)
    ]
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{bottom + (38 if crowded else 31)}" '
        f'text-anchor="middle">{escape(axis)}</text>'
    )
    for number, line in enumerate(panel.lines):
        # Side by side, so that intervals do not hide each other.
        beside = line.low and across is None
        aside = _ASIDE * (number - (len(panel.lines) - 1) / 2) if beside else 0.0
        parts += _line(
            line,
            [x(place) + aside for place in places],
            y,
            number=names.index(line.name),
            dense=across is not None,
        )
    return parts


def _line(
    line: Line, x: Sequence[float], y: Callable[[float], float], *, number: int, dense: bool
) -> list[str]:
    """Draw a line: with a point and an upright interval at each place, or if dense with a band."""
    points = [
        f"{at:.1f} {y(value):.1f}"
        for at, value in zip(x, line.values, strict=True)
        if math.isfinite(value)
    ]
    if not points:
        return []
    colour = _colour(number)
    spans = [
        (at, y(below), y(above))
        for at, below, above in zip(x, line.low, line.high, strict=False)
        if math.isfinite(below) and math.isfinite(above)
    ]
    path = f'<path d="M{" L".join(points)}" {_stroke(number, line.dashed)}/>'
    if dense:
        around = [f"{at:.1f} {below:.1f}" for at, below, _ in spans]
        around += [f"{at:.1f} {above:.1f}" for at, _, above in reversed(spans)]
        band = f'<path d="M{" L".join(around)}Z" fill="{colour}" opacity="0.15"/>'
        return [*([band] if spans else []), path]
    circles = [
        f'<circle cx="{point.split()[0]}" cy="{point.split()[1]}" r="2.5" fill="{colour}"/>'
        for point in points
    ]
    upright = [
        f'<path d="M{at:.1f} {below:.1f}V{above:.1f}" {_stroke(number, False)}/>'
        for at, below, above in spans
    ]
    return [path, *circles, *upright]


def _stroke(number: int, dashed: bool) -> str:
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    return f'fill="none" stroke="{_colour(number)}" stroke-width="2"{dash}'


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
