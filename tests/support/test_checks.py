"""What people hand over by mistake gets the sentence that helps."""

import numpy as np
import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.errors import ConfigurationError, InputError, UnsupportedBackboneError
from PIL import Image
from torch import nn
from torchvision.models import resnet18


@pytest.fixture
def guard():
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 2, image_shape=(3, 2, 2))
    guard.thresholds = torch.ones(2)
    return guard


@pytest.mark.parametrize(
    ("images", "advice"),
    [
        (np.zeros((1, 3, 2, 2), np.float32), "torch.from_numpy converts an array"),
        (Image.new("RGB", (2, 2)), r"to_tensor\(image\)\[None\]"),
        ([torch.zeros(3, 2, 2)], "torch.stack makes a batch"),
        ((torch.zeros(1, 3, 2, 2), torch.zeros(1)), r"such as batch\[0\]"),
        ({"pixel_values": torch.zeros(1, 3, 2, 2)}, r'such as batch\["pixel_values"\]'),
        ("photo.jpg", "got str; pass the images alone"),
        (torch.zeros(3, 2, 2), r"images\[None\]"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "divide 8-bit images by 255"),
        (torch.full((1, 3, 2, 2), 255.0), "divide 8-bit images by 255"),
        (torch.full((1, 3, 2, 2), -1.5), "do not normalise them yourself"),
    ],
)
def test_mistakes_in_images_are_explained(guard, images, advice):
    with pytest.raises(InputError, match=advice):
        guard.detect(images)
    with torch.no_grad(), pytest.raises(InputError, match=advice):
        guard(images)


def test_channels_that_come_last_and_float64_are_explained():
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(24, 2)), 2, mean=[0.5] * 3, std=0.5)
    guard.thresholds = torch.ones(2)
    with pytest.raises(InputError, match=r"images.permute\(0, 3, 1, 2\)"):
        guard.detect(torch.rand(1, 2, 4, 3))
    guard.learn_image_shape(torch.rand(1, 3, 2, 4))
    with pytest.raises(InputError, match=r"images.permute\(0, 3, 1, 2\)"):
        guard.detect(torch.rand(1, 2, 4, 3))
    with pytest.raises(InputError, match=r"images.float\(\)"):
        guard.detect(torch.rand(1, 3, 2, 4, dtype=torch.float64))


def test_a_normalisation_of_8_bit_values_and_a_function_are_refused():
    with pytest.raises(ConfigurationError, match="divide both by 255"):
        ClusterGuard(nn.Flatten(), 2, mean=[123.7], std=[58.4], example=torch.rand(1, 1, 2, 2))
    with pytest.raises(UnsupportedBackboneError, match=r"got function; call it if it makes a model"):
        ClusterGuard(resnet18)


def test_the_logits_of_images_that_were_normalised_twice_are_refused_without_gradients_only(guard):
    with torch.inference_mode(), pytest.raises(InputError, match="the detector does"):
        guard(torch.full((1, 3, 2, 2), 2.1) - 3)
    assert guard(torch.full((1, 3, 2, 2), -0.9)).shape == (1, 2)  # in a step of an attack, say
