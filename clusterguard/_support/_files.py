"""Files that are written whole or not at all, and archives that are read whole or not at all."""

import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    If writing fails, what was at `path` before is still there and nothing else is left behind. The file gets the
    permissions of any new file.

    Args:
        path: where the file shall be; its folder is created.
        write: gets the temporary path.

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
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        permissions = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(permissions)  # safetensors' files can be read by their owner alone
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # or a crash of the machine could leave an empty file under the new name
        temporary.replace(path)
    return path


def check_place(path: str | Path) -> None:
    """A file can be written at a path, whose folder is created.

    Raises:
        ConfigurationError: it cannot, for the path is a folder's, or one of the folders on the way to it is a file, or
            must not be written to.

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
    except (OSError, TypeError, ValueError) as error:  # Python's own of what is no path at all
        raise ConfigurationError(
            f"expected the path of a file that can be written, got {str(path)!r} ({in_one_line(error)}); choose another"
        ) from None


def read_archive(path: str | Path, *keys: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A dict that `torch.save` wrote; no code in the file is run, and its checksums are looked at.

    Args:
        path: of the file.
        *keys: that the dict must have.
        device: where its tensors go.

    Raises:
        PersistenceError: it cannot be read, is damaged, or holds something else; what to do is for the caller to add.

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
            damaged = archive.testzip()  # torch itself does not look at checksums
        if damaged is not None:
            raise PersistenceError(f"{path} is damaged: its part {damaged!r} has another checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old ways to store tensors; there is nothing that the caller could do
            state = torch.load(path, weights_only=True, map_location=device)
    except PersistenceError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and torch each have errors of their own, and pass on Python's
        raise PersistenceError(f"{path} is damaged or cannot be read ({in_one_line(error)})") from error
    if not isinstance(state, dict) or not set(keys) <= set(state):
        raise PersistenceError(f"{path} holds something else than {', '.join(keys)}")
    return state
