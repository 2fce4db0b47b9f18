"""`make docs` fails at whatever readers would stumble over: tried on a small site with the project's settings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    "index.md": "# Home\n\n[A page](reference.md), [part](reference.md#part), [double](reference.md#small.double).\n",
    "reference.md": "# Reference\n\n## Part\n\n::: small.double\n",
}
CODE = '''
def double(number: int) -> int:
    """Twice a number.

    Args:
        number: any.

    Returns:
        The double; [what it is](https://example.org).

    Raises:
        TypeError: it is none.
    """
    return 2 * number
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The project's Makefile, settings and hooks around two pages and a module."""
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = re.sub(r"(?m)^nav:\n(?: .*\n)+", "nav: [index.md, reference.md]\n", settings)
    (tmp_path / "mkdocs.yml").write_text(settings)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "docs").mkdir()
    for name in ("hooks.py", "licences_table.py", "plan.py", "examples.py", "style.css", "abbreviations.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    for name, content in PAGES.items():
        (tmp_path / "docs" / name).write_text(content)
    (tmp_path / "small.py").write_text(CODE)
    return tmp_path


def make_docs(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the target `docs` of the folder's Makefile with the packages that these tests run with."""
    command = ["make", "--old-file", ".venv/installed", "docs", f"BIN={Path(sys.executable).parent}"]
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=folder, env=usual, capture_output=True, text=True, timeout=300, check=False)


def replace(file: Path, old: str, new: str) -> None:
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))


def test_what_is_whole_is_built_without_a_word(site):
    result = make_docs(site)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert "Twice a number" in (site / "site" / "reference" / "index.html").read_text()


FAULTS = [
    ("docs/index.md", "(reference.md)", "(referense.md)", "referense.md"),
    ("docs/index.md", "#part", "#parts", "#parts"),
    ("docs/index.md", "#small.double", "#small.triple", "#small.triple"),
    ("docs/index.md", "(reference.md)", "(/reference/)", "/reference/"),
    ("docs/index.md", "[A page]", '<a href="nowhere/">there</a> [A page]', "nowhere/"),
    ("docs/index.md", "[A page]", "![A picture](nothing.png) [A page]", "nothing.png"),
    ("docs/index.md", "[A page]", "[double][small.triple] [A page]", "small.triple"),
    ("small.py", "number: any", "numbr: any", "numbr"),
    ("small.py", "TypeError: it is none.", "As the other.", "As the other"),
    ("small.py", "https://example.org", "../concepts.md#part", "concepts.md#part"),
]
FATAL = [
    ("docs/index.md", "[A page]", '--8<-- "gone.md"\n\n[A page]', "gone.md"),
    ("docs/reference.md", "::: small.double", "::: small.triple", "small.triple"),
]


def test_whatever_readers_would_stumble_over_is_named(site):
    for file, old, new, _ in FAULTS:
        if old not in (site / file).read_text():
            (site / file).write_text((site / file).read_text() + "\n" + PAGES["index.md"])
        replace(site / file, old, new)
    result = make_docs(site)
    assert result.returncode != 0
    named = [line for line in result.stdout.splitlines() if line.startswith("WARNING")]
    for *_, message in FAULTS:
        assert any(message in line for line in named), message


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "message"), [*FAULTS, *FATAL])
def test_each_fault_alone_is_an_error(site, file, old, new, message):
    replace(site / file, old, new)
    result = make_docs(site)
    assert result.returncode != 0
    assert message in result.stdout


@pytest.mark.slow
def test_a_page_that_no_menu_shows_is_an_error(site):
    (site / "docs" / "lost.md").write_text("# Lost\n")
    result = make_docs(site)
    assert result.returncode != 0
    assert "lost.md" in result.stdout


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


PLACES = [
    *ROOT.glob("*.md"),
    *(file for folder in ("benchmarks", "examples", "clusterguard") for file in (ROOT / folder).rglob("*.md")),
]


@pytest.mark.parametrize("file", PLACES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_outside_the_site_lead_somewhere(file):
    text = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", file.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = file.parent / path if path else file
        assert target.exists(), link
        if anchor:
            assert anchor in {slug(heading) for heading in re.findall(r"(?m)^#+ (.*)$", target.read_text())}, link
