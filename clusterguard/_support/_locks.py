"""Locks, so that two runs do not write the same progress file at the same time."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from clusterguard._support._files import real_path
from clusterguard._support._processes import gather
from clusterguard.errors import PersistenceError, in_one_line

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    from accelerate import Accelerator

_held: set[IO[bytes]] = set()


@contextmanager
def only_writer(path: str | Path | None, accelerator: "Accelerator | None" = None) -> Iterator[None]:
    """Hold an exclusive lock on a file during the block.

    The lock is on the file ``<path>.lock``. The operating system releases it when the process dies. On a file system
    without locks, the block runs without one.

    Args:
        path: path of the file to protect; its folder is created. None locks nothing.
        accelerator: accelerator whose processes write the file together. Its main process takes the lock, and all of
            its processes raise the error if that fails.

    Raises:
        PersistenceError: another run, in this process or in another one, holds the lock; or the file cannot be locked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, only_writer(Path(folder) / "run.pt"):
        ...     [file.name for file in Path(folder).iterdir()]
        ['run.pt.lock']
    """
    if path is None:
        yield
        return
    locked = real_path(path)
    file = locked.with_name(locked.name + ".lock")
    lock, reason = None, ""
    if accelerator is None or accelerator.is_main_process:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(file)
            reason = "" if lock else "is being written by another run; wait until that has ended"
        except OSError as error:
            reason = f"cannot be locked ({in_one_line(error)}); delete {file.name} if it is there"
    try:
        if accelerator is not None:
            reason = "".join(gather({accelerator.process_index: reason}, accelerator))
        if reason:
            raise PersistenceError(f"{path} {reason}, or choose another file")
        yield
    finally:
        if lock is not None:
            _unlock(file, lock)


def _lock(file: Path) -> IO[bytes] | None:
    """Open and lock a file; None if another run holds the lock."""
    while True:
        if file.exists() and not file.is_file():
            raise FileExistsError("it is a folder, a pipe or a device")
        handle = file.open("ab")
        if not _is_free(handle):
            handle.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                _held.add(handle)
                return handle
        handle.close()  # the run that held the lock has deleted this file since we opened it


def _is_free(handle: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # this file system has no locks
        return True
    return True


def _unlock(file: Path, handle: IO[bytes]) -> None:
    if handle.closed:  # this is a forked process, and the parent holds the lock
        return
    _held.discard(handle)
    with suppress(OSError):
        # Windows cannot delete an open file. On other systems the file is deleted before its lock is released, so that
        # no other run can lock it in between.
        if sys.platform == "win32":
            handle.close()
        file.unlink(missing_ok=True)
    handle.close()


def _leave_to_the_parent() -> None:
    """Close locked files in a forked process, or workers that outlive a killed training would keep its lock."""
    for handle in _held:
        handle.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
