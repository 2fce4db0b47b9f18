"""Images as tensors of bytes on the device that uses them, and batches of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from clusterguard.errors import ConfigurationError
from clusterguard.training import crop_and_flip
from torch import Generator, Tensor


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


class FloatBatches:
    """Batches of floats in [0, 1] from images of bytes. They are made on the device of the images.

    Args:
        images: images to make batches of.
        batch_size: number of images in a batch. The last batch may have fewer.
        shuffle: whether to take a new order at every pass.
        augment: whether to pad images by 4 pixels, crop them at random and flip them at random.
        cutmix: largest share of an image that a part of another image covers, see `mix_boxes`.
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
                images = crop_and_flip(images, generator=self.generator)
            if self.cutmix:
                images = mix_boxes(images, self.cutmix, self.generator)
            yield images, labels


def mix_boxes(images: Tensor, largest: float, generator: Generator | None = None) -> Tensor:
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
