"""Pages of prose are easy to read, as far as counting words can tell; tables, code and formulas do not count."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = {"cifar10.md", "cifar10-cpu.md", "mnist.md", "mnist-cpu.md", "mnist-short.md", "peers.md"}
PAGES = [
    *(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "reference" and page.name not in GENERATED),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
PAGES.remove(ROOT / "docs" / "abbreviations.md")
NO_PROSE = (r"(?ms)^ *```.*?^ *```", r"(?s)\\\[.*?\\\]|<!--.*?-->", r"(?m)^\s*(\||#|!\[|:::|--8<--|!!!).*$")


def sentences(text: str) -> Iterator[list[str]]:
    """The words of each sentence; a piece of code or a formula is one word, and a colon ends a sentence."""
    for pattern in NO_PROSE:
        text = re.sub(pattern, "\n\n", text)
    text = re.sub(r"\\\(.*?\\\)|`[^`]*`", "code", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text):
        for sentence in re.split(r"(?<=[.!?:])[*_)]*\s+", part):
            words = re.findall(r"[^\W\d_][\w'’-]*", sentence)
            if len(words) > 2:
                yield words


def syllables(word: str) -> int:
    """About how many syllables an English word has: groups of vowels, without a silent ending."""
    word = word.lower()
    silent = re.search(r"[^l]e$|[^td]ed$", word) is not None
    return max(1, len(re.findall(r"[aeiouy]+", word)) - silent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short_and_words_are_plain(page):
    found = [*sentences(page.read_text(encoding="utf-8"))]
    words = [word for sentence in found for word in sentence]
    mean = len(words) / len(found)
    flesch = 206.835 - 1.015 * mean - 84.6 * sum(map(syllables, words)) / len(words)
    assert flesch >= 45
    assert mean <= 17
    longest = max(found, key=len)
    assert len(longest) <= 40, " ".join(longest)


def test_words_and_syllables_are_counted():
    text = "# Head\n\nA cat sat. It `did()` so: see [the mat](x.md).\n\n- one two three\n- four five six\n\n| a | b |\n"
    assert [len(words) for words in sentences(text)] == [3, 3, 3, 3, 3]
    counted = {word: syllables(word) for word in ("cat", "table", "threshold", "refused", "wanted", "made")}
    assert counted == {"cat": 1, "table": 2, "threshold": 2, "refused": 2, "wanted": 2, "made": 1}


@pytest.mark.parametrize("term", ["K", "m", "M", "τ", "ASR-p", "EROC"])
def test_symbols_are_explained_on_hover_and_in_the_glossary(term):
    assert f"*[{term}]: " in (ROOT / "docs" / "abbreviations.md").read_text()
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    assert re.search(rf"^(\| {term}\b|\*\*{term}\b)", glossary, re.MULTILINE)
