"""Files that are written completely or not at all, and archives that are read completely or not at all."""

import glob
import os
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from clusterguard._support._switches import no_warnings
from clusterguard.errors import ClusterGuardError, ConfigurationError, PersistenceError, in_one_line
from safetensors import SafetensorError

if sys.platform != "win32":
    import fcntl


_OLDER = "older"  # name of the file that is replaced, until the new one is in its place
_FAILED_WRITES = (RuntimeError, SafetensorError)  # torch and safetensors raise these if the disk is full


def write_atomically(path: str | Path, write: Callable[[Path], object], *, keep: Path | None = None) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    If writing fails, an older file at `path` stays as it was, and no temporary file is left behind. The file gets the
    permissions that new files usually get. If the path is a symbolic link, the file that it leads to is replaced.

    Args:
        path: path of the file; its folder is created.
        write: function that writes the content to the temporary path it is called with.
        keep: path in the same folder at which the older file is kept, in the place of what is there. None keeps none.

    Returns:
        The path.

    Raises:
        PersistenceError: the file cannot be written, for example because the disk is full; or there is a folder, a pipe
            or a device at the path.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_atomically(Path(folder.name) / "new" / "note.txt", lambda file: file.write_text("whole")).name
        'note.txt'
        >>> folder.cleanup()
    """
    target = real_path(path)
    if exists(target) and not target.is_file():
        raise PersistenceError(
            f"expected the path of an ordinary file, got a folder, a pipe or a device in the place of {path}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staging(target) as folder:
            temporary, older = folder / target.name, folder / _OLDER
            temporary.touch()
            permissions = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(permissions)  # safetensors lets only the owner read its files
            with temporary.open("rb") as written:
                os.fsync(written.fileno())  # or a crash of the machine could leave an empty file under the new name
            if keep is not None and target.exists():
                _link(target, older)  # not moved: what is at `keep` may be the only whole file until the next line
            temporary.replace(target)
            if keep is not None and older.exists():
                older.replace(keep)
    except (OSError, *_FAILED_WRITES) as error:
        if isinstance(error, ClusterGuardError):
            raise
        raise PersistenceError(
            f"{path} could not be written ({in_one_line(error)}); make room, or choose another place, and start again"
        ) from error
    return Path(path)


def real_path(path: str | Path) -> Path:
    """The path that symbolic links lead to."""
    with suppress(OSError):  # such as a name that is too long, which whoever opens the path will notice
        if Path(path).is_symlink():
            return Path(os.path.realpath(path))
    return Path(path)


def exists(path: Path) -> bool:
    """Whether there is anything at a path.

    Raises:
        PersistenceError: nobody can tell, for example because its name is too long or its folder cannot be read.
    """
    try:
        return path.exists()
    except OSError as error:
        raise PersistenceError(f"{path} cannot be reached ({in_one_line(error)}); choose another place") from error


def _link(file: Path, other: Path) -> None:
    """Give a file a second name; where the file system has no such links, copy it."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder beside a file for the block. Folders that killed writers of the file left behind are removed, too."""
    prefix = f".{path.name}.part-"
    for folder in path.parent.glob(f"{glob.escape(prefix)}????????/"):
        with suppress(OSError), _locked(folder) as is_free:
            is_ours = {entry.name for entry in folder.iterdir()} <= {path.name, _OLDER}
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
        ConfigurationError: the path is that of a folder, a pipe or a device, one of its parents is a file, or the
            folder is not writable.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> check_place(Path(folder.name) / "new" / "state.pt")
        >>> folder.cleanup()
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise FileExistsError(f"{path} is a folder, a pipe or a device")
        folder = real_path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, TypeError, ValueError) as error:  # TypeError and ValueError: it is no path at all
        raise ConfigurationError(
            f"expected the path of a file that can be written, got {str(path)!r} ({in_one_line(error)}); choose another"
        ) from None


def open_ordinary(path: str | Path) -> BinaryIO:
    """Open a file for reading. A pipe would wait for a writer, and a device could give data without an end.

    Files of the system, such as those in /proc, may do the same. They look like ordinary files, most of them like empty
    ones.

    Args:
        path: path of a file, or of a symbolic link to one.

    Raises:
        OSError: the file is missing or cannot be read.
        PersistenceError: the file is empty, or there is a folder, a pipe, a device or a file of the system at the path.
    """
    _check_ordinary(Path(path).stat(), path)  # first: to open a device may do something already
    if os.path.realpath(path).startswith(("/proc/", "/sys/")):
        raise PersistenceError(f"expected an ordinary file, got one of the system in the place of {path}")
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115  # pathlib has no opener
    try:
        _check_ordinary(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def _check_ordinary(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise PersistenceError(f"expected an ordinary file, got a folder, a pipe or a device in the place of {path}")
    if not status.st_size:
        raise PersistenceError(f"{path} is empty")


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, without waiting if it has become a pipe in the meantime."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_archive(file: BinaryIO, path: str | Path) -> None:
    """Check that the parts of a zip archive are not compressed, fit into it, and have their checksums.

    Torch itself does not verify checksums, and would unpack a small file to any size.

    Args:
        file: open file, which is at its beginning afterwards.
        path: its path, for messages.

    Raises:
        PersistenceError: one of these does not hold.
        zipfile.BadZipFile: the file is no zip archive.
    """
    with zipfile.ZipFile(file) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise PersistenceError(f"{path} was not written by torch.save: its parts are compressed")
        if sum(part.file_size for part in archive.infolist()) > os.fstat(file.fileno()).st_size:
            raise PersistenceError(f"{path} was not written by torch.save: its parts overlap")
        damaged = archive.testzip()
    if damaged is not None:
        raise PersistenceError(f"{path} is damaged: its part {damaged!r} has another checksum")
    file.seek(0)


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
        with open_ordinary(path) as file:
            check_archive(file, path)
            with no_warnings.on():  # about old storage formats, which the caller cannot change
                state = torch.load(file, weights_only=True, map_location=device)
    except PersistenceError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and torch each raise errors of many classes
        raise PersistenceError(f"{path} is damaged or cannot be read ({in_one_line(error)})") from error
    if not isinstance(state, dict) or not set(keys) <= set(state):
        raise PersistenceError(f"{path} holds something else than {', '.join(keys)}")
    return state
