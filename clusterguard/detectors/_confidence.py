"""The undefended classifier as a detector: refuse what it is not confident about."""

import warnings
from collections.abc import Sequence

import torch
from clusterguard.detection import Evidence
from clusterguard.detectors._backbones import choose_normalization, choose_num_classes
from clusterguard.detectors._base import DetectorModule, ImageShape, Normalize, run_network
from torch import Tensor, nn


class ConfidenceDetector(DetectorModule):
    """A classifier with a threshold on its confidence, the yardstick that a real defence must beat.

    Its suspicion is −log p(class | image): the probability itself rounds to 1 in float32 and would tie.

    Args:
        classifier: maps images to logits (B, K); it is shared, not copied.
        num_classes: K; None takes the classifier's own.
        mean: per channel, as in `ClusterGuard`.
        std: per channel, as in `ClusterGuard`.
        image_shape: as in `ClusterGuard`.

    The classifier keeps its mode, and the detector takes it over. It warns if the first logits that it sees look like
    probabilities.

    Raises:
        ConfigurationError: num_classes neither given nor found.

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
        """Logits: images (B, C, H, W) in [0, 1] -> (B, K)."""
        normalised = self.normalize(images)
        self.check_image_shape(images)
        return run_network(self.classifier, normalised)

    def evidence(self, images: Tensor) -> Evidence:
        """The logits as class scores, −log probabilities as suspicion, of images (B, C, H, W) in [0, 1]."""
        logits = self(images)
        if not self._looked:  # at the first batch only, for it waits for the device
            self._looked = True
            _warn_of_probabilities(logits.detach())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # probabilities saturate in half precision
        return Evidence(logits, -logits.log_softmax(dim=1))


def _warn_of_probabilities(logits: Tensor) -> None:
    in_range = bool(((logits >= 0) & (logits <= 1)).all())
    if in_range and torch.allclose(logits.sum(dim=1), torch.ones_like(logits[:, 0]), atol=1e-3):
        warnings.warn(
            "expected logits from the classifier, got what look like probabilities; take its softmax away, "
            "or attacks will hardly find gradients and look weaker than they are",
            stacklevel=3,
        )
