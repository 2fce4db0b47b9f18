"""The only place for the decision: what a detector reports, when it accepts, and how far an attack is from success.

The guard, the baselines, relabelling in training, attacks and metrics all call these functions.
"""

from typing import NamedTuple, Protocol

import torch
from clusterguard._support import check_range, check_tensor, is_traced
from clusterguard.errors import InputError
from torch import Tensor


class Evidence(NamedTuple):
    """What a detector computes for a batch, before any threshold.

    Attributes:
        class_scores: (B, K) scores. A larger score means that the image is more like class k, and the class with the
            largest score is the label.
        suspicion: (B, K) suspicion of each label. A larger value means that the image is more likely to be adversarial
            if its label is k. For a `ClusterGuard` it is the head's distance to class k, which is the Euclidean
            distance to the centre of the class for the paper's head.
    """

    class_scores: Tensor
    suspicion: Tensor


class Detection(NamedTuple):
    """The verdict on a batch.

    Attributes:
        labels: (B,) int64 classes with the largest score.
        distances: (B,) suspicion of these labels; for a `ClusterGuard` the head's distance to the class.
        is_adversarial: (B,) bool, True for an image that is refused.
    """

    labels: Tensor
    distances: Tensor
    is_adversarial: Tensor


class Detector(Protocol):
    """Everything that attacks, metrics and evaluation need of a detector.

    Attributes:
        thresholds: (K,) largest suspicion that is accepted, per label. NaN means that the label is not calibrated, and
            accepts nothing; +inf accepts every finite suspicion.

    Example:
        >>> class Brighter:  # labels the brighter of two pixels, and suspects images whose pixels are nearly equal
        ...     thresholds = torch.tensor([-0.1, -0.1])
        ...
        ...     def evidence(self, images):
        ...         pixels = images.flatten(1)
        ...         return Evidence(pixels, -(pixels[:, :1] - pixels[:, 1:]).abs().expand_as(pixels))
        >>> decide(Brighter().evidence(torch.tensor([[[[0.2, 0.9]]]])), Brighter.thresholds).labels
        tensor([1])
    """

    thresholds: Tensor

    def evidence(self, images: Tensor) -> Evidence:
        """The class scores and suspicion of images (B, C, H, W) in [0, 1]; differentiable in the images."""
        ...


def decide(evidence: Evidence, thresholds: Tensor) -> Detection:
    """Label each image and say whether it is refused.

    The label is the class with the largest score, or the first such class on a tie. The image is accepted if and only
    if the suspicion of the label is at most the threshold of the label, and all of the image's evidence is finite. So
    the guard refuses whatever it cannot judge.

    Args:
        evidence: evidence on B images for K classes.
        thresholds: (K,) thresholds, one per label.

    Returns:
        Labels, their suspicion, and whether the image is refused, each (B,).

    Raises:
        InputError: tensors have a wrong shape, dtype or device.

    Reference:
        arXiv 2012.03483, equation 16 and section 3.2.

    Example:
        >>> evidence = Evidence(torch.tensor([[-1.0, -9.0], [-4.0, -3.0]]), torch.tensor([[1.0, 9.0], [4.0, 3.0]]))
        >>> decide(evidence, thresholds=torch.tensor([2.0, 2.0])).is_adversarial
        tensor([False,  True])
    """
    _check_evidence(evidence, thresholds)
    labels = evidence.class_scores.argmax(dim=1)
    suspicion = evidence.suspicion.gather(1, labels[:, None]).squeeze(1)
    accepted = (suspicion <= thresholds[labels]) & is_finite(evidence)
    return Detection(labels, suspicion, ~accepted)


def class_margins(evidence: Evidence, thresholds: Tensor) -> Tensor:
    """How far each image is from being accepted as each class.

    The margin of class j is ``m_j = max(suspicion_j - threshold_j, max_{i != j}(score_i - score_j))``, or +inf if the
    evidence is not finite or the threshold is NaN. It is at most 0 if and only if `decide` accepts the image as class
    j. If scores tie, a class that `decide` does not choose gets the smallest positive number instead of 0, so margins
    and decisions agree exactly.

    Args:
        evidence: evidence on B images for K >= 2 classes.
        thresholds: (K,) thresholds, one per label.

    Returns:
        Margins (B, K) in the units of the evidence; they are differentiable.

    Raises:
        InputError: tensors have a wrong shape, dtype or device, or there is a single class.

    Example:
        >>> evidence = Evidence(torch.tensor([[-1.0, -9.0]]), torch.tensor([[1.0, 9.0]]))
        >>> class_margins(evidence, thresholds=torch.tensor([2.0, 2.0]))
        tensor([[-1.,  8.]])
    """
    _check_evidence(evidence, thresholds, classes=2)
    scores, suspicion = evidence
    top = scores.amax(dim=1, keepdim=True)
    label = scores.argmax(dim=1, keepdim=True)
    is_label = torch.zeros_like(scores, dtype=torch.bool).scatter(1, label, True)
    runner_up = scores.masked_fill(is_label, -torch.inf).amax(dim=1, keepdim=True)
    behind = torch.where(is_label, runner_up - top, top - scores + torch.finfo(scores.dtype).tiny)
    margins = torch.maximum(suspicion - thresholds, behind)
    refused = ~is_finite(evidence)[:, None] | thresholds.isnan()
    return margins.masked_fill(refused, torch.inf)


def success_margin(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """How far an attack on each image is from success.

    The value is at most 0 if and only if the image is accepted under the target, or under any wrong label if there is
    no target.

    Args:
        evidence: evidence on B images for K >= 2 classes.
        thresholds: (K,) thresholds, one per label.
        labels: (B,) true labels.
        targets: (B,) wrong labels that the attack aims at; None means that any wrong label is a success.

    Returns:
        The margin of the target, or the smallest margin of a wrong class, (B,).

    Raises:
        InputError: tensors have a wrong shape, dtype or device, or labels are out of range.

    Example:
        >>> evidence = Evidence(torch.tensor([[-1.0, -9.0]]), torch.tensor([[1.0, 9.0]]))
        >>> thresholds = torch.tensor([2.0, 2.0])
        >>> success_margin(evidence, thresholds, labels=torch.tensor([1]))  # accepted as class 0: a success
        tensor([-1.])
    """
    check_goal(evidence, thresholds, labels, targets)
    margins = class_margins(evidence, thresholds)
    if targets is not None:
        return margins.gather(1, targets[:, None].long()).squeeze(1)
    return margins.scatter(1, labels[:, None].long(), torch.inf).amin(dim=1)


def check_goal(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    """Check the inputs of an objective: evidence on B images for K >= 2 classes, and the tensors that go with it.

    Args:
        evidence: evidence with class scores and suspicion (B, K).
        thresholds: (K,) thresholds, one per label.
        labels: (B,) true labels.
        targets: (B,) wrong labels that an attack aims at, or None.

    Raises:
        InputError: if the check fails.
    """
    _check_evidence(evidence, thresholds, classes=2)
    scores = evidence.class_scores
    for name, values in {"labels": labels, "targets": labels if targets is None else targets}.items():
        check_tensor(values, name, len(scores), kind="integer", like=scores)
        # Values are read on the CPU only, because reading them from another device would have to wait for it.
        if values.device.type == "cpu" and not is_traced():
            check_range(values, scores.shape[1], name=name)


def _check_evidence(evidence: Evidence, thresholds: Tensor, *, classes: int = 1) -> None:
    scores, suspicion = evidence
    check_tensor(scores, "class_scores", "B", "K")
    check_tensor(suspicion, "suspicion", *scores.shape, like=scores)
    check_tensor(thresholds, "thresholds", scores.shape[1], like=scores)
    if scores.shape[1] < classes:
        raise InputError(f"expected evidence for at least {classes} classes, got {scores.shape[1]}")


def is_finite(evidence: Evidence) -> Tensor:
    """(B,) True where every score and suspicion of the row is finite."""
    return (evidence.class_scores.isfinite() & evidence.suspicion.isfinite()).all(dim=1)
