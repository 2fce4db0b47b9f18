"""Pages in HTML that need no other file, with one style for light and dark screens, phones and paper."""

import html
import re
from collections.abc import Iterable, Sequence

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#222;--soft:#5a5a5a;--line:#d8d8d8;--code:#f2f2f2;--link:#1a4fa3;
--warn:#fff3cd;--warn-line:#c98a00;--good:#1d6b2a;--bad:#a31515}
@media(prefers-color-scheme:dark){:root{--back:#16181c;--text:#e4e4e4;--soft:#a9a9a9;--line:#3a3f47;--code:#23272e;
--link:#8ab4f8;--warn:#3d3210;--warn-line:#d9a514;--good:#7fcf8d;--bad:#ff9b93}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;color:var(--text);background:var(--back);max-width:70rem;margin:1.5rem auto;
padding:0 1rem;overflow-wrap:anywhere}td,th{overflow-wrap:break-word}
h1,h2,h3{line-height:1.25;overflow-wrap:break-word}
h2{margin-top:2.2rem;border-top:1px solid var(--line);padding-top:1rem}
p,li,dd{max-width:48rem}a{color:var(--link)}
table{border-collapse:collapse;margin:.7rem 0;font-size:.94em}
td,th{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{white-space:nowrap}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.wide{overflow-x:auto}svg{max-width:100%;height:auto}figure{margin:1rem 0}figcaption,.soft{color:var(--soft)}
.warning{background:var(--warn);border-left:4px solid var(--warn-line);padding:.5rem .8rem;margin:.5rem 0;
max-width:48rem}.good{color:var(--good)}.bad{color:var(--bad);font-weight:600}
code,pre{background:var(--code);font-size:.92em}code{padding:0 .2rem}pre{padding:.7rem;white-space:pre-wrap}
nav ol{columns:2 18rem;padding-left:1.4rem}
@media(max-width:40rem){body{font-size:15px}thead,td:empty{display:none}table,tbody,tr{display:block}
tr{border-bottom:1px solid var(--line);
padding:.35rem 0}td,td.n{display:block;border:0;padding:.1rem 0;
text-align:left;white-space:normal;overflow-wrap:anywhere}
td:first-child{font-weight:600}td[data-head]::before{content:attr(data-head) ": ";color:var(--soft)}}
@media print{:root{color-scheme:light;--back:#fff;--text:#000;--soft:#444;--line:#bbb;--code:#f2f2f2;--link:#000;
--warn:#fff;--warn-line:#000;--good:#000;--bad:#000}body{font-size:10pt;max-width:none;margin:0;padding:0}
nav,details{display:none}tr,figure,.warning{break-inside:avoid}h2,h3{break-after:avoid}.wide{overflow:visible}}
"""
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBER = re.compile(r"[\d\s.,:/%–−+\-\[\]()e]+|–")


class Markup(str):
    """Text that is HTML already, so that `escape` and `html_table` leave it as it is."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """The text as HTML that shows it literally, with escapes for characters that control, reorder or end lines.

    Example:
        >>> escape("<b>"), escape(Markup("<b>"))
        ('&lt;b&gt;', '<b>')
    """
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(visible(text)))


def visible(text: str) -> str:
    """The text with escapes for characters that control, reorder or end lines, but for tabs and line feeds."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def html_page(title: str, parts: Iterable[str]) -> str:
    """A whole page in HTML, which loads nothing from elsewhere.

    Args:
        title: title of the page, which is escaped.
        parts: pieces of HTML in their order; their texts have been escaped.
    """
    head = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head><body>\n"
    )
    return head + "\n".join(parts) + "\n</body></html>\n"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself if it is too wide, and shows each row as a block on a phone.

    Args:
        head: names of the columns; an empty one makes a table without a head.
        rows: cells of each row, which are escaped unless they are `Markup`. A row may end early, and is filled up.

    Example:
        >>> html_table([], [["a<b", "1"]])
        '<div class=wide><table><tbody><tr><td>a&lt;b</td><td>1</td></tr></tbody></table></div>'
    """
    body = "".join(f"<tr>{''.join(_cells(head, row))}</tr>" for row in rows)
    names = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    top = f"<thead><tr>{names}</tr></thead>" if head else ""
    return f"<div class=wide><table>{top}<tbody>{body}</tbody></table></div>"


def _cells(head: Sequence[str], row: Sequence[str]) -> Iterable[str]:
    for index, cell in enumerate([*row, *[""] * (len(head) - len(row))]):
        kind = " class=n" if index and head and _NUMBER.fullmatch(cell) else ""
        label = f' data-head="{escape(head[index])}"' if index and head and cell else ""
        yield f"<td{kind}{label}>{escape(cell)}</td>"
