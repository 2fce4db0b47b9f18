"""The undefended classifier, which refuses images whose label has low confidence."""

from clusterguard import PGD, DetectorModule
from clusterguard.detectors import ConfidenceDetector, WithThresholds, find_normalization
from clusterguard.training import TrainingStep
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.detectors._recipe import LossTrainer, Recipe, add_classifier


def build_classifier(network: nn.Module) -> DetectorModule:
    """A linear classifier on the network's features, with thresholds on −log p(label)."""
    mean, std = find_normalization(network)  # as a guard of the same network finds them
    return ConfidenceDetector(add_classifier(network), num_classes=10, mean=mean, std=std)


def vanilla_loss(
    detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD | None, generator: Generator | None
) -> TrainingStep:
    """Cross-entropy on benign images."""
    logits = detector.evidence(images).class_scores
    return TrainingStep(cross_entropy(logits, labels), (logits.argmax(dim=1) == labels).sum())


VANILLA = Recipe(
    title="Vanilla",
    reference="arXiv 2012.03483, Table 1",
    training_name="vanilla",
    build=build_classifier,
    trainer=lambda detector, schedule: LossTrainer(detector, vanilla_loss, schedule),
    objective="logit",
    attacked=False,
)
