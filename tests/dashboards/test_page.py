import itertools
import json
import os
import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from dashboards import page_html, write_page
from dashboards.text import clean, json_island
from gradlab.checks import UsageError
from gradlab.run import open_run

EVIL = (
    "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"
)
NAMES = [EVIL, "a&lt;b&gt;", "%{x}<b>c</b>", "line\u2028two"]
# A file name can hold no slash.
FOLDER = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path:
        pytest.fail("no chromium: install it, or set CHROMIUM to a browser's path")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=flags.split())
        yield started
        started.close()


@pytest.fixture(scope="module")
def opened(browser):
    """A function that opens a page and keeps all that it says and asks for."""
    pages = []

    def open_file(file):
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        pages.append(page)
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready=yes]", timeout=30_000)
        return page

    yield open_file
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def three(write_run, folder):
    runs = [
        write_run(folder / "shared", method="fups", embeddings="equal", seed=1),
        write_run(folder / "separate", method="nops", every=3, seed=2),
        write_run(folder / "hyper", seed=3),
    ]
    write_page(runs, folder / "three.html")
    return folder / "three.html"


@pytest.fixture(scope="module")
def three_page(three, opened):
    return opened(three)


@pytest.fixture
def page(three_page):
    """The page of three runs with its controls as they stand at first."""
    three_page.select_option("#network", "actor")
    three_page.select_option("#layer", "all")
    move(three_page, three_page.get_attribute("#update", "max"))
    return three_page


@pytest.fixture(scope="module")
def evil(write_run, folder):
    run = write_run(folder / FOLDER, method=EVIL, names=NAMES, updates=4)
    write_page([run, run], folder / "evil.html")
    return folder / "evil.html"


def drawn(page, number):
    return page.evaluate(
        "n => { const d = document.getElementById(`panel-${n}`);"
        " return d.data.map(t => ({x: t.x, y: t.y, z: t.z, name: t.name})); }",
        number,
    )


def move(page, value):
    page.evaluate(
        "v => { const s = document.getElementById('update'); s.value = v;"
        " s.dispatchEvent(new Event('input')); }",
        value,
    )
    page.evaluate("() => new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))")


def test_every_panel_is_drawn_offline_and_without_complaint(three, page):
    panels = page.locator(".plot")
    assert panels.count() == 4 + 3 * 4
    for number in range(panels.count()):
        assert page.locator(f"#panel-{number} svg.main-svg").count() > 0
        assert drawn(page, number)
    for number in (4, 5, 8, 9, 12, 13):
        assert page.locator(f"#panel-{number} .heatmaplayer image").count() == 1
    assert page.locator("#panel-0 .scatterlayer .trace path.js-line").count() == 3
    assert page.said == []
    assert page.asked == [three.as_uri()]


def test_the_slider_moves_all_heatmaps_and_embeddings(page):
    assert "update 18" in page.locator("#update-text").inner_text()
    before = [drawn(page, number) for number in range(16)]
    move(page, 0)
    assert page.locator("#update-text").inner_text() == "update 0 of 18 · 6,000 frames"
    after = [drawn(page, number) for number in range(16)]
    # 4-7, with equal embeddings; 8-11 without sharing, whose g never changes; 12-15
    changed = [number for number in range(16) if before[number] != after[number]]
    assert changed == [4, 5, 6, 9, 10, 11, 12, 13, 14, 15]
    assert page.said == []


def test_a_run_without_the_update_shows_an_earlier_one_and_says_so(page):
    stops = page.evaluate("JSON.parse(document.getElementById('page-data').textContent).slider")
    place = [stop["update"] for stop in stops].index(8)
    move(page, place)
    badges = [page.locator(f"#panel-{number}-badge").inner_text() for number in (5, 9)]
    assert badges == ["update 8", "shows update 6: none recorded at 8"]


def test_choosing_network_and_layer_changes_rates_and_heatmaps(page):
    for choice, value in (("network", "critic"), ("layer", "layer1")):
        before = [drawn(page, number) for number in (1, 2, 3, 13)]
        page.select_option(f"#{choice}", value)
        move(page, page.evaluate("document.getElementById('update').value"))
        for old, number in zip(before, (1, 2, 3, 13), strict=True):
            assert drawn(page, number) != old


def test_the_slider_works_by_keyboard_and_the_play_button_runs(page):
    page.focus("#update")
    page.keyboard.press("Home")
    expect(page.locator("#update-text")).to_contain_text("update 0 ")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#update-text")).to_contain_text("update 2 ")
    page.click("#play")
    expect(page.locator("#update-text")).to_contain_text("update 3 ")
    assert page.locator("#play").inner_text() == "Stop"


def test_no_button_sends_the_figure_anywhere(page):
    titles = page.locator("#panel-0 .modebar-btn").evaluate_all(
        "buttons => buttons.map(b => b.dataset.title || b.getAttribute('aria-label') || '')"
    )
    assert titles
    assert not [title for title in titles if re.search("cloud|share|plotly", title, re.IGNORECASE)]


@pytest.mark.parametrize("policy", [True, False], ids=["with policy", "without policy"])
def test_names_from_the_run_folder_stay_text(evil, folder, opened, policy):
    file = evil
    if not policy:  # escaping alone must do
        file = folder / "evil_without_policy.html"
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", evil.read_text())
        file.write_text(text)
    page = opened(file)
    move(page, 0)
    assert page.locator("img").count() == 0
    assert page.title() != "owned"
    assert FOLDER in page.locator("tbody td").first.inner_text()
    assert page.locator("tbody tr:first-child td:nth-child(2)").inner_text() == EVIL
    agents = page.locator(".agents").first.locator("li").all_inner_texts()
    assert agents[1] == "1\na&lt;b&gt;"
    assert agents[3] == "3\nline two"
    assert page.said == []
    assert page.asked == [file.as_uri()]


def test_names_stay_text_in_what_plotly_draws(evil, opened):
    page = opened(evil)
    legend = page.locator("#panel-0 .legendtext").first
    assert legend.text_content().startswith("<img src=x")
    page.locator("#panel-7 .points path").nth(1).scroll_into_view_if_needed()
    box = page.locator("#panel-7 .points path").nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#panel-7 .hoverlayer .hovertext")
    hover = page.locator("#panel-7 .hoverlayer .hovertext").text_content()
    assert "1: a&lt;b&gt;" in hover
    assert page.locator("svg a").count() == 0


def test_the_page_fits_a_narrow_screen(page):
    page.set_viewport_size({"width": 420, "height": 900})
    width = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 1400, "height": 900})
    assert width <= 420


def test_the_page_is_small_and_holds_plotly_once(three):
    text = three.read_text()
    assert three.stat().st_size < 8e6
    assert text.count("* plotly.js v") == 1


def test_damage_and_failure_are_listed(write_run, tmp_path):
    run = write_run(tmp_path / "run", updates=3)
    info = json.loads((run.path / "run.json").read_text())
    info |= {"state": "failed", "error": "ValueError: loss is NaN"}
    (run.path / "run.json").write_text(json.dumps(info))
    bare = write_run(tmp_path / "bare", updates=3)
    (bare.path / "records.sqlite").unlink()
    text = page_html([open_run(run.path), open_run(bare.path)])
    assert "training failed: ValueError: loss is NaN" in text
    assert "records.sqlite is missing: there are no records" in text


def test_runs_of_the_same_name_are_told_apart(write_run, tmp_path):
    runs = [write_run(tmp_path / parent / "run", updates=3) for parent in "ab"]
    text = page_html(runs)
    assert "a/run</td>" in text
    assert "b/run</td>" in text


def test_a_lost_run_file_and_no_diagnostics_still_make_a_page(write_run, tmp_path, opened):
    run = write_run(tmp_path / "run", diagnostics=False)
    (run.path / "run.json").unlink()
    write_page([open_run(run.path)], tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert not page.locator(".bar").is_visible()
    assert page.locator(".plot svg.main-svg").count() >= 8
    assert "run.json is missing" in page.locator(".problems").inner_text()
    assert page.said == []


def test_no_run_is_refused():
    with pytest.raises(UsageError, match="`runs` must name at least one run"):
        page_html([])


def test_json_island_can_not_end_its_element_and_reads_back():
    value = {"</script>": ["<!--", "\u2028\u2029", "&amp;"]}
    text = json_island(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_island([float("nan")])


@pytest.mark.parametrize("name", ["\ud800", "a\x00b", "\u202etxt.exe"])
def test_clean_replaces_what_can_not_be_printed(name):
    clean(name).encode()
    assert "\ufffd" in clean(name)


def test_panel_ids_never_come_from_names(evil):
    ids = re.findall(r' id="([^"]*)"', evil.read_text().split('<script type="application/json"')[0])
    known = {"network", "layer", "play", "update", "update-text"}
    numbered = {f"panel-{n}{end}" for n, end in itertools.product(range(12), ("", "-badge"))}
    assert set(ids) == known | numbered
