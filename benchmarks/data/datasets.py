"""Images as tensors of bytes, held where they are used, and batches of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from clusterguard.errors import ConfigurationError
from clusterguard.samples import load_digits
from torch import Generator, Tensor
from torch.nn import functional

from benchmarks.data.fetch import CHECKSUMS, fetch

CALIBRATION = 5000  # images of the training set kept for calibration
VALIDATION = 1000  # of these, images that recipes are chosen by
SPLIT_SEED = 20_201_207  # the day the paper appeared


class Images(NamedTuple):
    """A labelled set.

    Attributes:
        pixels: (n, C, H, W) uint8.
        labels: (n,) int64.
    """

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Images":
        """The same on another device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def head(self, count: int | None) -> "Images":
        """The first ones."""
        return Images(self.pixels[:count], self.labels[:count])

    def floats(self) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) in [0, 1] and labels."""
        return self.pixels.float() / 255, self.labels


@dataclass(frozen=True)
class DataSet:
    """A data set with its recorded split; the test set is opened by evaluation alone.

    Attributes:
        name: as experiments call it.
        checksums: of the files behind it.
        train: what is trained on.
        calibration: taken out of the training set, for thresholds.
        open_test: loads the test set.

    Sets for choosing among recipes leave the test set closed: see `held_out`.
    """

    name: str
    checksums: dict[str, str]
    train: Images
    calibration: Images
    open_test: Callable[[], Images]

    def held_out(self) -> tuple[Images, Images]:
        """Calibration and validation images, both out of what is kept for calibration; the test set stays closed."""
        kept = len(self.calibration.labels) - min(VALIDATION, len(self.calibration.labels) // 2)
        return Images(*(part[:kept] for part in self.calibration)), Images(*(part[kept:] for part in self.calibration))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width


def load(name: str, root: str | Path | None = None) -> DataSet:
    """A data set by name.

    Args:
        name: "mnist", "cifar10", or "digits", the sample that clusterguard ships.
        root: folder of data sets, see `benchmarks.data.fetch.data_root`; what is not there is fetched.

    Raises:
        ConfigurationError: an unknown name.
        DownloadError: it is not there and no source has it.
    """
    if name == "digits":
        train, calibration = _sample("train"), _sample("calibration")
        return DataSet(name, {}, train, calibration, lambda: _sample("test"))
    if name not in CHECKSUMS:
        raise ConfigurationError(f"expected a data set among digits, {', '.join(CHECKSUMS)}, got {name!r}")
    folder = fetch(name, root)
    read = _read_mnist if name == "mnist" else _read_cifar10
    pixels, labels = read(folder, True)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(SPLIT_SEED))
    train, calibration = (Images(pixels[rows], labels[rows]) for rows in (order[CALIBRATION:], order[:CALIBRATION]))
    return DataSet(name, CHECKSUMS[name], train, calibration, lambda: read(folder, False))


class Batches:
    """Batches of floats in [0, 1] out of a set of bytes, indexed and augmented on the set's own device.

    Args:
        images: the set.
        batch_size: of all batches but the last.
        shuffle: a new order at every pass.
        augment: random crops of the image padded by 4, and random flips.
        cutmix: largest part of an image that another one covers, see `cover`.
        generator: of order and augmentation, on the CPU, so that every device sees the same batches.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        cutmix: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.cutmix = cutmix
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.images.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images.labels)
        order = torch.randperm(count, generator=self.generator) if self.shuffle else torch.arange(count)
        for rows in order.to(self.images.labels.device).split(self.batch_size):
            images, labels = Images(*(part[rows] for part in self.images)).floats()
            if self.augment:
                images = crop_and_flip(images, self.generator)
            if self.cutmix:
                images = cover(images, self.cutmix, self.generator)
            yield images, labels


def crop_and_flip(images: Tensor, generator: Generator | None = None, *, padding: int = 4) -> Tensor:
    """Each image (B, C, H, W) padded with zeros, cropped to its size at a random place, and flipped half the time."""
    count, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    flipped = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    padded = functional.pad(images, [padding] * 4)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def cover(images: Tensor, largest: float, generator: Generator | None = None) -> Tensor:
    """CutMix for hard labels: in each image a box is taken from the same place of another one of the batch.

    The label stays that of the larger part. Mixed labels would make "accepted under a wrong label" a matter of degree,
    and then nobody could say which attacks got through; so the other part is kept small instead.

    Args:
        images: (B, C, H, W).
        largest: part of the area that a box may cover, in (0, 0.5]; its size is uniform up to that.
        generator: on the CPU.

    Returns:
        (B, C, H, W).

    Raises:
        ConfigurationError: a part that could be the larger one.

    Reference:
        Yun et al., "CutMix" (2019).
    """
    if not 0 < largest <= 0.5:
        raise ConfigurationError(f"expected cutmix in (0, 0.5], so that labels stay true, got {largest}")
    count, _, height, width = images.shape
    others = torch.randperm(count, generator=generator)
    side = (largest * torch.rand(count, generator=generator)).sqrt()
    covered = []
    for length in (height, width):
        size = (side * length).floor()
        first = (torch.rand(count, generator=generator) * (length - size + 1)).floor()
        position = torch.arange(length)
        covered.append((position >= first[:, None]) & (position < (first + size)[:, None]))
    rows, columns = (part.to(images.device) for part in covered)
    box = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(box, images[others.to(images.device)], images)


def _sample(split: str) -> Images:
    images, labels = load_digits(split).tensors  # type: ignore[arg-type]
    return Images((images * 255).round().byte(), labels)


@cache
def _read_mnist(root: Path, train: bool) -> Images:
    from torchvision.datasets import MNIST

    digits = MNIST(str(root), train=train)
    return Images(digits.data[:, None], digits.targets)


@cache
def _read_cifar10(root: Path, train: bool) -> Images:
    files = [file for file in CHECKSUMS["cifar10"] if ("data_batch" in file) == train]
    records = torch.from_numpy(np.concatenate([np.fromfile(root / file, np.uint8) for file in files])).view(-1, 3073)
    return Images(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long())
