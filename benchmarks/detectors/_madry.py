"""Adversarial training: cross-entropy on attacked images instead of benign ones."""

from dataclasses import replace

from clusterguard import PGD
from clusterguard.detectors import WithThresholds
from clusterguard.training import TrainingStep
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from benchmarks.detectors._recipe import with_loss
from benchmarks.detectors._vanilla import VANILLA
from benchmarks.detectors._vanilla import vanilla_loss as benign_loss


def attack_with_cross_entropy(
    detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD, generator: Generator | None
) -> Tensor:
    """Attack images (B, C, H, W) with the objective cross-entropy, from a random start or that of N-FGSM."""
    start = attack.start if callable(attack.start) else "random"
    attack = replace(attack, objective="cross_entropy", start=start, keep="last")
    return attack(detector, images, labels, generator=generator)


def madry_loss(
    detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD | None, generator: Generator | None
) -> TrainingStep:
    """Cross-entropy on attacked images, or on benign images in the warm-up."""
    if attack is None:
        return benign_loss(detector, images, labels, attack, generator)
    logits = detector.evidence(attack_with_cross_entropy(detector, images, labels, attack, generator)).class_scores
    wrong = (logits.argmax(dim=1) != labels).sum()
    return TrainingStep(cross_entropy(logits, labels), len(labels) - wrong, wrong)


MADRY = with_loss(
    replace(
        VANILLA,
        title="Madry",
        reference="Madry et al., Towards deep learning models resistant to adversarial attacks (2018)",
        training_name="madry",
        attacked=True,
    ),
    madry_loss,
)
