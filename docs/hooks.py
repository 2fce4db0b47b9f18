"""While the site is built: formulas become MathML, pictures take the page's colours, and every link is followed."""

import html
import logging
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path
from licences_table import draw_licences
from plan import draw_plan, list_modules

_PICTURES = Path(__file__).parent / "pictures"
_LOG = logging.getLogger("mkdocs.hooks.links")  # mkdocs counts what is logged under its name, and fails if it is strict


def on_page_content(content: str, **_: object) -> str:
    """Replace what arithmatex has marked, inline and display formulas alike, and draw what a page asks for."""
    drawings = {"<!-- plan -->": draw_plan, "<!-- modules -->": list_modules, "<!-- licences -->": draw_licences}
    for mark, draw in drawings.items():
        content = content.replace(mark, draw()) if mark in content else content
    content = re.sub(r'<img [^>]*src="[./]*pictures/(\w+)\.svg"[^>]*>', _to_drawing, content)
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _to_mathml, content, flags=re.DOTALL)


def on_post_build(config: Any, **_: object) -> None:
    """Warn of every link to a page, file or anchor that is not in the site; mkdocs itself sees no docstrings."""
    site = Path(config["site_dir"]).resolve()
    pages = {file.resolve(): _Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    for file, page in pages.items():
        for link in page.broken(file, pages) if file.name != "404.html" else ():  # whose links depend on the address
            place = file.relative_to(site)
            _LOG.warning("%s contains a link '%s', but the site has no such page, file or anchor", place, link)


class _Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element links to, and what can be linked to."""
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]

    def broken(self, file: Path, pages: "dict[Path, _Page]") -> Iterator[str]:
        """Its links that lead nowhere, from where it is."""
        for link in self.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (target in pages and unquote(parts.fragment) not in pages[target].anchors):
                yield link


def _to_drawing(image: re.Match[str]) -> str:
    """The picture itself, which takes the colours of the page; an image would not know the reader's scheme."""
    return (_PICTURES / f"{image[1]}.svg").read_text(encoding="utf-8")


def _to_mathml(formula: re.Match[str]) -> str:
    if formula[2] == "(":
        return convert(html.unescape(formula[3]), display="inline")
    return f'<div class="formula">{convert(html.unescape(formula[3]), display="block")}</div>'
