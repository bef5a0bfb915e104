import json
import re

import pytest
from playwright.sync_api import expect
from selection import slow_but

from dashboards import page_html, write_page
from dashboards.text import clean, json_island
from dashboards.view import TABS
from gradlab.run import open_run

EVIL = (
    "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"
)
NAMES = [EVIL, "a&lt;b&gt;", "%{x}<b>c</b>", "line\u2028two"]
# A file name can hold no slash.
FOLDER = "<img src=x onerror=document.title='owned'>"


def bare(address):
    """An address without its fragment; pictures that the page makes itself ask nobody."""
    return address.partition("#")[0]


@pytest.fixture(scope="module")
def opened(browser):
    """A function that opens a page and keeps all that it says and asks for."""
    pages = []

    def open_file(file, query=""):
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(90_000)
        pages.append(page)
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("blob:", "data:")) or page.asked.append(bare(request.url))
            ),
        )
        page.goto(f"{file.as_uri()}#{query}" if query else file.as_uri())
        page.wait_for_selector("html[data-ready=yes]", timeout=90_000)
        return page

    yield open_file
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def file(trained, folder):
    write_page(list(trained.values()), folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def opened_page(file, opened):
    return opened(file)


@pytest.fixture
def page(opened_page):
    """The page of all methods, as it stands at first."""
    show(opened_page, "")
    return opened_page


def show(page, query):
    """Go to a view by its address, and wait until what is in sight is drawn."""
    page.evaluate("q => { location.hash = q + '&nonce=' + Math.random(); }", query)
    settle(page)


def settle(page):
    page.evaluate("() => new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))")
    page.wait_for_selector("html[data-drawn=yes]", timeout=90_000)


def panel(page, title):
    return page.locator(".panel", has=page.get_by_role("heading", name=title, exact=True)).first


def drawn(page, title):
    """What plotly holds of a panel, after it was brought into sight."""
    found = panel(page, title)
    found.scroll_into_view_if_needed()
    plot = found.locator(".plot")
    plot.locator(".main-svg").first.wait_for(timeout=90_000)
    settle(page)
    return plot.evaluate(
        "d => d.data.map(t => ({x: t.x, y: t.y, z: t.z, name: t.name, at: t.selectedpoints}))"
    )


def complaints(page):
    """What went wrong; a driver's remarks on drawing without a graphics card are none of ours."""
    return [said for said in page.said if "GPU stall" not in said and "willReadFreq" not in said]


@pytest.mark.parametrize("tab", slow_but(TABS, "overview", "interference", "embeddings"))
def test_every_panel_of_every_tab_is_drawn_offline_and_without_complaint(file, page, tab):
    show(page, f"tab={tab}")
    panels = page.locator(f"#tabpanel-{tab} .panel")
    assert panels.count() >= 5
    for number in range(panels.count()):
        title = panels.nth(number).locator("h3").inner_text()
        assert drawn(page, title) or panels.nth(number).locator(".annotation-text").count(), title
        assert len(panels.nth(number).locator(".plot").get_attribute("aria-label")) > len(title)
    assert complaints(page) == []
    assert set(page.asked) == {file.as_uri()}


def test_one_selection_moves_all_panels(page):
    show(page, "tab=interference")
    before = drawn(page, "The chosen pair over training")
    matrix = panel(page, "Cosine of Z, before sharing").locator(".plot")
    drawn(page, "Cosine of Z, before sharing")
    box = matrix.locator(".nsewdrag").bounding_box()
    side = min(box["width"], box["height"])  # the cell of agents 2 and 3
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.click(x + side * 3 / 8, y + side / 8)
    settle(page)
    assert [page.input_value(f"#{name}") for name in ("agent", "other")] == ["2", "3"]
    assert drawn(page, "The chosen pair over training") != before
    show_tab(page, "Embeddings")
    assert drawn(page, "Principal components")[-1]["at"] == [2]


def show_tab(page, title):
    page.get_by_role("tab", name=title).click()
    settle(page)


def test_the_slider_moves_matrices_and_keeps_the_address(page):
    show(page, "tab=interference")
    now = drawn(page, "Cosine of g, after sharing")
    page.focus("#update")
    page.keyboard.press("Home")
    settle(page)
    assert page.locator("#update-text").inner_text() == "update 0 of 2 · 64 frames"
    assert drawn(page, "Cosine of g, after sharing") != now
    page.wait_for_function("location.hash.includes('update=0')")
    # It stands there for half a second, which asking from time to time may miss.
    page.evaluate(REMEMBER_UPDATES)
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Play", timeout=90_000)  # again, at the end
    seen = page.evaluate("() => window.seen")
    assert [text.partition(" of")[0] for text in seen] == ["update 1", "update 2"]


REMEMBER_UPDATES = """() => {
  window.seen = [];
  const text = document.getElementById("update-text");
  const remember = () => window.seen.push(text.textContent);
  new MutationObserver(remember).observe(text, { childList: true, subtree: true });
}"""


def test_an_address_brings_a_view_back(file, page, opened):
    query = "tab=embeddings&run=fups&network=critic&update=1&agent=2&theme=dark"
    other = opened(file, query)
    for name, value in (("run", "fups"), ("network", "critic"), ("agent", "2")):
        assert other.input_value(f"#{name}") == value
    assert other.locator("#tab-embeddings").get_attribute("aria-selected") == "true"
    assert other.locator("html").get_attribute("data-theme") == "dark"
    assert "update 1 " in other.locator("#update-text").inner_text()
    assert complaints(other) == []
    show(page, "run=<b>&agent=77&layer=__proto__&tab=constructor&update=1e9")
    assert page.input_value("#network") == "actor"
    assert page.locator("#tab-overview").get_attribute("aria-selected") == "true"


def test_tabs_and_choices_work_by_keyboard(page):
    page.focus("#tab-overview")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert page.locator("#tab-interference").get_attribute("aria-selected") == "true"
    assert page.evaluate("document.activeElement.id") == "tab-interference"
    page.focus("#run")
    page.keyboard.press("ArrowDown")
    settle(page)
    assert page.input_value("#run") == "fups"


def test_perplexity_changes_the_arrangement(page):
    show(page, "tab=embeddings")
    usual = drawn(page, "t-SNE")
    page.select_option("#perplexity", "high")
    settle(page)
    assert drawn(page, "t-SNE") != usual
    assert "perplexity 1.7" in panel(page, "t-SNE").locator(".badge").inner_text()


def test_figures_leave_as_tables_and_pictures(page):
    show(page, "tab=interference&update=1")
    matrix = drawn(page, "Cosine of g, after sharing")[0]["z"]
    card = panel(page, "Cosine of g, after sharing")
    for form in ("CSV", "SVG", "PNG"):
        with page.expect_download() as download:
            card.get_by_role("button", name=f"as {form}").click()
        content = download.value.path().read_bytes()
        if form == "CSV":
            rows = content.decode().splitlines()
            assert rows[0] == "trace,x,y,z"
            assert len(rows) == 1 + 16
            assert rows[2].split(",")[1:3] == ["1", "0"]
            assert float(rows[2].split(",")[3] or "nan") == matrix[0][1]
        else:
            assert content.startswith({"SVG": b"<svg", "PNG": b"\x89PNG"}[form])


def test_dark_and_light_redraw_the_figures(page):
    colour = "d => d.layout.template.layout.font.color"
    drawn(page, "Learning curves")
    plot = panel(page, "Learning curves").locator(".plot")
    light = plot.evaluate(colour)
    page.click("#theme")
    settle(page)
    assert plot.evaluate(colour) != light
    page.click("#theme")
    settle(page)
    assert plot.evaluate(colour) == light


def test_the_page_fits_a_narrow_screen(page):
    page.set_viewport_size({"width": 420, "height": 900})
    width = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 1400, "height": 900})
    assert width <= 420


def test_no_button_sends_a_figure_anywhere(page):
    drawn(page, "Learning curves")
    titles = page.locator(".modebar-btn").evaluate_all(
        "buttons => buttons.map(b => b.dataset.title || b.getAttribute('aria-label') || '')"
    )
    assert titles
    assert not [title for title in titles if re.search("cloud|share|plotly", title, re.IGNORECASE)]


@pytest.fixture(scope="module")
def evil(write_run, folder):
    run = write_run(folder / FOLDER, method=EVIL, names=NAMES, updates=4)
    write_page([run, run], folder / "evil.html")
    # Escaping alone must do, without the policy.
    text = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (folder / "evil.html").read_text()
    )
    (folder / "bare.html").write_text(text)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("evil.html", id="with policy"),
        pytest.param("bare.html", id="without policy", marks=pytest.mark.slow),
    ],
)
def test_names_from_the_run_folder_stay_text(evil, opened, name):
    page = opened(evil / name)
    for tab in TABS:
        show(page, f"tab={tab}")
        for title in page.locator(f"#tabpanel-{tab} h3").all_inner_texts():
            drawn(page, title)
    assert page.locator("img").count() == 0
    assert page.locator("svg a").count() == 0
    assert page.title() != "owned"
    assert FOLDER in page.locator("tbody td").first.inner_text()
    assert page.locator("tbody tr:first-child td:nth-child(2)").inner_text() == EVIL
    agents = page.locator("#agent option").all_inner_texts()
    assert agents[1] == "1: a&lt;b&gt;"
    assert agents[3] == "3: line two"
    assert complaints(page) == []
    assert set(page.asked) == {(evil / name).as_uri()}


def test_names_stay_text_in_what_plotly_draws(evil, opened):
    page = opened(evil / "evil.html")
    drawn(page, "Learning curves")
    legend = panel(page, "Learning curves").locator(".legendtext").first
    assert legend.text_content().startswith("<img src=x")
    show(page, "tab=embeddings")
    drawn(page, "t-SNE")
    found = panel(page, "t-SNE").locator(".plot")
    box = found.locator(".points path").nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    found.locator(".hoverlayer .hovertext").wait_for()
    assert "1: a&lt;b&gt;" in found.locator(".hoverlayer .hovertext").text_content()


def test_ids_never_come_from_names(evil):
    text = (evil / "evil.html").read_text()
    ids = re.findall(r' id="([^"]*)"', text)
    known = r"(panel|tabpanel|tab|chunk)-[a-z0-9]+(-badge)?|page-data|update-text|[a-z]+"
    assert all(re.fullmatch(known, name) for name in ids)
    assert len(set(ids)) == len(ids)


def test_the_page_is_small_and_holds_plotly_once(file):
    text = file.read_text()
    assert file.stat().st_size < 8e6
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
    assert not page.locator("#update").is_visible()
    show(page, "tab=interference")
    drawn(page, "Coupling")
    assert "not recorded" in panel(page, "Coupling").locator(".annotation-text").text_content()
    assert "run.json is missing" in page.locator(".problems").inner_text()
    assert complaints(page) == []


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
