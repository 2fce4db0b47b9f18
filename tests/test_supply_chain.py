"""What the project is made of: actions by hash, tools by version, licences that allow any use."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
sys.path.insert(0, str(ROOT / "docs"))
from licences_table import licence_of, read_licences  # noqa: E402

PERMISSIVE = {"Apache-2.0", "BSD", "MIT", "MIT-CMU", "ISC", "PSF-2.0"}
WEAK_COPYLEFT = {"tqdm", "hypothesis"}  # MPL-2.0: changes to their own files stay open, nothing else


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_take_nothing_that_can_change_under_a_name(workflow):
    text = workflow.read_text()
    actions = re.findall(r"uses: (\S+)", text)
    assert actions
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in actions)
    tools = re.findall(r"pipx run (.*)", text)
    assert all(re.match(r"--spec [\w-]+==[\d.]+ ", tool) for tool in tools)
    assert "permissions: {contents: read}" in text


def test_every_package_that_is_named_has_a_licence_that_allows_any_use():
    for packages in read_licences().values():
        for name, licence in packages.items():
            allowed = PERMISSIVE | ({"MPL-2.0"} if name in WEAK_COPYLEFT else set())
            assert licence == "not installed here" or set(licence.split(" and ")) <= allowed, (name, licence)


def test_a_package_that_is_not_there_is_said():
    assert licence_of("no-such-package") == "not installed here"
