"""What detectors that are fitted to a trained classifier share: its features, its logits, and how to read them."""

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from clusterguard import DetectorModule
from clusterguard._support import evaluation_mode
from clusterguard.detection import Loader
from clusterguard.detectors import ConfidenceDetector
from clusterguard.errors import InputError
from torch import Tensor, nn

from benchmarks.detectors.recipe import Finish


class FeatureDetector(DetectorModule):
    """A classifier whose label stands, judged by another metric than its confidence; write `evidence`.

    Args:
        trained: a `ConfidenceDetector` around a network and a linear layer; its modules are shared, not copied.
    """

    def __init__(self, trained: DetectorModule) -> None:
        assert isinstance(trained, ConfidenceDetector)  # tells the type checker
        assert isinstance(trained.classifier, nn.Sequential)
        super().__init__(trained.num_classes)
        self.normalize = trained.normalize
        self.network, self.head = trained.classifier
        self.num_features = cast(int, self.head.in_features)
        self.training = trained.training

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, K) of images (B, C, H, W) in [0, 1], in float32 at least."""
        features = self.network(self.normalize(images))
        return widen(features), widen(self.head(features))

    def represent(self, images: Tensor) -> Tensor:
        """The features: images (B, C, H, W) in [0, 1] -> (B, D); attacks that match another image's use them."""
        return self.read(images)[0]

    def fit(self, batches: Loader) -> None:
        """Learn from training batches, in eval mode and without gradients; where there is nothing to fit, nothing."""

    def read_all(self, batches: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, D) and labels (B,), batch by batch, on the detector's device."""
        device = self.thresholds.device
        return ((self.represent(images.to(device)), labels.to(device)) for images, labels in batches)


def fitted(kind: type[FeatureDetector]) -> Finish:
    """A recipe's `finish`: put the classifier under this metric and fit it."""
    return partial(_fit, kind)


def _fit(kind: type[FeatureDetector], trained: DetectorModule, batches: Loader) -> FeatureDetector:
    detector = kind(trained).to(trained.thresholds.device)
    with torch.no_grad(), evaluation_mode(detector):
        detector.fit(batches)
    return detector


def check_classes(counts: Tensor, needed: int) -> None:
    """Every class has as many training images as a fit needs.

    Raises:
        InputError: otherwise.
    """
    if counts.min() < needed:
        raise InputError(f"expected at least {needed} training images of every class, got {counts.tolist()}")


def widen(values: Tensor) -> Tensor:
    """In float32 at least: distances and probabilities suffer in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
