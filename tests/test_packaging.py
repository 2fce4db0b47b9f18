"""What is in the wheel: the package with its data, its types and its licence, and nothing else."""

import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_whole_package_and_nothing_else(names):
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "clusterguard").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == package | {
        "clusterguard_command.py",
        "clusterguard_torchvision.py",
    }
    assert {"clusterguard/py.typed", "clusterguard/data/digits.npz", "clusterguard/data/README.md"} <= package


def test_the_wheel_has_its_licence_and_its_command(names):
    inside = {name.split(".dist-info/")[1] for name in names if ".dist-info/" in name}
    assert inside == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_citation_names_the_version_that_there_is():
    """And the paper; GitHub shows it as "Cite this repository"."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version("clusterguard")
    assert citation["license"] == metadata("clusterguard")["License-Expression"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2012.03483"
