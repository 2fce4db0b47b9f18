"""Images as tensors of bytes on the device that uses them, and batches of them."""

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
VALIDATION = 1000  # of the calibration images, those that recipes are chosen by
# Training images, and the shape of an image, of each data set, so that a plan needs none of them.
SIZES = {"digits": (6000, (1, 28, 28)), "mnist": (55_000, (1, 28, 28)), "cifar10": (45_000, (3, 32, 32))}
SPLIT_SEED = 20_201_207  # the day the paper appeared


class Images(NamedTuple):
    """A set of labelled images.

    Attributes:
        pixels: pixels (n, C, H, W) as uint8.
        labels: classes (n,) as int64.
    """

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Images":
        """The same images on another device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def head(self, count: int | None) -> "Images":
        """The first `count` images, or all of them for None."""
        return Images(self.pixels[:count], self.labels[:count])

    def floats(self) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) in [0, 1] and labels."""
        return self.pixels.float() / 255, self.labels


@dataclass(frozen=True)
class DataSet:
    """A data set with its recorded split. Only evaluation opens the test set.

    Attributes:
        name: name in experiments.
        checksums: checksums of its files.
        train: images to train on.
        calibration: images that are kept out of training, for thresholds.
        open_test: function that loads the test set.

    Sets for choosing among recipes leave the test set closed: see `held_out`.
    """

    name: str
    checksums: dict[str, str]
    train: Images
    calibration: Images
    open_test: Callable[[], Images]

    def held_out(self) -> tuple[Images, Images]:
        """Split the calibration images into calibration and validation images. The test set stays closed."""
        kept = len(self.calibration.labels) - min(VALIDATION, len(self.calibration.labels) // 2)
        return Images(*(part[:kept] for part in self.calibration)), Images(*(part[kept:] for part in self.calibration))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width


def load(name: str, root: str | Path | None = None) -> DataSet:
    """Load a data set by name, which is fetched first if need be.

    Args:
        name: "mnist", "cifar10", or "digits", the sample that clusterguard ships.
        root: folder of data sets, see `benchmarks.data.fetch.data_root`.

    Raises:
        ConfigurationError: the name is unknown.
        DownloadError: the data set is missing and no source has it.
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


class FloatBatches:
    """Batches of floats in [0, 1] from images of bytes. They are made on the device of the images.

    Args:
        images: images to make batches of.
        batch_size: number of images in a batch. The last batch may have fewer.
        shuffle: whether to take a new order at every pass.
        augment: whether to pad images by 4 pixels, crop them at random and flip them at random.
        cutmix: largest share of an image that a part of another image covers, see `cover`.
        generator: source of randomness on the CPU, so that every device sees the same batches.
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
    """Pad images (B, C, H, W) with zeros, crop them to their size at random places, and flip about half of them."""
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
    """CutMix for hard labels: replace a box in each image by the same box of another image in the batch.

    The label is that of the larger part. With mixed labels, "accepted under a wrong label" would be a matter of degree,
    and the attacks that got through could not be counted. The box is kept small instead.

    Args:
        images: images (B, C, H, W).
        largest: largest share of the area that a box may cover, in (0, 0.5]. Shares are uniform up to that.
        generator: source of randomness on the CPU.

    Returns:
        The images (B, C, H, W) with boxes of other images.

    Raises:
        ConfigurationError: `largest` is outside (0, 0.5], so that the box could be the larger part.

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
