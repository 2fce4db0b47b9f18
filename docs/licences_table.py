"""The licences of the packages that the project names, read from what is installed whenever the site is built."""

import re
import runpy
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read_licences() -> dict[str, dict[str, str]]:
    """For the package and each of its extras the licence of every package that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Run as a file: importing the package would import torch, for a table.
    licence_of = runpy.run_path(str(ROOT / "clusterguard" / "assurance" / "_bill.py"))["licence_of"]
    groups = {"always": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: {name: licence_of(name) for name in map(_name, lines) if name != "clusterguard"}
        for group, lines in groups.items()
    }


def draw_licences() -> str:
    """The table as HTML."""
    rows = [
        f"<tr><td>{escape(group)}</td><td>{escape(name)}</td><td>{escape(licence)}</td></tr>"
        for group, packages in read_licences().items()
        for name, licence in packages.items()
    ]
    head = "<tr><th>needed for</th><th>package</th><th>licence</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _name(requirement: str) -> str:
    return re.split(r"[\s\[<>=~!;]", requirement, maxsplit=1)[0]
