"""What the studies keep: their counts, and a table of them for the documentation."""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._support import write_atomically, write_json
from benchmarks.running._store import provenance


def read_study(folder: Path, nothing: Mapping[str, Any]) -> dict[str, Any]:
    """The counts that `write_study` has written to a folder, so that a study can go on with them.

    Args:
        folder: folder of the study's results.
        nothing: counts of a study that has not begun.
    """
    file = folder / "counts.json"
    counts: dict[str, Any] = json.loads(file.read_text()) if file.exists() else dict(nothing)
    return counts


def write_study(folder: Path, counts: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Write counts.json, with where the counts come from, and table.md. The folder is made if it does not exist.

    Args:
        folder: folder of the study's results.
        counts: plain values by name.
        lines: table of the counts in Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "counts.json", {**counts, "provenance": provenance(torch.device("cpu"))})
    text = "\n".join(lines) + "\n"
    write_atomically(folder / "table.md", partial(Path.write_text, data=text, encoding="utf-8"))
