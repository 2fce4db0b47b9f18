"""One writer for a file of progress: a second one is told so before it touches anything."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from clusterguard._support._processes import collect
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

    The operating system holds the lock of ``<path>.lock`` for this block, and takes it back when the process dies. On a
    file system that knows no locks, nobody is kept out.

    Args:
        path: path of the file; its folder is created. None locks nothing.
        accelerator: whose processes write it together: the main one takes the lock, and all are told if it cannot.

    Raises:
        PersistenceError: somebody else writes it at the moment, in this process or in another.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, only_writer(Path(folder) / "run.pt"):
        ...     [file.name for file in Path(folder).iterdir()]
        ['run.pt.lock']
    """
    if path is None:
        yield
        return
    file = Path(path).with_name(Path(path).name + ".lock")
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
            reason = "".join(collect({accelerator.process_index: reason}, accelerator))
        if reason:
            raise PersistenceError(f"{path} {reason}, or choose another file")
        yield
    finally:
        if lock is not None:
            _unlock(file, lock)


def _lock(file: Path) -> IO[bytes] | None:
    """The locked file, or None if somebody else holds it."""
    while True:
        handle = file.open("ab")
        if not _is_free(handle):
            handle.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                _held.add(handle)
                return handle
        handle.close()  # whoever held it has deleted it since it was opened


def _is_free(handle: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # there are no locks here
        return True
    return True


def _unlock(file: Path, handle: IO[bytes]) -> None:
    if handle.closed:  # in a forked process, where the lock is the parent's
        return
    _held.discard(handle)
    with suppress(OSError):  # Windows deletes no open file; elsewhere it goes first, while nobody can have it
        if sys.platform == "win32":
            handle.close()
        file.unlink(missing_ok=True)
    handle.close()


def _leave_to_the_parent() -> None:
    """Workers that outlive a killed training must not keep its lock."""
    for handle in _held:
        handle.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
