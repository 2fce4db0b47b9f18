"""What people hand over by mistake gets the sentence that helps."""

from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from clusterguard import FGSM, Calibrator, ClusterGuard, align, evaluate
from clusterguard._support import check_labels
from clusterguard.errors import ConfigurationError, InputError, UnsupportedBackboneError
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
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


def test_the_logits_of_images_that_were_normalised_twice_are_refused_but_for_steps_of_attacks(guard):
    twice = torch.full((1, 3, 2, 2), -0.9)
    for context in (nullcontext(), torch.inference_mode()):
        with context, pytest.raises(InputError, match="the detector does"):
            guard(twice)
    assert guard(twice.requires_grad_()).shape == (1, 2)


@pytest.mark.parametrize(
    ("labels", "advice"),
    [
        (torch.tensor([0.0, 1.0]), r"labels\.long\(\) makes integers"),
        (torch.eye(3)[:2], r"labels\.argmax\(dim=1\) makes class numbers of one-hot labels"),
        (torch.tensor([[0], [1]]), r"labels\.squeeze\(1\)"),
        ([0, 1], r"torch\.as_tensor\(labels\)"),
        (("cat", "dog"), r"names\.index\(label\)"),
        (torch.tensor([1, 3]), "from 0 to 2, got 1 to 3; classes are counted from 0, so subtract 1"),
    ],
)
def test_mistakes_in_labels_are_explained(labels, advice):
    with pytest.raises(InputError, match=advice):
        check_labels(labels, torch.rand(2, 1, 4, 4), 3)


def test_a_guard_in_a_guard_is_refused(guard):
    with pytest.raises(ConfigurationError, match="got a ClusterGuard, which is a detector already; use it as it is"):
        ClusterGuard(guard)


@pytest.mark.parametrize(("options", "kept"), [({"mean": [0.3] * 3}, "std stays"), ({"std": [0.3] * 3}, "mean stays")])
def test_half_a_normalisation_is_said(options, kept):
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.warns(UserWarning, match=f"{kept} that of the library"):
        ClusterGuard(model, **options)
    both = {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert ClusterGuard(model, **both).normalize.std.flatten().tolist() == [0.5] * 3
    assert ClusterGuard(nn.Flatten(), 3, mean=[0.5], example=torch.rand(1, 1, 2, 2)).normalize.mean.item() == 0.5


def test_a_data_set_in_place_of_a_loader_is_said(guard):
    data = TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4).long())
    for use in (Calibrator(0.1).fit, align, lambda guard, data: evaluate(guard, FGSM(eps=0.1), data)):
        with pytest.raises(ConfigurationError, match=r"wrap it in torch\.utils\.data\.DataLoader"):
            use(guard, data)
