"""Files that are written whole or not at all."""

import tempfile
from collections.abc import Callable
from pathlib import Path


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
        temporary.replace(path)
    return path
