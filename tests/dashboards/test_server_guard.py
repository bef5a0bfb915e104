import http.client
import importlib
import socket
import threading
import time
from contextlib import closing

import pytest

from dashboards.live.guard import LARGEST_BODY, Guard

serve = importlib.import_module("dashboards.live.serve")  # the package has a function of that name
POST = {"REQUEST_METHOD": "POST", "PATH_INFO": "/_dash-update-component"}


def answers(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/html"), ("X-Frame-Options", "ALLOWALL")])
    return [environ["PATH_INFO"].encode()]


def ask(guard, **environ):
    """Status, headers and body of the answer to a request."""
    said = {}

    def start(status, headers):
        said["status"], said["headers"] = int(status.split()[0]), dict(headers)

    request = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "HTTP_HOST": "localhost:8050"}
    body = b"".join(guard(request | environ, start))
    return said["status"], said["headers"], body.decode()


@pytest.fixture
def guard():
    return Guard(application=answers, policy="default-src 'none'")


@pytest.mark.parametrize("host", ["localhost:8050", "LOCALHOST", "127.0.0.1:9", "[::1]:8050"])
def test_this_machine_is_answered(guard, host):
    status, headers, body = ask(guard, HTTP_HOST=host)
    assert (status, body) == (200, "/")
    assert headers["Content-Security-Policy"] == "default-src 'none'"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8050", "localhost.evil.example", "127.0.0.1.nip.io"),
        *("", "localhost:x", "a@localhost", "localhost/", "192.168.0.1", "[::1", "10.0.0.1:8050"),
    ],
)
def test_a_name_made_to_resolve_here_is_refused(guard, host):
    assert ask(guard, HTTP_HOST=host)[0] == 403


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "X"])
@pytest.mark.parametrize("path", ["/", "/_dash-update-component", "/files/page.js"])
def test_only_reading_is_answered(guard, method, path):
    status, headers, _ = ask(guard, REQUEST_METHOD=method, PATH_INFO=path)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_only_questions_are_posted(guard):
    for question in (POST, POST | {"PATH_INFO": "/figures"}):
        assert ask(guard, **question)[0] == 200
        assert ask(guard, **question | {"REQUEST_METHOD": "GET"})[0] == 405
    assert ask(guard, **POST | {"PATH_INFO": "/"})[0] == 405


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "null", "http://localhost:8051", "http://localhost"),
        *("file://", "http://localhost:8050.evil.example", "http://x@evil.example:8050"),
    ],
)
def test_a_question_from_another_sites_page_is_refused(guard, origin):
    assert ask(guard, **POST, HTTP_ORIGIN=origin)[0] == 403
    assert ask(guard, **POST, HTTP_ORIGIN="http://localhost:8050")[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "unheard-of"])
def test_another_site_may_link_here_and_nothing_else(guard, site):
    link = {"HTTP_SEC_FETCH_SITE": site, "HTTP_SEC_FETCH_DEST": "document"}
    assert ask(guard, **link)[0] == 200
    for foreign in (
        link | {"HTTP_SEC_FETCH_DEST": "iframe"},
        link | {"HTTP_SEC_FETCH_DEST": "script", "PATH_INFO": "/files/page.js"},
        link | {"PATH_INFO": "/_dash-layout"},
        link | POST,
    ):
        assert ask(guard, **foreign)[0] == 403
    assert ask(guard, **POST, HTTP_SEC_FETCH_SITE="same-origin")[0] == 200


@pytest.mark.parametrize("length", [str(LARGEST_BODY + 1), "9" * 30, "-1", "x", "\u00b2"])
def test_large_bodies_are_refused(guard, length):
    assert ask(guard, **POST, CONTENT_LENGTH=length)[0] == 413
    assert ask(guard, **POST, CONTENT_LENGTH=str(LARGEST_BODY))[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/../etc/passwd", "/etc/passwd", "//etc/passwd", "/runs/x", "/_reload-hash", "/assets/x"),
        *(
            "/..\\..\\etc",
            "/%2e%2e/etc",
            "/..;/etc",
            "/\x00",
            "/a" * 5000,
            "",
            "/_mcp",
            "/files/../x",
        ),
    ],
)
def test_no_path_but_the_known_is_answered(guard, path):
    status, _, body = ask(guard, PATH_INFO=path)
    assert status == 404
    assert "etc" not in body


def test_a_server_for_others_asks_for_its_token():
    guard = Guard(application=answers, policy="", token="s3cret", cookie="c", addresses=True)
    other = {"HTTP_HOST": "192.168.0.7:8050"}
    for given in (
        {},
        {"QUERY_STRING": "token=s3cre"},
        {"HTTP_COOKIE": "c=x"},
        {"HTTP_COOKIE": "="},
    ):
        status, headers, _ = ask(guard, **other, **given)
        assert (status, "Set-Cookie" in headers) == (401, False)
    status, headers, _ = ask(guard, **other, QUERY_STRING="runs=a%26b&token=s3cret&runs=c")
    assert (status, headers["Location"]) == (303, "/?runs=a%26b&runs=c")
    assert headers["Set-Cookie"] == "c=s3cret; Path=/; HttpOnly; SameSite=Lax"
    assert ask(guard, **other, HTTP_COOKIE="d=1; c=s3cret")[0] == 200
    post = POST | other
    assert ask(guard, **post, QUERY_STRING="token=s3cret")[0] == 401
    assert ask(guard, **post, HTTP_COOKIE="c=s3cret")[0] == 200
    assert ask(guard, HTTP_HOST="evil.example", HTTP_COOKIE="c=s3cret")[0] == 403


@pytest.mark.parametrize("token", [None, "secret"])
@pytest.mark.parametrize(
    "question", [{"HTTP_ORIGIN": "http://[::1"}, {"QUERY_STRING": "&".join(["a=1"] * 70)}]
)
def test_what_is_no_question_is_told_so_in_a_line(token, question):
    guard = Guard(application=answers, policy="default-src 'none'", token=token)
    status, headers, body = ask(guard, **question)
    parsed_by_guard = token or "HTTP_ORIGIN" in question
    assert status == (400 if parsed_by_guard else 200)
    assert headers["Content-Security-Policy"] == "default-src 'none'"
    assert body.count("\n") == (1 if parsed_by_guard else 0)


def trickle(connection):
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.1)


def test_who_sends_a_request_bit_by_bit_is_let_go(monkeypatch):
    monkeypatch.setattr(serve, "_SLOW", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        server = serve.make_server(answers, listener)
        threading.Thread(target=server.run, daemon=True).start()
        with socket.create_connection(address, timeout=30) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000\r\n\r\n")
            with pytest.raises(ConnectionError):
                trickle(slow)
        with closing(http.client.HTTPConnection(*address, timeout=30)) as quick:
            quick.connect()
            kept = quick.sock
            for _ in range(15):  # many requests in a connection may take as long as they like
                quick.request("GET", "/")
                answer = quick.getresponse()
                assert (answer.status, answer.read()) == (200, b"/")
                assert quick.sock is kept
                time.sleep(0.1)
        server.close()
