import html
import re

import pytest
from clusterguard._support import code_in_markdown, escape_markdown
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = st.text(st.sampled_from("ab1 |`*_~\\<>&;#-+=.)([]!\n\r\t\x00\x1b\u2028\ud800$:/'\""), max_size=12)


def one_line(text):
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def shown(page):
    return html.unescape(page.removesuffix("\n"))


@given(HOSTILE)
@example("1. a")
@example("# a")
@example("<script>alert(1)</script>")
@example("[a](javascript:b) ![c](d) <https://e>")
@example("a&lt;b &#60; R&D")
@example("__init__ a_b _c_ **d** ~~e~~")
@example("a | b \\| c")
@example("--- ")
def test_escaped_text_is_shown_as_it_is_in_paragraphs_and_in_tables(text):
    escaped = escape_markdown(text)
    if one_line(text):
        assert shown(PARSER.render(escaped)) == f"<p>{one_line(text)}</p>"
    page = PARSER.render(f"| name | rate |\n|---|---|\n| {escaped} | 0.5 |")
    assert [shown(cell) for cell in re.findall(r"<td>(.*?)</td>", page)] == [one_line(text), "0.5"]


@given(HOSTILE)
@example("a```b")
@example("`")
def test_code_is_shown_as_it_is(text):
    page = PARSER.render(f"Backbone {code_in_markdown(text)}.")
    if one_line(text):
        assert shown(page) == f"<p>Backbone <code>{one_line(text)}</code>.</p>"


@pytest.mark.parametrize("name", ["PGD l2", "PGD-40", "3-step", "APGD (linf, 8/255)", "C & W", "ViT_b_16", "ε = 0.3"])
def test_usual_names_stay_as_they_are(name):
    assert escape_markdown(name) == name
