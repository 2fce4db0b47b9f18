"""Real digits that ship with the package, for the demo, the tests and a first try without a network."""

from importlib import resources
from typing import Literal

import numpy as np
import torch
from clusterguard.errors import ConfigurationError
from torch.utils.data import TensorDataset

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")


def load_digits(split: Split) -> TensorDataset:
    """A stratified part of MNIST: 6,000 training, 1,500 calibration and 1,000 test images.

    Training and calibration images come from MNIST's training set, and test images from its test set. A README beside
    the data says which images these are and how they were drawn.

    Args:
        split: name of the part, "train", "calibration" or "test".

    Returns:
        Images (n, 1, 28, 28) float32 in [0, 1] and labels (n,) int64.

    Raises:
        ConfigurationError: there is no split of this name.

    Reference:
        LeCun, Cortes & Burges, "The MNIST database of handwritten digits".

    Example:
        >>> images, labels = load_digits("test").tensors
        >>> images.shape, labels.bincount().tolist()
        (torch.Size([1000, 1, 28, 28]), [98, 114, 103, 101, 98, 89, 96, 103, 97, 101])
    """
    if split not in SPLITS:
        raise ConfigurationError(f"expected a split among {', '.join(SPLITS)}, got {split!r}")
    with (
        resources.files("clusterguard").joinpath("data/digits.npz").open("rb") as file,
        np.load(file) as data,
    ):
        images, labels = data[f"{split}_images"], data[f"{split}_labels"]
    return TensorDataset(torch.from_numpy(images).unsqueeze(1).float() / 255, torch.from_numpy(labels).long())
