"""Checks the folders that commands write to, and records what a training was started with."""

import json
from pathlib import Path
from typing import Any

from clusterguard._support import open_ordinary, previous, write_atomically
from clusterguard.detectors._internal import check_overwritable
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line


def begin_run(folder: Path, options: dict[str, Any], *, resume: bool) -> Path:
    """Check that a training neither overwrites another one nor continues one that had other options.

    Args:
        folder: folder of the guard and its checkpoint.
        options: all options that decide what is trained. They are written to `training.json`, and compared with it when
            a training is resumed.
        resume: whether to continue from the checkpoint, if there is one.

    Returns:
        The path of the checkpoint.

    Raises:
        ConfigurationError: there is an earlier training and `resume` is off, or its options were different.
        PersistenceError: the folder holds files of another program.
    """
    check_overwritable(folder)
    checkpoint, record = folder / "checkpoint.pt", folder / "training.json"
    guard, is_begun = folder / "config.json", checkpoint.exists() or previous(checkpoint).exists()
    if is_begun and not resume:
        raise ConfigurationError(
            f"{checkpoint} belongs to an earlier training; go on with --resume, or choose another folder"
        )
    if guard.exists() and not is_begun:
        raise ConfigurationError(
            f"{folder} holds a guard already and no checkpoint to go on from; choose another folder"
        )
    if not is_begun and not _tells_a_training(record):
        check_output(folder)
    if is_begun:
        try:
            with open_ordinary(record) as file:
                before = json.loads(file.read())
            changed = [name for name in options if before.get(name) != options[name]]
        except (OSError, PersistenceError, ValueError, RecursionError, AttributeError) as error:
            raise ConfigurationError(
                f"{record}, the record of {checkpoint}, is damaged or cannot be read ({in_one_line(error)}); "
                "choose another folder, or delete both to start anew"
            ) from error
        if changed:
            differences = "; ".join(_difference(name, before.get(name), options[name]) for name in changed)
            raise ConfigurationError(
                f"expected the options that {checkpoint} was trained with, by {record.name}: {differences}; use these, "
                "or choose another folder"
            )
    write_atomically(record, lambda file: file.write_text(json.dumps(options, indent=2) + "\n"))
    return checkpoint


def check_output(folder: Path, *ours: str) -> None:
    """Check that a folder for results holds no other files.

    Args:
        folder: folder for results.
        *ours: names of results, which may be there and are overwritten.

    Raises:
        PersistenceError: it is a file, or holds other files than these and hidden ones.
    """
    if folder.exists() and not folder.is_dir():
        raise PersistenceError(f"expected a folder, got the file {folder}; choose another name")
    there = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    others = sorted(name for name in there if name not in ours and not name.startswith("."))
    if others:
        raise PersistenceError(
            f"expected an empty folder{', or one that this command wrote' if ours else ''}, got {folder} with "
            f"{others[0]!a} in it; "
            "choose another folder"
        )


def _difference(name: str, before: object, now: object) -> str:
    """An option with its value before and now; of an attack or a calibrator, only the settings that differ."""
    old, new = (str(value).split(", ") for value in (before, now))
    if len(old) != len(new):
        old, new = [str(before)], [str(now)]
    return f"{name} " + ", ".join(f"{one} (got {other})" for one, other in zip(old, new, strict=True) if one != other)


def _tells_a_training(record: Path) -> bool:
    """Whether `begin_run` wrote this file."""
    try:
        with open_ordinary(record) as file:
            return "calibrator" in json.loads(file.read())
    except (OSError, PersistenceError, ValueError, RecursionError, TypeError):
        return False
