"""Make dashboard.png from the page that `make demo` wrote: python docs/make_picture.py."""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
VIEW = "theme=light&tab=interference&run=hypermarl&agent=0&other=1"

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox"]
    )
    page = browser.new_page(viewport={"width": 1280, "height": 1250})
    page.goto(f"{(ROOT / 'runs/demo/dashboard.html').as_uri()}#{VIEW}")
    page.wait_for_selector("html[data-ready=yes]")
    page.evaluate("document.querySelector('.bar').scrollIntoView()")
    page.wait_for_timeout(1000)
    page.wait_for_selector("html[data-drawn=yes]")
    page.screenshot(path=ROOT / "docs/dashboard.png")
    browser.close()
