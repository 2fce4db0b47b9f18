"""Objectives of attacks, which give one loss for each image; attacks take them by name or as functions."""

from typing import Protocol

from clusterguard._support import look_up
from clusterguard.detection import Evidence, success_margin
from clusterguard.detection._internal import check_goal
from torch import Tensor
from torch.nn import functional


class Objective(Protocol):
    """A loss that an attack minimises; any callable with this signature is one, such as the functions below."""

    def __call__(self, evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None, /) -> Tensor:
        """The loss of each image, not summed over the batch.

        Args:
            evidence: evidence on B images with K classes.
            thresholds: (K,) thresholds of the detector.
            labels: (B,) true labels.
            targets: (B,) wrong labels to aim at; None aims at any wrong label.

        Returns:
            Losses (B,), smaller ones closer to success.
        """
        ...


def suspicion(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """The suspicion of the target or, without targets, the smallest suspicion of any wrong class.

    For a guard it is the distance to the nearest wrong class. The nearest class is chosen again at every call, as in
    the paper's adaptive attack.

    Reference:
        arXiv 2012.03483, equations 17 to 19.
    """
    check_goal(evidence, thresholds, labels, targets)
    if targets is None:
        return evidence.suspicion.scatter(1, labels[:, None].long(), float("inf")).amin(dim=1)
    return evidence.suspicion.gather(1, targets[:, None].long()).squeeze(1)


def margin(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """The success margin itself, which is at most 0 if and only if the attack succeeds."""
    return success_margin(evidence, thresholds, labels, targets)


def logit(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """The largest score of another class minus that of the target.

    Without targets, it is the score of the true class minus the largest score of a wrong class. Thresholds are not
    used.

    Reference:
        Carlini & Wagner, "Towards evaluating the robustness of neural networks" (2017).
    """
    check_goal(evidence, thresholds, labels, targets)
    scores = evidence.class_scores
    if targets is None:
        label_scores = scores.gather(1, labels[:, None].long()).squeeze(1)
        return label_scores - scores.scatter(1, labels[:, None].long(), -float("inf")).amax(dim=1)
    aimed = scores.gather(1, targets[:, None].long()).squeeze(1)
    return scores.scatter(1, targets[:, None].long(), -float("inf")).amax(dim=1) - aimed


def cross_entropy(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """The cross-entropy of the class scores to the target or, without targets, minus that to the true label.

    Thresholds are not used.
    """
    check_goal(evidence, thresholds, labels, targets)
    if targets is None:
        return -functional.cross_entropy(evidence.class_scores, labels.long(), reduction="none")
    return functional.cross_entropy(evidence.class_scores, targets.long(), reduction="none")


def adaptive(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """The loss of equation 7, a classification loss (`logit`) plus the suspicion of the class that is aimed at.

    Without targets, the attack aims at the wrong class with the largest score.

    Reference:
        arXiv 2012.03483, equation 7 and Table 1.
    """
    check_goal(evidence, thresholds, labels, targets)
    if targets is None:
        aimed = evidence.class_scores.scatter(1, labels[:, None].long(), -float("inf")).argmax(dim=1)
    else:
        aimed = targets.long()
    metric = evidence.suspicion.gather(1, aimed[:, None]).squeeze(1)
    return logit(evidence, thresholds, labels, targets) + metric


OBJECTIVES: dict[str, Objective] = {
    "suspicion": suspicion,
    "margin": margin,
    "logit": logit,
    "cross_entropy": cross_entropy,
    "adaptive": adaptive,
}


def get_objective(objective: str | Objective) -> Objective:
    """The objective with this name, or the callable itself.

    Raises:
        ConfigurationError: the name is unknown.
    """
    return look_up(objective, OBJECTIVES, "an objective") if isinstance(objective, str) else objective
