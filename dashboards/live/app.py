"""The Dash application: what browsers are sent, and what answers their questions."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable
from importlib.resources import files
from threading import Lock
from time import monotonic, time_ns
from typing import Any, TypeGuard
from urllib.parse import parse_qsl

from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update
from flask import Flask, Response, abort, request
from plotly.offline import get_plotlyjs

from dashboards.live.runs import RunIndex
from dashboards.live.watch import Watched
from dashboards.page import resource
from dashboards.text import clean
from gradlab.checks import UsageError

_VIEWS = 6  # sets of runs that are kept open
_RUNS = 200  # the most runs of a view
_PARTS = 200  # the most parts of figures in a question
_PAUSE = 1.0  # seconds between an answer and a page's next question whether anything is new
_APART = 0.1  # seconds between any two pages' questions: of many each asks more seldom
_LONGEST = 10.0  # seconds
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<title>{%title%}</title>
{%favicon%}
{%css%}
<meta name="plotly" content="PLOTLY">
STYLES
SCRIPTS
</head>
<body>
<div id="page"></div>
<div id="silent" role="alert" hidden>The server does not answer: it was ended, or is out of reach.
This page goes on when it is back.</div>
<noscript>The figures on this page are drawn by JavaScript, which is switched off.</noscript>
<div hidden>{%app_entry%}</div>
<footer hidden>
{%config%}
{%scripts%}
{%renderer%}
</footer>
</body>
</html>"""


def make_app(index: RunIndex) -> Dash:
    """Make the application.

    Args:
        index: The runs that it may show.

    Returns:
        The application; its `server` answers requests, all of them, whoever asks: see
        `dashboards.live.guard`.
    """
    sent = _sent()
    server = Flask("gradlab")
    app = Dash(
        "gradlab",
        server=server,  # type: ignore[arg-type]  # Dash says bool and means Flask as well
        title="gradlab",
        update_title="",
        include_assets_files=False,
        index_string=_page(sent),
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )

    @server.get("/files/<name>")
    def file(name: str) -> Response:
        if name not in sent:
            abort(404)
        content, kind = sent[name]
        # A new version has a new address.
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(content, mimetype=kind, headers=headers)

    app.layout = html.Div([
        dcc.Location(id="address", refresh=False),
        # No dcc.Interval: it would ask again while an answer is on its way, which Dash then drops.
        *(dcc.Store(id=name) for name in ("clock", "said", "stamp")),
    ])
    desk = _Desk(index)
    app.callback(
        Output("said", "data"),
        Input("clock", "data"),
        Input("address", "search"),
        State("stamp", "data"),
    )(desk.say)
    app.clientside_callback(
        ClientsideFunction("gradlab", "content"), Output("stamp", "data"), Input("said", "data")
    )

    # No callback: on its way through Dash an answer takes as long as its figures take to draw.
    @server.post("/figures")
    def figures() -> Response:
        texts = desk.figures(request.get_json(silent=True))
        if texts is None:
            abort(400)
        return Response("\n".join(texts), mimetype="application/x-ndjson")

    return app


def policy(app: Dash) -> str:
    """Say what a browser may load and run on the application's pages.

    Args:
        app: The application.

    Returns:
        A Content-Security-Policy: nothing from elsewhere, and no script but the application's own.
    """
    scripts = " ".join(["'self'", *app.csp_hashes()])
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; font-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Desk:
    """Answers what browsers ask; nothing that they send is more than looked up."""

    def __init__(self, index: RunIndex) -> None:
        self._index = index
        self._views: OrderedDict[tuple[str, ...], Watched] = OrderedDict()
        self._lock = Lock()
        self._started = time_ns()
        self._next = 0.0  # when the last that was answered asks again

    def say(self, clock: object, search: object, stamp: object) -> Any:  # noqa: ANN401, ARG002
        """What is shown, if it differs from what the browser has, which `stamp` says.

        And after how many milliseconds to ask again, so that a training on the same machine does
        not feel how many look on.
        """
        if not isinstance(search, str):
            return no_update  # the page has not yet said where it is
        pause = self._pause()
        return {**self._news(search, stamp, pause), "pause": round(1000 * pause)}

    def _pause(self) -> float:
        with self._lock:
            now = monotonic()
            self._next = max(now + _PAUSE, min(self._next + _APART, now + _LONGEST))
            return self._next - now

    def _news(self, search: str, stamp: object, pause: float) -> dict[str, Any]:
        try:
            names = _names(search)
            if not names:
                rows = self._index.rows()
                return _said(stamp, _digest(rows), lambda: {"rows": rows})
            watched = self._watched(names)
            generation = f"{self._started}-{id(watched)}-{watched.refresh(pause)}"
            return _said(stamp, generation, lambda: {"view": watched.page()})
        except UsageError as error:
            text = clean(error)
        except Exception:
            logging.getLogger(__name__).exception("a view could not be shown")
            text = "These runs could not be shown: see what the server printed."
        return _said(stamp, _digest(text), lambda: {"error": text})

    def figures(self, asked: object) -> list[str] | None:
        """The parts of figures that the browser asks for, or None if that is no question."""
        if not isinstance(asked, dict):
            return None
        search, query, parts = (asked.get(name) for name in ("search", "query", "parts"))
        if not isinstance(search, str) or not isinstance(query, str) or not _are_parts(parts):
            return None
        try:
            watched = self._watched(_names(search))
        except UsageError:
            return ["null"] * len(parts)
        return watched.figures(query, parts)

    def _watched(self, names: tuple[str, ...]) -> Watched:
        with self._lock:
            if names not in self._views:
                self._views[names] = Watched(self._index, names)
            self._views.move_to_end(names)
            while len(self._views) > _VIEWS:
                self._views.popitem(last=False)
            return self._views[names]


def _names(search: str) -> tuple[str, ...]:
    try:
        fields = parse_qsl(search.lstrip("?"), max_num_fields=_RUNS + 8)
    except ValueError:
        raise UsageError(f"At most {_RUNS} runs can be shown side by side.") from None
    return tuple(dict.fromkeys(value for name, value in fields if name == "runs"))


def _are_parts(parts: object) -> TypeGuard[list[list[Any]]]:
    return (
        isinstance(parts, list)
        and len(parts) <= _PARTS
        and all(
            isinstance(part, list)
            and len(part) == 2
            and isinstance(part[0], str)
            and isinstance(part[1], int)
            for part in parts
        )
    )


def _said(stamp: object, now: str, content: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"stamp": now, "content": None if stamp == now else content()}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _sent() -> dict[str, tuple[bytes, str]]:
    """The files that pages ask for, by name: content and type."""
    script, style = "text/javascript", "text/css"
    live = files("dashboards.live")
    return {
        "page.css": (resource("page.css").encode(), style),
        "live.css": ((live / "live.css").read_bytes(), style),
        "plotly.js": (get_plotlyjs().encode(), script),
        "page.js": (resource("page.js").encode(), script),
        "live.js": ((live / "live.js").read_bytes(), script),
    }


def _page(sent: dict[str, tuple[bytes, str]]) -> str:
    def address(name: str) -> str:
        return f"/files/{name}?v={hashlib.sha256(sent[name][0]).hexdigest()[:12]}"

    def lines(found: Iterable[str]) -> str:
        return "\n".join(found)

    styles = (f'<link rel="stylesheet" href="{address(n)}">' for n in sent if n.endswith(".css"))
    scripts = (
        f'<script{"" if n == "live.js" else " defer"} src="{address(n)}"></script>'
        for n in sent
        if n.endswith(".js") and n != "plotly.js"
    )
    page = _PAGE.replace("PLOTLY", address("plotly.js"))
    return page.replace("STYLES", lines(styles)).replace("SCRIPTS", lines(scripts))
