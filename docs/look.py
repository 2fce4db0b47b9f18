"""`python docs/look.py SITE`: open every page of the built site in Chromium, and fail at whatever readers stumble over.

Each page is opened at the width of a desktop and of a phone, in both schemes. A page must write no error or warning to
the console, must not be wider than the window, and must cut nothing off. The search must find something. It needs
playwright (`pip install playwright`) and a Chromium, which it looks for on the PATH. With `--shots FOLDER` it keeps
pictures of all pages.
"""

import argparse
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS, SCHEMES = (1280, 390), ("dark", "light")
QUERY = "threshold"
CUT_OFF = """() => [...document.querySelectorAll('.md-content *, body > *')].filter(element => {
    const box = element.getBoundingClientRect();
    if (!box.width || box.right <= innerWidth + 1) return false;
    for (let part = element; part; part = part.parentElement)
        if (getComputedStyle(part).overflowX !== 'visible') return false;
    return true;
}).slice(0, 3).map(element => element.outerHTML.slice(0, 80))"""


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def look(site: Path, shots: Path | None = None) -> list[str]:
    """What is wrong with the pages of a site.

    Args:
        site: folder of the built site.
        shots: folder for pictures of all pages; None takes none.
    """
    from playwright.sync_api import sync_playwright

    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("index.html"))
    faults: list[str] = []
    with _serve(site) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for width in WIDTHS:
            for scheme in SCHEMES:
                context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
                tab, said = context.new_page(), []
                tab.on("console", lambda line, said=said: line.type in ("error", "warning") and said.append(line.text))
                tab.on("pageerror", lambda error, said=said: said.append(str(error)))
                for page in pages:
                    tab.goto(address + page, wait_until="load")
                    faults += [f"{page}, {width}, {scheme}: {fault}" for fault in [*said, *_faults_of(tab)]]
                    said.clear()
                    if shots is not None:
                        name = page.removesuffix("/index.html").replace("/", "_")
                        tab.screenshot(path=shots / f"{name}-{width}-{scheme}.png", full_page=True)
                context.close()
        faults += _faults_of_search(browser, address)
        browser.close()
    return faults


def _faults_of(tab: Any) -> Iterator[str]:
    width, window = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    if width > window:
        yield f"the page is {width} pixels wide"
    for element in tab.evaluate(CUT_OFF):
        yield f"cut off: {element}"


def _faults_of_search(browser: Any, address: str) -> list[str]:
    tab = browser.new_page()
    tab.goto(address)
    field = tab.locator("input[name=query]")
    if not field.count():
        return ["there is no search"]
    field.click()
    field.press_sequentially(QUERY)
    try:
        tab.wait_for_selector(".md-search-result__item", timeout=10_000)
    except Exception as error:  # of playwright, which is imported late
        return [f"the search finds nothing for {QUERY!r}: {type(error).__name__}"]
    return []


@contextmanager
def _serve(site: Path) -> Iterator[str]:
    """Serve the folder on this machine; from files, a page may not load the index of the search."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=Path("site"))
    parser.add_argument("--shots", type=Path)
    options = parser.parse_args()
    found = look(options.site, options.shots)
    sys.exit("\n".join(found) or None)
