"""The base class of detectors that are fitted to a trained classifier, and helpers for its features."""

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from clusterguard import DetectorModule
from clusterguard.detection import Loader
from clusterguard.detectors import ConfidenceDetector
from clusterguard.errors import InputError
from torch import Tensor, nn

from benchmarks.detectors._recipe import Finish


class FeatureDetector(DetectorModule):
    """A classifier whose suspicion is computed from its features. Subclasses define `evidence`.

    Args:
        trained: `ConfidenceDetector` around a network and a linear layer. Its modules are shared, not copied.
    """

    def __init__(self, trained: DetectorModule) -> None:
        assert isinstance(trained, ConfidenceDetector)  # tells the type checker
        assert isinstance(trained.classifier, nn.Sequential)
        super().__init__(trained.num_classes)
        self.normalize = trained.normalize
        self.network, self.head = trained.classifier
        self.num_features = cast(int, self.head.in_features)
        self.training = trained.training

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, K) of images (B, C, H, W) in [0, 1], in float32 at least."""
        features = self.network(self.normalize(images))
        return at_least_float32(features), at_least_float32(self.head(features))

    def represent(self, images: Tensor) -> Tensor:
        """The features (B, D) of images (B, C, H, W) in [0, 1].

        Attacks that imitate the representation of another image call this function.
        """
        return self.features_and_logits(images)[0]

    def fit(self, batches: Loader) -> None:
        """Fit what the suspicion needs to training batches. The base class fits nothing.

        The function is called in eval mode and without gradients.
        """

    def all_features(self, batches: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, D) and labels (B,), batch by batch, on the detector's device."""
        device = self.thresholds.device
        return ((self.represent(images.to(device)), labels.to(device)) for images, labels in batches)


def fit_after_training(kind: type[FeatureDetector]) -> Finish:
    """Make the function `finish` of a recipe.

    The function takes a trained classifier, makes a detector of this kind from it, and fits the detector.

    Args:
        kind: class of the detector.
    """
    return partial(_fit, kind)


def _fit(kind: type[FeatureDetector], trained: DetectorModule, batches: Loader) -> FeatureDetector:
    detector = kind(trained).to(trained.thresholds.device).eval()
    with torch.no_grad():
        detector.fit(batches)
    return detector


def check_class_sizes(counts: Tensor, needed: int) -> None:
    """Check that every class has as many training images as a fit needs.

    Args:
        counts: numbers (K,) of training images of each class.
        needed: smallest number that suffices.

    Raises:
        InputError: a class has fewer.
    """
    if counts.min() < needed:
        raise InputError(f"expected at least {needed} training images of every class, got {counts.tolist()}")


def at_least_float32(values: Tensor) -> Tensor:
    """Convert values to float32 at least, since distances and probabilities lose accuracy in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
