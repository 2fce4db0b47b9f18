"""The undefended classifier as a detector, which refuses images that it is not confident about."""

import warnings
from collections.abc import Sequence

import torch
from clusterguard.detection import Evidence
from clusterguard.detectors._backbones import choose_normalization, choose_num_classes
from clusterguard.detectors._base import DetectorModule, ImageShape, Normalize
from clusterguard.detectors._networks import run_network
from torch import Tensor, nn


class ConfidenceDetector(DetectorModule):
    """A classifier with a threshold on its confidence. It is the baseline that a real defence must beat.

    Its suspicion is −log p(class | image). The probability itself would round to 1 in float32, so that many images
    would tie. The detector takes over the mode of the classifier, which does not change. It warns if the first logits
    look like probabilities.

    Args:
        classifier: module that maps images to logits (B, K); it is shared, not copied.
        num_classes: number K of classes; None takes the number that the classifier has.
        mean: mean of the pixels per channel, as in `ClusterGuard`.
        std: standard deviation of the pixels per channel, as in `ClusterGuard`.
        image_shape: shape of the images, as in `ClusterGuard`.

    Raises:
        ConfigurationError: num_classes is None, and the classifier does not tell it either.

    Warns:
        UserWarning: num_classes differs from the number that the classifier has, or its normalisation is not found.

    Reference:
        arXiv 2012.03483, Table 1, "Vanilla".

    Example:
        >>> detector = ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), num_classes=10)
        >>> detector.evidence(torch.rand(4, 1, 28, 28)).suspicion.shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        classifier: nn.Module,
        num_classes: int | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_shape: ImageShape | None = None,
    ) -> None:
        unfit = "its logits will not fit the thresholds"
        super().__init__(choose_num_classes(classifier, num_classes, consequence=unfit), image_shape=image_shape)
        self.normalize = Normalize(*choose_normalization(classifier, mean, std, keep=True))
        self.classifier = classifier
        self._looked = False
        self.training = classifier.training

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the classifier: images (B, C, H, W) in [0, 1] -> (B, K)."""
        normalised = self.normalize(images)
        self.check_image_shape(images)
        return run_network(self.classifier, normalised)

    def evidence(self, images: Tensor) -> Evidence:
        """The logits as class scores and −log probabilities as suspicion, for images (B, C, H, W) in [0, 1]."""
        logits = self(images)
        if not self._looked:  # at the first batch only, because it has to wait for the device
            self._looked = True
            _warn_of_probabilities(logits.detach())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # probabilities saturate in half precision
        return Evidence(logits, -logits.log_softmax(dim=1))


def _warn_of_probabilities(logits: Tensor) -> None:
    in_range = bool(((logits >= 0) & (logits <= 1)).all())
    if in_range and torch.allclose(logits.sum(dim=1), torch.ones_like(logits[:, 0]), atol=1e-3):
        warnings.warn(
            "expected logits from the classifier, got what look like probabilities; remove its softmax, "
            "or attacks will hardly find gradients and look weaker than they are",
            stacklevel=3,
        )
