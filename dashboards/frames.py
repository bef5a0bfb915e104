"""All figures of a panel, for a page that can't ask for one: what differs between them, packed."""

import base64
import gzip
import json
from collections.abc import Iterator
from itertools import product
from typing import Any

from dashboards.panel import Figure, Panel, Part
from dashboards.view import View

SEPARATOR = "\u001f"  # a control character, which no cleaned name holds


def packed(view: View, panel: Panel) -> Iterator[tuple[int, str, str]]:
    """Draw a panel for all that can be chosen.

    Args:
        view: What can be chosen.
        panel: The panel.

    Yields:
        For each part and each run (or "" if the part does not depend on it): the part's number,
        the run's name and base64 of gzipped JSON: `base`, a figure; `frames`, what to change in
        it; `at`, the place of the frame for the values of the part's choices, without the run's,
        joined by `SEPARATOR`; `updates`, if an update has to be looked up there first.
    """
    for number, part in enumerate(panel.parts):
        runs = list(view.runs) if "run" in part.depends else [""]
        for run in runs:
            text = json.dumps(
                _chunk(view, part, run, whole=number == 0), allow_nan=False, separators=(",", ":")
            )
            # Without the time, so that the same runs make the same page.
            yield number, run, base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _chunk(view: View, part: Part, run: str, *, whole: bool) -> dict[str, Any]:
    defaults = view.defaults()
    choices = defaults.with_(run=run) if run else defaults
    options = view.options(choices.run)
    names = [name for name in part.depends if name != "run"]
    updates = part.updates(choices) if part.updates else None
    options["update"] = [str(u) for u in (view.stops() if updates is None else updates)] or ["0"]
    base: Figure | None = None
    frames: list[Figure] = []
    places: dict[str, int] = {}
    at: dict[str, int] = {}
    for values in product(*(options[name] for name in names)):
        chosen = choices.with_(**dict(zip(names, values, strict=True)))
        if part.symmetric and chosen.agent >= chosen.other and len(options["agent"]) > 1:
            continue
        figure = part.draw(chosen)
        if whole:
            base = base or figure
            figure = difference(base, figure)
        # Many choices make no difference, as a layer to what knows no layers.
        text = json.dumps(figure)
        if text not in places:
            places[text] = len(frames)
            frames.append(figure)
        at[SEPARATOR.join(values)] = places[text]
    return {"base": base, "frames": frames, "at": at, "updates": updates}


def difference(base: Figure, figure: Figure) -> Figure:
    """Find what changes from one figure to another.

    Args:
        base: A figure.
        figure: Another.

    Returns:
        For each trace the entries that differ, None for what is gone, and the same for the layout;
        or {"whole": figure} if their traces are not of the same kinds.
    """
    kinds = ([trace["type"] for trace in f["data"]] for f in (base, figure))
    if next(kinds) != next(kinds):
        return {"whole": figure}
    changes = {
        "data": [_changed(old, new) for old, new in zip(base["data"], figure["data"], strict=True)],
        "layout": _changed(base["layout"], figure["layout"]),
    }
    return changes if any(changes["data"]) else {"layout": changes["layout"]}


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {
        name: new.get(name)
        for name in [*new, *(old.keys() - new.keys())]
        if old.get(name) != new.get(name)
    }


def unpacked(text: str) -> dict[str, Any]:
    """Read what `packed` wrote, as the page's script does.

    Args:
        text: Base64 of gzipped JSON.

    Returns:
        What was packed.
    """
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(text)))
    return found
