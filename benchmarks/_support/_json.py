"""Writes results as JSON."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from clusterguard._support import write_atomically


def write_json(path: Path, content: Any) -> Path:
    """Write plain values to a JSON file, completely or not at all, and return its path."""
    return write_atomically(path, partial(Path.write_text, data=json.dumps(content, indent=1) + "\n"))
