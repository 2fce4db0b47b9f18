"""Files that keep the progress of long work. Trainings, attack suites and benchmarks share one format."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clusterguard._support._files import read_archive, write_atomically
from clusterguard.errors import PersistenceError, in_one_line
from torch import Tensor

_FORMAT, _VERSION = "clusterguard progress", 1
_KEYS = ("format", "version", "kind", "digest", "state")


@dataclass(frozen=True)
class Progress:
    """The content of a progress file.

    Attributes:
        file: path of the file that was read, which is that of the previous file if the last one is damaged.
        state: values that were passed to `save_progress`.
    """

    file: Path
    state: dict[str, Any]


def save_progress(path: str | Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write the progress of a long task to a file, so that the task can continue after an interruption.

    The file is written completely or not at all, and no code is pickled. An older file at the path is kept beside the
    new one, under the suffix ``.previous``.

    Args:
        path: path of the file; its folder is created.
        kind: kind of task, such as "training". A file can only be read as the kind that it was written as.
        state: values by name: tensors, numbers, strings, None, and lists and dicts of them.

    Raises:
        PersistenceError: the state holds another type, or the file cannot be written, for example because the disk is
            full.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name) / "state.pt"
        >>> save_progress(file, "counting", {"step": 3})
        >>> read_progress(file, "counting", hint="delete it").state
        {'step': 3}
        >>> folder.cleanup()
    """
    content = dict(state)
    try:
        digest = digest_of(content)
    except TypeError as error:
        raise PersistenceError(f"{path} cannot keep the progress of a {kind}: {error}") from error
    record = {"format": _FORMAT, "version": _VERSION, "kind": kind, "digest": digest, "state": content}

    def write(temporary: Path) -> None:
        torch.save(record, temporary)
        if Path(path).exists():
            Path(path).replace(previous(path))  # if the process is killed here, work continues from the previous file

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise PersistenceError(
            f"{path} could not be written ({in_one_line(error)}); make room, or choose another place, and start again: "
            "the work goes on from the last file that was written"
        ) from error


def read_progress(path: str | Path, kind: str, *, hint: str, device: torch.device | str = "cpu") -> Progress | None:
    """Read the newest intact progress file.

    Args:
        path: path of the file.
        kind: kind of task, as in `save_progress`.
        hint: advice about what to do with a file that cannot be used. It ends the error message.
        device: device on which the tensors are put.

    Returns:
        The progress, or None if there is neither this file nor a previous one.

    Raises:
        PersistenceError: no file can be used. Each is damaged, of another kind, or of a newer version.

    Warns:
        UserWarning: the last file is damaged, and the one before it is used.
    """
    files = [file for file in (Path(path), previous(path)) if file.exists()]
    faults = []
    for file in files:
        try:
            state = _read(file, kind, device)
        except PersistenceError as error:
            faults.append(str(error))
            continue
        if file != files[0]:
            warnings.warn(f"{files[0]} is damaged; going on from the one before it, {file} ({faults[0]})", stacklevel=3)
        return Progress(file, state)
    if files:
        raise PersistenceError(f"{faults[0]}; {hint}")
    return None


def previous(path: str | Path) -> Path:
    """The path at which `save_progress` keeps the previous file."""
    return Path(path).with_name(Path(path).name + ".previous")


def _read(file: Path, kind: str, device: torch.device | str) -> dict[str, Any]:
    record = read_archive(file, *_KEYS, device=device)
    if record["format"] != _FORMAT or not isinstance(record["state"], dict):
        raise PersistenceError(f"{file} is no progress file of clusterguard")
    if type(record["version"]) is not int or record["version"] > _VERSION:
        version = repr(record["version"])[:20]
        raise PersistenceError(f"{file} was written by a newer clusterguard, in version {version} of its format")
    if record["kind"] != kind:
        raise PersistenceError(f"{file} holds the progress of a {record['kind']!r:.50}, expected a {kind}")
    try:
        is_whole = digest_of(record["state"]) == record["digest"]
    except (TypeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise PersistenceError(f"{file} is damaged: its content has another digest")
    state: dict[str, Any] = record["state"]
    return state


def digest_of(value: Any) -> str:
    """The SHA-256 digest of a value, with the shapes and data types of its tensors and the order of its dicts.

    The devices of tensors do not change the digest.

    Args:
        value: tensor, number, string, bytes, None, or a list, tuple or dict of such values.

    Raises:
        TypeError: the value, or a value in it, has another type.

    Example:
        >>> digest_of({"a": 1}) == digest_of({"a": 1}), digest_of([1]) == digest_of([True])
        (True, False)
    """
    digest = hashlib.sha256()
    _add(digest.update, value)
    return digest.hexdigest()


def _add(update: Callable[[bytes], object], value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)} ".encode())
        for key, entry in value.items():
            _add(update, key)
            _add(update, entry)
    elif isinstance(value, list | tuple):
        update(f"sequence {len(value)} ".encode())
        for entry in value:
            _add(update, entry)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        text = repr(value).encode()
        update(f"value {len(text)} ".encode() + text)
    else:
        raise TypeError(f"expected tensors, numbers, strings, lists and dicts, got {type(value).__name__}")
