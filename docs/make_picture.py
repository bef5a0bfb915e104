"""Make dashboard.png from the page that `make demo` wrote: python docs/make_picture.py."""

from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1280, "height": 1190})
    page.goto((ROOT / "runs/demo/dashboard.html").as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    slider = page.locator("input[type=range]").first
    slider.focus()
    slider.press("Home")
    slider.press("ArrowRight")
    page.evaluate("document.querySelectorAll('h2')[1].scrollIntoView(); window.scrollBy(0, -60)")
    page.wait_for_timeout(1000)
    page.screenshot(path=ROOT / "docs/dashboard.png")
    browser.close()
