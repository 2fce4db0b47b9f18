"""TOML files."""

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same parser as a package, for Python 3.10


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as a dict."""
    table: dict[str, Any] = tomllib.loads(path.read_text())
    return table
