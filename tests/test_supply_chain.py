"""What the project is made of: actions by hash, tools by version, licences that allow any use."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from clusterguard.assurance._bill import licence_of

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
sys.path.insert(0, str(ROOT / "docs"))
from licences_table import read_licences  # noqa: E402

PERMISSIVE = {"Apache-2.0", "BSD", "MIT", "MIT-CMU", "ISC", "PSF-2.0"}
WEAK_COPYLEFT = {"tqdm", "hypothesis"}  # MPL-2.0: changes to their own files stay open, nothing else


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_take_nothing_that_can_change_under_a_name(workflow):
    text = workflow.read_text()
    actions = re.findall(r"uses: (\S+)", text)
    assert actions
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in actions)
    assert "pipx" not in text
    assert "--require-hashes --requirement .github/tools.txt" in text
    assert "permissions: {contents: read}" in text


def test_newer_versions_of_actions_and_tools_are_proposed_every_week():
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {one["package-ecosystem"] for one in updates} == {"github-actions", "pip"}
    assert {one["schedule"]["interval"] for one in updates} == {"weekly"}


def read_hashed(name):
    """The packages of a file, as "name==version", each of which has a hash."""
    text = (ROOT / ".github" / name).read_text()
    pinned = re.findall(r"^([\w-]+==\S+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^\w", text, re.MULTILINE)) > 20
    assert "://" not in text  # no host is written down
    return {one.lower() for one in pinned}


def test_the_tools_of_the_workflows_have_hashes_and_are_those_that_are_asked_for():
    assert read_hashed("tools.txt") >= set((ROOT / ".github" / "tools.in").read_text().split())


def test_all_packages_of_the_tests_but_torch_have_hashes():
    text = "\n".join(path.read_text() for path in (ROOT / "constraints.txt", ROOT / "tests" / "peers.txt"))
    pinned = {one.lower() for one in re.findall(r"^[\w-]+==\S+", text, re.MULTILINE)}
    left_out = {one for one in pinned if one.startswith(("torch==", "torchvision=="))}
    assert read_hashed("packages.txt") == pinned - left_out
    assert len(left_out) == 2


def test_every_package_that_is_named_has_a_licence_that_allows_any_use():
    for packages in read_licences().values():
        for name, licence in packages.items():
            allowed = PERMISSIVE | ({"MPL-2.0"} if name in WEAK_COPYLEFT else set())
            assert licence == "not installed here" or set(licence.split(" and ")) <= allowed, (name, licence)


def test_a_package_that_is_not_there_is_said():
    assert licence_of("no-such-package") == "not installed here"
