"""TOML files."""

import tomllib
from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as a dict."""
    table: dict[str, Any] = tomllib.loads(path.read_text())
    return table
