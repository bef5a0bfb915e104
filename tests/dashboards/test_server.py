"""The served pages: a server, a trainer and a browser, each in a process of its own."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import pytest
from playwright.sync_api import expect

from dashboards.view import TABS
from gradlab.cli import run as main
from gradlab.run import open_run

ROOT = Path(__file__).parents[2]
EVIL = "<img src=x onerror=\"document.title='owned'\">"
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WAIT = 60_000  # milliseconds; a busy machine is no failure


def start(*arguments):
    command = [sys.executable, "-m", "gradlab", *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def started(*arguments):
    """A server and the address that it printed."""
    server = start("dashboard", *arguments, "--serve", "--port", 0)
    line = server.stdout.readline()
    assert line.startswith("Dashboard: http://"), line + server.stderr.read()
    assert server.stdout.readline() == "Ctrl-C ends it.\n"
    return server, line.split()[1]


@pytest.fixture(scope="module")
def folder(trained, write_run):
    """Real runs of every method, one of hostile names, one damaged and one that is newer."""
    folder = trained["hypermarl"].path.parent
    write_run(folder / EVIL, method=EVIL, names=[EVIL, "a&lt;b", "%{x}", "</script>"], updates=4)
    write_run(folder / "damaged", updates=3)
    (folder / "damaged" / "records.sqlite").unlink()
    newer = write_run(folder / "newer", updates=3).info | {"schema": 99}
    (folder / "newer" / "run.json").write_text(json.dumps(newer))
    yield folder
    for name in (EVIL, "damaged", "newer"):
        shutil.rmtree(folder / name)


@pytest.fixture(scope="module")
def address(folder):
    server, address = started(folder)
    yield address
    server.send_signal(signal.SIGINT)
    out, err = server.communicate(timeout=60)
    assert (server.returncode, out, err) == (0, "", "")


@pytest.fixture(scope="module")
def opened(browser, address):
    """A function that opens an address and keeps all that the page says and asks for."""
    pages = []

    def open_address(query="", at=address):
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        pages.append(page)
        page.set_default_timeout(WAIT)
        page.said, page.asked = [], set()
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.add(request.url))
        page.goto(f"{at}{query}")
        page.wait_for_selector("html[data-ready=yes]", timeout=WAIT)
        return page

    yield open_address
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def view(opened, trained):
    """All trained runs side by side."""
    return opened(runs(*trained))


@pytest.fixture
def page(view):
    show(view, "")
    return view


def runs(*names):
    return "?" + urlencode([("runs", name) for name in names])


def show(page, query):
    page.evaluate("q => { location.hash = q + '&nonce=' + Math.random(); }", query)
    settle(page)


def settle(page):
    page.evaluate("() => new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))")
    page.wait_for_selector("html[data-drawn=yes]", timeout=WAIT)


def panel(page, title):
    return page.locator(".panel", has=page.get_by_role("heading", name=title, exact=True)).first


def drawn(page, title):
    found = panel(page, title)
    found.scroll_into_view_if_needed()
    found.locator(".plot .main-svg").first.wait_for(timeout=WAIT)
    settle(page)
    return found.locator(".plot").evaluate(
        "d => d.data.map(t => ({x: t.x, y: t.y, z: t.z, at: t.selectedpoints}))"
    )


def complaints(page):
    """What went wrong; a driver's remarks on drawing without a graphics card are none of ours."""
    return [said for said in page.said if "GPU stall" not in said and "willReadFreq" not in said]


def outside(page, address):
    return {url for url in page.asked if not url.startswith((address, "blob:", "data:"))}


# the written page's tests draw the panels of all tabs; here two stand for all
@pytest.mark.parametrize(
    "tab",
    [
        pytest.param(tab, marks=[] if tab in {"overview", "interference"} else pytest.mark.slow)
        for tab in TABS
    ],
)
def test_every_panel_of_every_tab_is_drawn_for_runs_of_all_methods(page, address, tab):
    show(page, f"tab={tab}")
    panels = page.locator(f"#tabpanel-{tab} .panel")
    assert panels.count() >= 5
    for number in range(panels.count()):
        title = panels.nth(number).locator("h3").inner_text()
        assert drawn(page, title) or panels.nth(number).locator(".annotation-text").count(), title
        assert "could not be drawn" not in panels.nth(number).inner_text()
    assert complaints(page) == []
    assert outside(page, address) == set()


def test_one_selection_moves_all_panels(page):
    show(page, "tab=interference")
    before = drawn(page, "The chosen pair over training")
    drawn(page, "Cosine of Z, before sharing")
    box = panel(page, "Cosine of Z, before sharing").locator(".nsewdrag").bounding_box()
    side = min(box["width"], box["height"])  # the cell of agents 2 and 3
    page.mouse.click(
        box["x"] + box["width"] / 2 + side * 3 / 8, box["y"] + box["height"] / 2 + side / 8
    )
    settle(page)
    assert [page.input_value(f"#{name}") for name in ("agent", "other")] == ["2", "3"]
    assert drawn(page, "The chosen pair over training") != before
    page.get_by_role("tab", name="Embeddings").click()
    settle(page)
    assert drawn(page, "Principal components")[-1]["at"] == [2]


def test_the_slider_and_the_address_bring_a_view_back(page, opened, trained):
    show(page, "tab=interference&run=fups&network=critic")
    newest = drawn(page, "Cosine of g, after sharing")
    assert "update=" not in page.evaluate("location.hash").replace("update=2", "")
    page.focus("#update")
    page.keyboard.press("Home")
    settle(page)
    assert page.locator("#update-text").inner_text() == "update 0 of 2 · 64 frames"
    oldest = drawn(page, "Cosine of g, after sharing")
    assert oldest != newest
    assert page.get_attribute("#follow", "aria-pressed") == "false"
    page.wait_for_function("location.hash.includes('update=0')")
    other = opened(page.url.split("/", 3)[3])
    assert drawn(other, "Cosine of g, after sharing") == oldest
    assert other.input_value("#network") == "critic"
    page.click("#follow")
    settle(page)
    assert drawn(page, "Cosine of g, after sharing") == newest
    page.wait_for_function("!location.hash.includes('update=')")
    cosine = trained["fups"].quantity(
        "cosine", since=0, until=0, where={"network": "critic", "space": "psi", "layer": "all"}
    )
    assert oldest[0]["z"][0][1] == pytest.approx(float(cosine[0, 0, 1]), abs=6e-4)


def test_perplexity_and_keyboard(page):
    show(page, "tab=behaviour")
    page.focus("#tab-behaviour")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.locator("#tab-embeddings").get_attribute("aria-selected") == "true"
    usual = drawn(page, "t-SNE")
    page.select_option("#perplexity", "high")
    settle(page)
    assert drawn(page, "t-SNE") != usual


def test_the_list_sorts_filters_and_shows_what_is_chosen(opened, address):
    page = opened()
    names = page.locator("#rows tr td:nth-child(2)")
    assert names.all_inner_texts()[0] == EVIL
    assert names.count() == 10
    page.get_by_role("button", name="method", exact=True).click()
    assert page.locator("th[data-column=method]").get_attribute("aria-sort") == "ascending"
    methods = page.locator("#rows tr td:nth-child(3)").all_inner_texts()
    assert methods[:-1] == sorted(methods[:-1])
    assert methods[-1] == ""  # what can't be read stands last
    red = page.locator("#rows tr.damaged")
    assert red.count() == 2
    assert "schema version 99" in red.nth(1).inner_text() + red.nth(0).inner_text()
    page.fill("#filter", "HYPERMARL done seed")
    assert names.all_inner_texts() == ["hypermarl-seed1"]
    page.get_by_label("Choose hypermarl-seed1").check()
    page.fill("#filter", "nops")
    page.get_by_label("Choose nops").check()
    assert page.url.endswith("#filter=nops&sort=method")
    page.click("#compare")
    page.wait_for_selector("html[data-drawn=yes]", timeout=WAIT)
    rows = page.locator(".runs tbody td:first-child").all_inner_texts()
    assert sorted(rows) == ["hypermarl-seed1", "nops"]
    assert page.title() in {"gradlab: hypermarl-seed1, nops", "gradlab: nops, hypermarl-seed1"}
    page.get_by_role("link", name="All runs").click()
    page.wait_for_selector("#rows tr")
    assert complaints(page) == []
    assert outside(page, address) == set()


@pytest.mark.slow  # the written page's test looks at the same panels
def test_names_from_run_folders_stay_text(opened):
    listed = opened()
    assert listed.locator("#rows td", has_text=EVIL).count() >= 1
    page = opened(runs(EVIL))
    for tab in TABS:
        show(page, f"tab={tab}")
        for title in page.locator(f"#tabpanel-{tab} h3").all_inner_texts()[:3]:
            drawn(page, title)
    for one in (listed, page):
        assert one.locator("img").count() == 0
        assert "owned" not in one.title().replace(EVIL, "")
        assert complaints(one) == []
    assert page.locator(".runs tbody td:nth-child(2)").inner_text() == EVIL
    assert page.locator("#agent option").nth(1).inner_text() == "1: a&lt;b"


@pytest.mark.parametrize("name", ["newer", "../newer", EVIL * 3])
def test_what_can_not_be_shown_is_said(opened, name):
    page = opened(runs(name))
    said = page.get_by_role("alert").inner_text()
    assert ("schema version 99" if name == "newer" else "There is no run") in said
    assert page.locator("img").count() == 0
    assert complaints(page) == []


def test_a_damaged_run_is_shown_with_what_is_missing(opened):
    page = opened(runs("damaged", "fups"))
    assert "records.sqlite is missing" in page.locator("#problems").inner_text()
    assert drawn(page, "Learning curves")
    assert complaints(page) == []


SETTINGS = "--env specialisation --agents 3 --copies 8 --steps 8 --diagnostics full --every 1"


def test_new_updates_appear_at_once_and_the_trainers_death_is_shown(folder, opened, tmp_path):
    trainer = start("train", *SETTINGS.split(), "--frames", 10**9, "--out", folder / "live")
    os.setpriority(os.PRIO_PROCESS, trainer.pid, 15)  # it takes what browser and server leave
    try:
        wait_for(lambda: (folder / "live" / "run.json").exists() and newest(folder / "live") > 0)
        listed = opened()
        row = listed.locator("#rows tr", has_text="live")
        expect(row).to_contain_text("running")
        page = opened(runs("live"))
        show(page, "tab=interference")
        before = newest(folder / "live")
        # It is drawn, for whoever follows, within two seconds of being recorded; on a machine that
        # is busy with more than the trainer, later.
        page.wait_for_function(f"page => {UPDATE} > {before}", timeout=WAIT)
        shown = page.evaluate(f"page => {UPDATE}")
        assert drawn(page, "Cosine of g, after sharing")
        assert page.get_attribute("#follow", "aria-pressed") == "true"
        page.focus("#update")
        page.keyboard.press("Home")
        settle(page)
        page.wait_for_function(f"page => Number(document.getElementById('update').max) > {shown}")
        assert "update 0 " in page.locator("#update-text").inner_text()
        page.reload()
        page.wait_for_selector("html[data-ready=yes]", timeout=WAIT)
        assert "update 0 " in page.locator("#update-text").inner_text()
        trainer.kill()
        expect(page.locator(".runs tbody")).to_contain_text("died", timeout=WAIT)
        expect(row).to_contain_text("died", timeout=WAIT)
        assert complaints(page) + complaints(listed) == []
    finally:
        trainer.kill()
        trainer.communicate()
        # Not deleted: the server may be reading it, which makes files beside the database.
        (folder / "live").rename(tmp_path / "live")


UPDATE = "Number(document.getElementById('update-text').textContent.match(/update (\\d+)/)?.[1])"


def newest(folder):
    run = open_run(folder)
    return run.updates("cosine")[-1] if "cosine" in run.quantities else -1


def wait_for(true, seconds=120):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def ask(address, method="GET", path="/", body=None, **headers):
    """Status and body of an answer, for a client that is no browser."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(errors="replace"), answer.headers
    connection.close()
    return found


def test_strangers_are_refused(address):
    host = urlsplit(address).netloc
    own = {"Content_Type": "application/json", "Origin": f"http://{host}"}
    assert ask(address)[0] == 200
    assert ask(address, Host="evil.example")[0] == 403
    for post in ("/_dash-update-component", "/figures"):
        assert ask(address, "POST", post, "{}", **own | {"Origin": "http://evil.example"})[0] == 403
        assert ask(address, "POST", post, "{}", **own | {"Sec_Fetch_Site": "cross-site"})[0] == 403
        assert ask(address, "DELETE", post)[0] == 405
        assert ask(address, "POST", post, "x" * 70_000, **own)[0] == 413
    for path in (
        "/../../etc/passwd",
        "//etc/passwd",
        "/files/../page.py",
        "/files/%2e%2e%2fpage.py",
    ):
        status, body, _ = ask(address, path=path)
        assert status in {400, 404}
        assert "root:" not in body
        assert str(ROOT) not in body


def test_nonsense_is_answered_with_nothing(address):
    def answered(question):
        body = json.dumps(question)
        status, text, _ = ask(address, "POST", "/figures", body, Content_Type="application/json")
        assert status in {200, 400}
        return [json.loads(line) for line in text.splitlines()] if status == 200 else None

    good = {"search": runs("fups"), "query": "", "parts": [["returns", 0]]}
    assert answered(good)[0]["figure"]["data"]
    for search in (runs("../fups"), "", "?runs=" + quote("/etc/passwd"), "?" + "runs=a&" * 500):
        assert answered(good | {"search": search}) == [None]
    odd = [["__class__", 0], ["returns", 10**9], ["returns", -1]]
    assert answered(good | {"parts": odd}) == [None] * 3
    wrong = ({"query": 1}, {"parts": "x"}, {"parts": [[0]]}, {"search": None})
    for bad in ({}, 7, *(good | one for one in wrong)):
        assert answered(bad) is None
    assert ask(address, "POST", "/figures", "{", Content_Type="application/json")[0] == 400
    assert ask(address, "POST", "/figures", "no JSON")[0] == 400


@pytest.mark.slow
def test_a_server_for_others_prints_a_token_and_asks_for_it(folder):
    server, address = started(folder / "fups", folder / "nops", "--host", "0.0.0.0")
    try:
        query = urlsplit(address).query
        local = f"http://127.0.0.1:{urlsplit(address).port}"
        assert ask(local)[0] == 401
        assert ask(local, path="/?token=x")[0] == 401
        assert ask(local, path="/files/page.js")[0] == 401
        status, _, headers = ask(local, path=f"/?{query}")
        assert (status, headers["Location"]) == (303, "/?runs=fups&runs=nops")
        cookie = headers["Set-Cookie"].split(";")[0]
        assert len(re.fullmatch(r"gradlab_\d+=(.+)", cookie)[1]) >= 32
        assert ask(local, Cookie=cookie)[0] == 200
        assert ask(local, Cookie=cookie, Host="evil.example")[0] == 403
    finally:
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
    assert (server.returncode, err) == (0, "")


def test_ctrl_c_ends_a_server_that_a_script_started_in_the_background(folder):
    # such a shell has it ignore SIGINT
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server, _ = started(folder / "fups")
    finally:
        signal.signal(signal.SIGINT, kept)
    server.send_signal(signal.SIGINT)
    out, err = server.communicate(timeout=60)
    assert (server.returncode, out, err) == (0, "", "")


def refused(capsys, *arguments):
    assert main(["dashboard", *map(str, arguments)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    return found.err


def test_bad_calls_are_one_line(capsys, tmp_path, trained):
    run = trained["fups"].path
    assert "nowhere does not exist" in refused(capsys, "nowhere", "--serve")
    assert "holds no run" in refused(capsys, tmp_path, "--serve")
    assert "Got port=65536" in refused(capsys, run, "--serve", "--port", 65536)
    assert "invalid int value" in refused(capsys, run, "--serve", "--port", "x")
    assert "Got 'no.such.host.invalid'" in refused(
        capsys, run, "--serve", "--host", "no.such.host.invalid"
    )
    assert "Add --serve" in refused(capsys, run, "--html", tmp_path / "x.html", "--port", 1)
    assert "--html --serve is required" in refused(capsys, run)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Port {port} is taken" in refused(capsys, run, "--serve", "--port", port)
