"""What a data set is: where its files come from, how they are read, and which images serve for what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from clusterguard.samples import Split
from torch import Generator

from benchmarks.data._fetching import Contents
from benchmarks.data._images import Images

Read: TypeAlias = Callable[[Path, Split], Images]
"""A function that reads images to train on, for thresholds, or to attack. It gets the folder of data sets."""
Download: TypeAlias = Callable[[Path], Contents]
"""A function that downloads a data set into a temporary folder and returns the contents of its files."""

_VALIDATION = 1000  # largest number of calibration images that recipes are chosen by
_DIVIDING_SEED = 20_201_207  # the day the paper appeared


@dataclass(frozen=True, kw_only=True)
class DataSetDefinition:
    """Everything that the benchmarks know about a data set before they open it.

    Attributes:
        title: name of the data set for people.
        image_shape: shape (C, H, W) of an image.
        training_images: number of images in the part "train".
        calibration_images: number of images in the part "calibration".
        read: function that reads one part from the folder of data sets.
        checksums: md5 checksums of the files by their paths in the folder of data sets. {} if nothing is downloaded.
        downloads: sources of the files by name. They are asked in this order until one of them has the files.
        paper_network: name of the network that the paper trains on this data set. "" if the paper does not use it.
        paper_training: sentence about how the paper trains that network. "" if the paper does not use the data set.
    """

    title: str
    image_shape: tuple[int, int, int]
    training_images: int
    calibration_images: int
    read: Read
    checksums: Mapping[str, str] = field(default_factory=dict)
    downloads: Mapping[str, Download] = field(default_factory=dict)
    paper_network: str = ""
    paper_training: str = ""


@dataclass(frozen=True)
class DataSet:
    """A loaded data set. Only evaluation opens the test set.

    Attributes:
        name: name in experiments.
        checksums: checksums of its files.
        train: images to train on.
        calibration: images that are kept out of training, for thresholds.
        open_test: function that loads the test set.
    """

    name: str
    checksums: dict[str, str]
    train: Images
    calibration: Images
    open_test: Callable[[], Images]

    def held_out(self) -> tuple[Images, Images]:
        """Divide the calibration images into two sets: one for thresholds, and one to choose among recipes.

        The test set stays closed.
        """
        kept = len(self.calibration.labels) - min(_VALIDATION, len(self.calibration.labels) // 2)
        return Images(*(part[:kept] for part in self.calibration)), Images(*(part[kept:] for part in self.calibration))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width


def hold_out_calibration(read: Callable[[Path, bool], Images], calibration_images: int) -> Read:
    """Make a reader of the three parts out of a reader of the training set and the test set.

    The calibration images are drawn from the training set. The seed is fixed, so that they are always the same images.

    Args:
        read: function of the folder of data sets and of whether to read the training set. It reads the test set
            otherwise.
        calibration_images: number of images that are kept out of training, for thresholds.
    """

    def read_part(folder: Path, part: Split) -> Images:
        if part == "test":
            return read(folder, False)
        pixels, labels = read(folder, True)
        order = torch.randperm(len(labels), generator=Generator().manual_seed(_DIVIDING_SEED))
        chosen = order[calibration_images:] if part == "train" else order[:calibration_images]
        return Images(pixels[chosen], labels[chosen])

    return read_part
