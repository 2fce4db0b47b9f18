"""The licences of the packages that the project names, read from what is installed whenever the site is built."""

import re
from html import escape
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
_USUAL = (  # how packages write a licence, and its name among those of SPDX
    (r"Apache", "Apache-2.0"),
    (r"PIL|MIT-CMU|HPND", "MIT-CMU"),
    (r"\bMIT\b(?!-)", "MIT"),
    (r"ISC", "ISC"),
    (r"MPL|Mozilla", "MPL-2.0"),
    (r"PSF|Python Software Foundation|matplotlib", "PSF-2.0"),
    (r"BSD", "BSD"),
)


def read_licences() -> dict[str, dict[str, str]]:
    """For the package and each of its extras the licence of every package that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"always": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: {name: licence_of(name) for name in map(_name, lines) if name != "clusterguard"}
        for group, lines in groups.items()
    }


def licence_of(package: str) -> str:
    """The licences of an installed package, by their names in SPDX, as far as its metadata tell them."""
    try:
        about = metadata(package)
    except PackageNotFoundError:
        return "not installed here"
    told = [about.get("License-Expression") or "", *(about.get_all("Classifier") or [])]
    if not any(line.startswith("License") for line in told[1:]) and not told[0]:
        told.append((about.get("License") or "").split("\n")[0])
    text = " ".join([told[0], *(line for line in told[1:] if "License" in line or "::" not in line)])
    names = dict.fromkeys(name for pattern, name in _USUAL if re.search(pattern, text))
    return " and ".join(names) or "not told"


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
