"""TRADES: a classifier learns to label benign images correctly, and to change its predictions little under attack."""

from dataclasses import replace

import torch
from clusterguard import PGD, Evidence
from clusterguard.attacks import Objective, Problem
from clusterguard.detectors import WithThresholds
from clusterguard.training import TrainingStep
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, kl_div

from benchmarks._support import evaluation_mode
from benchmarks.detectors._recipe import with_loss
from benchmarks.detectors._vanilla import VANILLA
from benchmarks.detectors._vanilla import vanilla_loss as benign_loss

BETA = 6.0  # 1/λ in the authors' results and in their CIFAR10 script, while their MNIST script has 1


def start_near_image(problem: Problem) -> Tensor:
    """The start of the authors: the image with a little noise. At the image itself, the divergence has no slope."""
    noise = torch.empty_like(problem.images).normal_(generator=problem.generator)
    return problem.project(problem.images + 0.001 * noise)


def away_from(benign: Tensor) -> Objective:
    """An objective that is minus the divergence of each prediction from benign log-probabilities (B, K)."""

    def objective(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        return -divergences(benign, evidence.class_scores.log_softmax(dim=1))

    return objective


def divergences(benign: Tensor, attacked: Tensor) -> Tensor:
    """KL(benign ‖ attacked) of each row (B,), from log-probabilities (B, K)."""
    return kl_div(attacked, benign, reduction="none", log_target=True).sum(dim=1)


def trades_loss(
    detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD | None, generator: Generator | None
) -> TrainingStep:
    """Cross-entropy on benign images plus β times the divergence that the attack causes."""
    if attack is None:
        return benign_loss(detector, images, labels, attack, generator)
    with torch.no_grad(), evaluation_mode(detector) as seen:  # the mode in which the attack sees the detector
        benign = seen.evidence(images).class_scores.log_softmax(dim=1)
    # The objective compares with the rows of the whole batch, so the attack must not split the batch or drop rows.
    attack = replace(attack, batch_size=None, stop_early=False, keep="last")
    attack = replace(attack, objective=away_from(benign), start=start_near_image)
    attacked = attack(detector, images, labels, generator=generator)
    logits, moved = detector.evidence(images).class_scores, detector.evidence(attacked).class_scores
    robust = divergences(logits.log_softmax(dim=1), moved.log_softmax(dim=1)).mean()
    return TrainingStep(
        cross_entropy(logits, labels) + BETA * robust,
        (logits.argmax(dim=1) == labels).sum(),
        (moved.argmax(dim=1) != labels).sum(),
    )


TRADES = with_loss(
    replace(
        VANILLA,
        title="TRADES",
        reference="Zhang et al., Theoretically principled trade-off between robustness and accuracy (2019)",
        training_name="trades",
        attacked=True,
    ),
    trades_loss,
)
