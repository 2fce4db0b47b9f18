"""Attacks that follow gradients say so, and what to do, if a detector has none."""

import pytest
import torch
from clusterguard import PGD, WorstCaseSuite
from clusterguard.attacks import APGD, CarliniWagner, OrthogonalPGD, Square
from clusterguard.detection import Evidence
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError


class Frozen:
    """A detector of two pixels whose evidence is cut off from them, or never depended on them."""

    thresholds = torch.tensor([0.5, 0.5])

    def __init__(self, is_constant):
        self.constant = torch.zeros(1, 2, requires_grad=True) if is_constant else None

    def evidence(self, images):
        pixels = images.detach().flatten(1) if self.constant is None else self.constant.expand(len(images), 2)
        return Evidence(pixels, 1 - pixels)


@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.1, step_size=0.1),
        APGD(eps=0.1),
        OrthogonalPGD(eps=0.1, step_size=0.1),
        CarliniWagner(eps=1.0, steps=2),
        WorstCaseSuite("linf", eps=0.1, budget="quick"),
        PGD(eps=0.1, step_size=0.1, precision="bf16"),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_the_detector_without_gradients_is_named(attack, is_constant):
    images, labels = torch.rand(4, 1, 1, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])
    detector = WithThresholds(Frozen(is_constant), Frozen.thresholds)
    with pytest.raises(ConfigurationError, match=r"got a Frozen without.*Square"):
        attack(detector, images, labels)
    assert Square(eps=0.1, queries=5)(detector, images, labels).shape == images.shape
