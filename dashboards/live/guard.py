"""What the server answers, to whom, and what a browser may do with it."""

import hmac
import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]

LARGEST_BODY = 65_536  # bytes; what the page asks for takes a few hundred
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_QUESTIONS = ("/_dash-update-component", "/figures")
_PAGES = ("/", "/_dash-layout", "/_dash-dependencies", "/_favicon.ico", *_QUESTIONS)
_FOLDERS = ("/_dash-component-suites/", "/files/")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Stands before the application: what it does not know, it refuses.

    Attributes:
        application: What answers.
        policy: Content-Security-Policy of every answer.
        hosts: Names in lower case, without port, by which the server may be called. Another name
            is that of a page elsewhere whose owner made it resolve to this machine.
        addresses: Whether any address in numbers may be called as well, which no name can be made
            to resolve to.
        token: What a browser has to show once, in the address; it is given a cookie for it.
        cookie: That cookie's name; browsers do not keep cookies apart by port.
    """

    application: Application
    policy: str
    hosts: frozenset[str] = LOOPBACK
    addresses: bool = False
    token: str | None = None
    cookie: str = "gradlab"

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request (PEP 3333).

        Args:
            environ: The request.
            start_response: Takes status and headers.

        Returns:
            The body.
        """
        headers = [
            ("Content-Security-Policy", self.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ]

        def start(status: str, own: list[tuple[str, str]], *rest: object) -> object:
            ours = {name.lower() for name, _ in headers}
            kept = [(name, value) for name, value in own if name.lower() not in ours]
            if not any(name.lower() == "cache-control" for name, _ in kept):
                kept.append(("Cache-Control", "no-store"))
            return start_response(status, [*kept, *headers], *rest)

        try:
            refused = self._refusal(environ)
            if refused is None and self.token is not None and not self._shows_cookie(environ):
                return self._ask_for_token(environ, start)
        except ValueError:  # of what is no address, or has more parts than one
            refused = HTTPStatus.BAD_REQUEST, "That is no question."
        if refused is not None:
            return _plain(start, *refused)
        return self.application(environ, start)

    def _refusal(self, environ: Environ) -> tuple[HTTPStatus, str] | None:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        host = environ.get("HTTP_HOST", "")
        if not self._is_ours(host):
            return HTTPStatus.FORBIDDEN, "This server is not called by that name."
        if method not in {"GET", "HEAD", "POST"} or (method == "POST") != (path in _QUESTIONS):
            return HTTPStatus.METHOD_NOT_ALLOWED, "This server only shows."
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return HTTPStatus.FORBIDDEN, "Another site's page may not ask this server."
        # A link elsewhere may lead here; nothing else there may use what is here.
        foreign = environ.get("HTTP_SEC_FETCH_SITE", "none") not in {"same-origin", "none"}
        followed = environ.get("HTTP_SEC_FETCH_DEST") == "document" and method == "GET"
        if foreign and not (followed and path == "/"):
            return HTTPStatus.FORBIDDEN, "Another site's page may not ask this server."
        length = environ.get("CONTENT_LENGTH") or "0"
        if not (length.isascii() and length.isdigit()) or int(length) > LARGEST_BODY:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "That is too much."
        if ".." in path or not (path in _PAGES or path.startswith(_FOLDERS)):
            return HTTPStatus.NOT_FOUND, "There is no such page. The runs are listed at /."
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name = (parts.hostname or "").lower()
            _ = parts.port  # raises if it is none
        except ValueError:
            return False
        if parts.netloc != host or "@" in host:
            return False
        if name in self.hosts or f"[{name}]" in self.hosts:
            return True
        return self.addresses and _is_address(name)

    def _shows_cookie(self, environ: Environ) -> bool:
        try:
            shown = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(self.cookie)
        except CookieError:
            return False
        return shown is not None and self._is_token(shown.value)

    def _is_token(self, text: str) -> bool:
        # Taking the same time for every wrong token, it can't be guessed letter by letter.
        return self.token is not None and hmac.compare_digest(text.encode(), self.token.encode())

    def _ask_for_token(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        query = parse_qsl(environ.get("QUERY_STRING", ""), max_num_fields=64)
        given = [value for name, value in query if name == "token"]
        if environ["PATH_INFO"] != "/" or not any(self._is_token(value) for value in given):
            said = "This server needs its token: open the address that it printed."
            return _plain(start, HTTPStatus.UNAUTHORIZED, said)
        rest = urlencode([pair for pair in query if pair[0] != "token"])
        cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Lax"
        # On to the same address without the token, which then stands in no history or screenshot.
        start(
            "303 See Other",
            [("Location", f"/?{rest}" if rest else "/"), ("Set-Cookie", cookie)],
        )
        return []


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _plain(start: StartResponse, status: HTTPStatus, text: str) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET, HEAD"))
    start(f"{status.value} {status.phrase}", headers)
    return [body]
