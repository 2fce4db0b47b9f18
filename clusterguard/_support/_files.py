"""Files that are written completely or not at all, and archives that are read completely or not at all."""

import glob
import os
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line

if sys.platform != "win32":
    import fcntl


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    If writing fails, an older file at `path` stays as it was, and no temporary file is left behind. The file gets the
    permissions that new files usually get.

    Args:
        path: path of the file; its folder is created.
        write: function that writes the content to the temporary path it is called with.

    Returns:
        The path.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_atomically(Path(folder.name) / "new" / "note.txt", lambda file: file.write_text("whole")).name
        'note.txt'
        >>> folder.cleanup()
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _staging(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        permissions = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(permissions)  # safetensors lets only the owner read its files
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # or a crash of the machine could leave an empty file under the new name
        temporary.replace(path)
    return path


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder beside a file for the block. Folders that killed writers of the file left behind are removed, too."""
    prefix = f".{path.name}.part-"
    for folder in path.parent.glob(f"{glob.escape(prefix)}????????/"):
        with suppress(OSError), _locked(folder) as is_free:
            is_ours = {entry.name for entry in folder.iterdir()} <= {path.name}
            if is_free and is_ours and time.time() - folder.stat().st_mtime > 1:  # a younger one may not be locked yet
                shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as name, _locked(Path(name)):
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Try to lock a folder for the block, and say whether that worked. A killed process loses its locks."""
    if sys.platform == "win32":  # which locks no folders
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody else has locked it, or the file system knows no locks
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def check_place(path: str | Path) -> None:
    """Check that a file can be written at a path, and create its folder.

    Raises:
        ConfigurationError: the path is that of a folder, one of its parents is a file, or the folder is not writable.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> check_place(Path(folder.name) / "new" / "state.pt")
        >>> folder.cleanup()
    """
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except (OSError, TypeError, ValueError) as error:  # TypeError and ValueError: it is no path at all
        raise ConfigurationError(
            f"expected the path of a file that can be written, got {str(path)!r} ({in_one_line(error)}); choose another"
        ) from None


def read_archive(path: str | Path, *keys: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a dict that `torch.save` wrote. Its checksums are verified, and no code in the file is run.

    Args:
        path: path of the file.
        *keys: keys that the dict must have.
        device: device on which its tensors are put.

    Raises:
        PersistenceError: the file cannot be read, is damaged, or holds something else. The message does not say what to
            do about it; the caller adds that.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = write_atomically(Path(folder.name) / "state", lambda file: torch.save({"step": 3}, file))
        >>> read_archive(file, "step")
        {'step': 3}
        >>> folder.cleanup()
    """
    try:
        if not Path(path).is_file():
            raise PersistenceError(f"{path} is no ordinary file")  # a device or a pipe would be read without an end
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise PersistenceError(f"{path} was not written by torch.save: its parts are compressed")
            damaged = archive.testzip()  # torch itself does not verify checksums
        if damaged is not None:
            raise PersistenceError(f"{path} is damaged: its part {damaged!r} has another checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storage formats, which the caller cannot change
            state = torch.load(path, weights_only=True, map_location=device)
    except PersistenceError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and torch each raise errors of many classes
        raise PersistenceError(f"{path} is damaged or cannot be read ({in_one_line(error)})") from error
    if not isinstance(state, dict) or not set(keys) <= set(state):
        raise PersistenceError(f"{path} holds something else than {', '.join(keys)}")
    return state
