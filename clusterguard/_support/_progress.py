"""Files that keep the progress of long work. Trainings, attack suites and benchmarks share one format."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clusterguard._support._files import exists, read_archive, real_path, write_atomically
from clusterguard.errors import PersistenceError, in_one_line
from torch import Tensor

_FORMAT, _VERSION = "clusterguard progress", 1
_MOST_BYTES = 2**50  # of tensors; no disk holds more
_MOST_REPEATS = 100_000  # times that a list or dict is met again
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
        _check_size(content, _MOST_BYTES)
        digest = digest_of(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise PersistenceError(f"{path} cannot keep the progress of a {kind}: {in_one_line(error)}") from error
    record = {"format": _FORMAT, "version": _VERSION, "kind": kind, "digest": digest, "state": content}
    try:
        write_atomically(path, lambda temporary: torch.save(record, temporary), keep=previous(path))
    except PersistenceError as error:
        raise PersistenceError(f"{error}: the work goes on from the last file that was written") from error


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
        PersistenceError: no file can be used. Each is damaged, of another kind, or of a newer version; or the path
            cannot be reached.

    Warns:
        UserWarning: the last file is damaged or missing, and the one before it is used.
    """
    files = [file for file in (Path(path), previous(path)) if exists(file)]
    faults = []
    for file in files:
        try:
            state = _read(file, kind, device)
        except PersistenceError as error:
            faults.append(str(error))
            continue
        if faults:
            warnings.warn(f"{files[0]} is damaged; going on from the one before it, {file} ({faults[0]})", stacklevel=3)
        elif file != Path(path):
            warnings.warn(
                f"{path} is missing; going on from the one before it, {file}; delete that too to begin anew",
                stacklevel=3,
            )
        return Progress(file, state)
    if files:
        raise PersistenceError(f"{faults[0]}; {hint}")
    return None


def previous(path: str | Path) -> Path:
    """The path at which `save_progress` keeps the previous file."""
    file = real_path(path)
    return file.with_name(file.name + ".previous")


def _read(file: Path, kind: str, device: torch.device | str) -> dict[str, Any]:
    record = read_archive(file, *_KEYS, device=device)
    try:
        _check_size(record, 16 * file.stat().st_size + 2**24)  # tensors that share memory are in the file once
    except (TypeError, ValueError) as error:
        raise PersistenceError(f"{file} is no progress file of clusterguard ({in_one_line(error)})") from error
    if record["format"] != _FORMAT or not isinstance(record["state"], dict):
        raise PersistenceError(f"{file} is no progress file of clusterguard")
    if type(record["version"]) is not int or record["version"] > _VERSION:
        version = repr(record["version"])[:20]
        raise PersistenceError(f"{file} was written by a newer clusterguard, in version {version} of its format")
    if record["kind"] != kind:
        raise PersistenceError(f"{file} holds the progress of a {record['kind']!r:.50}, expected a {kind}")
    try:
        is_whole = digest_of(record["state"]) == record["digest"]
    except Exception:  # a tensor of an unusual kind may raise any error of torch
        is_whole = False
    if not is_whole:
        raise PersistenceError(f"{file} is damaged: its content has another digest")
    state: dict[str, Any] = record["state"]
    return state


def _check_size(value: Any, most_bytes: float) -> None:
    """Check that values can be gone through in little time and memory.

    A list that holds one list twice, and so on, is small in memory and in a file, but endless for a reader. A tensor
    that repeats one number can have any size.

    Raises:
        ValueError: they are too many or too large.
        TypeError: a tensor is sparse or quantized or has no values.
    """
    waiting, seen, repeats, size = [value], set[int](), 0, 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            if one.layout != torch.strided or one.is_meta or one.is_quantized:
                raise TypeError(f"expected tensors of plain numbers, got one of {one.layout} and {one.dtype}")
            size += one.nbytes
        elif isinstance(one, Mapping | list | tuple) and one:
            repeats += id(one) in seen
            seen.add(id(one))
            waiting.extend([*one, *one.values()] if isinstance(one, Mapping) else one)
        if size > most_bytes or repeats > _MOST_REPEATS:
            raise ValueError("its values repeat so often that they take no end")


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


def _add(update: Callable[[Any], object], value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
        update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        update(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data)  # one element may have any stride
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
