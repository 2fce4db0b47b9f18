"""Files that are written completely or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, then move it there in one step.

    If writing fails, an older file at `path` stays as it was. What a killed process leaves is overwritten next time, so
    only one process may write a file at a time.

    Args:
        path: path of the file. Its folder is created if it does not exist.
        write: function that writes the content to the temporary path that it gets.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-part{path.suffix}")  # the suffix may decide how it is written
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # or a crash of the machine could leave an empty file under the new name
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
