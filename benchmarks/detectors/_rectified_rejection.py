"""Rectified rejection: adversarial training with a second head that estimates how far to trust the confidence."""

from dataclasses import replace
from typing import cast

import torch
from clusterguard import PGD, DetectorModule, Evidence
from clusterguard.detectors import WithThresholds
from clusterguard.training import TrainingStep
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, logsigmoid

from benchmarks.detectors._features import at_least_float32
from benchmarks.detectors._madry import attack_with_cross_entropy
from benchmarks.detectors._recipe import with_loss
from benchmarks.detectors._vanilla import VANILLA


class RectifiedRejection(DetectorModule):
    """A classifier and a rectifier A in [0, 1] on the same features.

    The rectified confidence is the product of the confidence and A.

    Args:
        network: network with the attribute `num_features`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(num_classes=10)
        width = cast(int, network.num_features)
        hidden = max(1, width // 2)
        self.network = network
        self.head = nn.Linear(width, self.num_classes)
        self.rectifier = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def logits_and_trust(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the rectifier's logit (B, 1) of images (B, C, H, W) in [0, 1], in float32 at least."""
        features = self.network(images)
        return at_least_float32(self.head(features)), at_least_float32(self.rectifier(features))

    def evidence(self, images: Tensor) -> Evidence:
        """Logits as class scores, −log(p · A) as suspicion, of images (B, C, H, W) in [0, 1]."""
        logits, trust = self.logits_and_trust(images)
        return Evidence(logits, -logits.log_softmax(dim=1) - logsigmoid(trust))


def rectification_loss(logits: Tensor, trust: Tensor, labels: Tensor) -> Tensor:
    """The binary cross-entropy of the rectified confidence to the probability of the true class, a scalar.

    As in the authors' code, no gradient flows into the target or into the confidence of a correct prediction.
    """
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    confidence = torch.where(predicted == labels, confidence.detach(), confidence)
    true = probabilities.gather(1, labels[:, None]).squeeze(1).detach()
    return binary_cross_entropy(confidence * trust.sigmoid().squeeze(1), true)


def rectified_rejection_loss(
    detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD | None, generator: Generator | None
) -> TrainingStep:
    """Cross-entropy and rectification loss on attacked images, or on benign images in the warm-up."""
    model = detector.detector
    assert isinstance(model, RectifiedRejection)  # tells the type checker
    if attack is not None:
        images = attack_with_cross_entropy(detector, images, labels, attack, generator)
    logits, trust = model.logits_and_trust(images)
    wrong = (logits.argmax(dim=1) != labels).sum()
    total = cross_entropy(logits, labels) + rectification_loss(logits, trust, labels)
    return TrainingStep(total, len(labels) - wrong, None if attack is None else wrong)


RECTIFIED_REJECTION = with_loss(
    replace(
        VANILLA,
        title="RR",
        reference="Pang et al., Two coupled rejection metrics can tell adversarial examples apart (2022)",
        training_name="rectified-rejection",
        build=RectifiedRejection,
        attacked=True,
        objective="suspicion",
    ),
    rectified_rejection_loss,
)
