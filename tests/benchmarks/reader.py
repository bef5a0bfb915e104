"""What the served page asks of a server, asked by plain HTTP: a browser's load without a browser."""

import http.client
import json
import re
import threading
import time
from urllib.parse import urlencode, urlsplit

IN_SIGHT = 4  # panels of a tab that a window shows
_STAMP, _PAUSE = re.compile(rb'"stamp":\s*"([^"]*)"'), re.compile(rb'"pause":\s*(\d+)')


class Reader:
    """A page that is open at one tab and follows the newest update.

    One that is not thorough takes no answer apart after the first, which costs more than to give it:
    many such readers load the server and hardly the machine that they share with it.

    Attributes:
        asked: How many requests were answered.
        pages: How often what is shown had changed.
        bytes: How much was received.
        slowest: Seconds of the longest answer.
        pause: Seconds until it is to look again, as the server said.
    """

    def __init__(self, address, tab="interference", *, thorough=True):
        parts = urlsplit(address)
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        self._search = f"?{parts.query}"
        self._tab = tab
        self._thorough = thorough
        self._stamp = None
        self.page = None
        self.asked = self.pages = self.bytes = 0
        self.slowest, self.pause = 0.0, 1.0

    def open(self):
        """Fetch the page and its files, as a browser that has not been here."""
        text = self.ask("GET", f"/{self._search}").decode()
        for address in re.findall(r'(?:src|href|content)="(/[^"]+)"', text):
            self.ask("GET", address)
        for path in ("/_dash-layout", "/_dash-dependencies"):
            self.ask("GET", path)

    def look(self):
        """Ask whether anything is new, and for the figures in sight if so.

        Returns:
            The newest update that can be looked at, None if there is none; that of the first time
            if it is not thorough.
        """
        question = {
            "output": "said.data",
            "outputs": {"id": "said", "property": "data"},
            "inputs": [
                {"id": "clock", "property": "data", "value": time.time_ns() // 10**6},
                {"id": "address", "property": "search", "value": self._search},
            ],
            "changedPropIds": ["clock.data"],
            "state": [{"id": "stamp", "property": "data", "value": self._stamp}],
        }
        text = self.ask("POST", "/_dash-update-component", question)
        if self._thorough or self.page is None:
            said = json.loads(text)["response"]["said"]["data"]
            stamp, content, pause = (said[name] for name in ("stamp", "content", "pause"))
            if content:
                self.page = json.loads(content["view"])["page"]
        else:
            stamp, pause = _STAMP.search(text)[1].decode(), _PAUSE.search(text)[1]
            content = stamp != self._stamp
        self._stamp, self.pause = stamp, int(pause) / 1000
        if content:
            self.pages += 1
            self._figures()
        stops = self.page["stops"]
        return stops[-1]["update"] if stops else None

    def _figures(self):
        tab = next(tab for tab in self.page["tabs"] if tab["name"] == self._tab)
        panels = [p for p in self.page["panels"] if p["id"] in tab["panels"][:IN_SIGHT]]
        parts = [[panel["name"], n] for panel in panels for n in range(len(panel["parts"]))]
        query = urlencode(self.page["defaults"])
        question = {"search": self._search, "query": query, "parts": parts}
        texts = self.ask("POST", "/figures", question).split(b"\n")
        assert len(texts) == len(parts)
        assert not self._thorough or all(json.loads(text) for text in texts)

    def ask(self, method, path, question=None):
        """The body of an answer, which has to be a good one."""
        began = time.perf_counter()
        body = None if question is None else json.dumps(question)
        headers = {} if body is None else {"Content-Type": "application/json"}
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        assert answer.status == 200, (answer.status, path, text[:200])
        self.slowest = max(self.slowest, time.perf_counter() - began)
        self.asked += 1
        self.bytes += len(text)
        return text

    def close(self):
        """Let go of the connection."""
        self._connection.close()


class Crowd:
    """Readers that look on until they are told to stop; an error of any is raised then."""

    def __init__(self, address, count, **what):
        self.readers = [Reader(address, **what) for _ in range(count)]
        self._ended = threading.Event()
        self._errors = []
        self._threads = [
            threading.Thread(target=self._follow, args=(reader, number / count))
            for number, reader in enumerate(self.readers)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.check()

    def check(self):
        """Raise if a reader was not answered well."""
        if self._errors:
            raise self._errors[0]

    def _follow(self, reader, late):
        try:
            self._ended.wait(late)
            reader.open()
            while not self._ended.is_set():
                reader.look()
                self._ended.wait(reader.pause)
        except Exception as error:
            self._errors.append(error)
