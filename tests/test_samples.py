from importlib import resources

import numpy as np
import pytest
import torch
from clusterguard.errors import ConfigurationError
from clusterguard.samples import SPLITS, load_digits


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("calibration", 1500), ("test", 1000)])
def test_splits_hold_what_they_say(split, count):
    images, labels = load_digits(split).tensors
    assert images.shape == (count, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert labels.dtype == torch.int64
    shares = labels.bincount(minlength=10) / count
    assert shares.min() > 0.08  # MNIST's rarest digit, 5, makes up 9 %
    assert shares.max() < 0.13


def test_training_and_calibration_are_different_images_of_the_training_set():
    with (
        resources.files("clusterguard").joinpath("data/digits.npz").open("rb") as file,
        np.load(file) as data,
    ):
        indices = {split: data[f"{split}_indices"] for split in SPLITS}
    assert len(np.union1d(indices["train"], indices["calibration"])) == 7500
    assert len(np.unique(indices["test"])) == 1000
    assert indices["test"].max() < 10_000


def test_every_class_can_be_calibrated_at_one_percent():
    assert load_digits("calibration").tensors[1].bincount().min() >= 120


def test_the_file_is_small():
    assert resources.files("clusterguard").joinpath("data/digits.npz").stat().st_size < 2e6


def test_an_unknown_split_is_named():
    with pytest.raises(ConfigurationError, match="train, calibration, test"):
        load_digits("validation")
