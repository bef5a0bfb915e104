"""Serving: the socket, who may call, and the way in and out."""

import errno
import ipaddress
import logging
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlencode

from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer, create_server

from dashboards.live.app import make_app, policy
from dashboards.live.guard import LARGEST_BODY, LOOPBACK, Application, Guard
from dashboards.live.heap import configure_heap
from dashboards.live.runs import RunIndex
from gradlab.checks import UsageError, check

_THREADS = 8
_SLOW = 30  # seconds that a client may take over a request before it is let go


def serve(
    folders: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8050,
    allowed_hosts: Sequence[str] = (),
    announce: Callable[[str], None],
) -> None:
    """Serve the runs of some folders until Ctrl-C or SIGTERM.

    Args:
        folders: Run folders, or folders that hold runs at any depth. Runs alone are shown side by
            side; a folder is listed.
        host: Name or address to listen at. Others than this machine's own have to show a token,
            which the announced address holds.
        port: TCP port, 0 for any that is free.
        allowed_hosts: Further names by which browsers may call the server, as a proxy's.
        announce: Is told the address, once it answers.

    Raises:
        UsageError: If there is no run, or nothing can listen there.
    """
    check(bool(host), "host", "be a name or address of this machine", host)
    check(0 <= port <= 65535, "port", "be from 0 to 65535, 0 for any that is free", port)
    configure_heap()
    index = RunIndex(folders)
    listener, local = _listen(host, port)
    try:
        app = make_app(index)
        token = None if local else secrets.token_urlsafe(24)
        own = {host.lower()} if ":" not in host else {f"[{host.lower()}]"}
        machine = set() if local else {socket.gethostname().lower(), socket.getfqdn().lower()}
        port = listener.getsockname()[1]
        guard = Guard(
            application=app.server,
            policy=policy(app),
            hosts=LOOPBACK | own | machine | {name.lower() for name in allowed_hosts},
            addresses=not local,
            token=token,
            cookie=f"gradlab_{port}",
        )
        server = make_server(guard, listener)
    except BaseException:
        listener.close()
        raise
    names = list(index.paths()) if all(map(_is_run_itself(index), folders)) else []
    if not names:  # the list is asked for first: read it while the browser starts
        threading.Thread(target=index.rows, daemon=True).start()
    # Also of SIGINT: a shell without job control has what it starts in the background ignore it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        announce(_address(host, port, names, token))
        # Ends, and lets its threads end, at KeyboardInterrupt.
        server.run()
    except KeyboardInterrupt:  # it came before that
        server.close()


class _Connection(HTTPChannel):  # type: ignore[misc]  # waitress has no types
    """A connection that has to send each request in a while, however steadily it trickles.

    By itself waitress lets go of those alone that are silent.
    """

    _began: float | None = None

    def received(self, data: bytes) -> bool:
        """Take what has come.

        Args:
            data: Some bytes.

        Returns:
            Whether there were any, and they were taken.
        """
        took: bool = super().received(data)
        now = time.monotonic()
        if self.request is None:  # the last one is whole
            self._began = None
        elif self._began is None:
            self._began = now
        elif now - self._began > _SLOW:
            self.will_close = True
        return took


def make_server(application: Application, listener: socket.socket) -> BaseWSGIServer:
    """Have an application answer at a socket once the server is run.

    Args:
        application: What answers.
        listener: Listens.

    Returns:
        The server.
    """
    # It says in the log how many wait for a thread, which is nobody's concern here.
    logging.getLogger("waitress").setLevel(logging.ERROR)
    server = create_server(
        application,
        sockets=[listener],
        threads=_THREADS,
        max_request_body_size=LARGEST_BODY,
        channel_timeout=_SLOW,
        connection_limit=500,
        ident="",
    )
    server.channel_class = _Connection
    return server


def _is_run_itself(index: RunIndex) -> Callable[[Path], bool]:
    runs = set(index.paths().values())
    return lambda folder: folder in runs


def _listen(host: str, port: int) -> tuple[socket.socket, bool]:
    """Bind a socket, and tell whether only this machine can reach it."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UsageError(
            f"`--host` must be a name or address of this machine. Got {host!r}, which is none."
        ) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            said = f"Port {port} is taken. Choose another --port, or --port 0 for any free one."
        elif error.errno == errno.EACCES:
            said = f"Port {port} may not be used. Choose a --port from 1024 on."
        else:
            said = f"Nothing can listen at {host!r}: {error.strerror}. Choose another --host."
        raise UsageError(said) from None
    return listener, ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback


def _address(host: str, port: int, names: Sequence[str], token: str | None) -> str:
    # To listen at all addresses is no address to call.
    named = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}
    called = named.get(host, host)
    query = urlencode([*(("runs", name) for name in names), *([("token", token)] if token else [])])
    bracketed = f"[{called}]" if ":" in called else called
    return f"http://{bracketed}:{port}/" + (f"?{query}" if query else "")
