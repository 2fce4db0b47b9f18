"""The paper's metrics and their uncertainty, as pure functions of decisions and suspicion."""

import math
from dataclasses import dataclass

import torch
from clusterguard._support import check_tensor, check_verdicts
from clusterguard.detection._decision import Detection
from clusterguard.errors import InputError
from torch import Tensor


@dataclass(frozen=True)
class Rate:
    """A share, with the counts that it was computed from.

    Attributes:
        count: number of cases that are counted, at most `total`.
        total: number of all cases.

    Example:
        >>> str(Rate(1, 4))
        '0.250 [0.046, 0.699] (1/4)'
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share ``count / total``; NaN if the total is 0."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval."""
        return wilson_interval(self.count, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] ({self.count}/{self.total})"


def wilson_interval(count: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share. Unlike the normal interval, it is sound near 0 and 1.

    Args:
        count: number of successes, from 0 to `total`.
        total: number of trials; without any, the interval is (0, 1).
        confidence: coverage of the interval, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        InputError: the count is not from 0 to the total, or the confidence is outside (0, 1).

    Reference:
        Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Example:
        >>> low, high = wilson_interval(0, 1000)
        >>> round(low, 4), round(high, 4)
        (0.0, 0.0038)
    """
    if not (0 <= count <= total and 0 < confidence < 1):
        raise InputError(
            f"expected a count from 0 to the total and a confidence in (0, 1), got {count}, {total} and {confidence}"
        )
    if not total:
        return 0.0, 1.0
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(confidence, dtype=torch.float64)))
    share = count / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, center - half) if count else 0.0, min(1.0, center + half) if count < total else 1.0


def accuracy(detection: Detection, labels: Tensor) -> Rate:
    """The share of images that are labelled correctly, whether they are refused or not.

    Args:
        detection: verdicts on n clean images.
        labels: (n,) true labels.
    """
    check_verdicts(labels, detection)
    return _rate(detection.labels == labels)


def accuracy_after_rejection(detection: Detection, labels: Tensor) -> Rate:
    """The share of accepted images that are labelled correctly.

    Args:
        detection: verdicts on n clean images.
        labels: (n,) true labels.
    """
    check_verdicts(labels, detection)
    accepted = ~detection.is_adversarial
    return _rate((detection.labels == labels)[accepted])


def false_positive_rate(detection: Detection, labels: Tensor) -> Rate:
    """The share of correctly labelled clean images that are refused. Calibration limits this rate.

    Args:
        detection: verdicts on n clean images.
        labels: (n,) true labels.
    """
    check_verdicts(labels, detection)
    return _rate(detection.is_adversarial[detection.labels == labels])


def attack_success_rate(clean: Detection, adversarial: Detection, labels: Tensor) -> Rate:
    """The attack success rate (ASR): the share of eligible images that the attack breaks.

    An image is eligible if it is accepted under its true label before the attack. It is broken if it is accepted under
    a wrong label after the attack. With thresholds for p % false positives, this is the paper's ASR-p.

    Args:
        clean: verdicts on n clean images.
        adversarial: verdicts on the n attacked images.
        labels: (n,) true labels.

    Reference:
        arXiv 2012.03483, equation 8.

    Example:
        >>> def verdict(labels, refused):
        ...     return Detection(torch.tensor(labels), torch.zeros(3), torch.tensor(refused))
        >>> clean = verdict([0, 1, 2], [False, False, True])
        >>> attacked = verdict([1, 0, 0], [False, True, False])
        >>> attack_success_rate(clean, attacked, labels=torch.tensor([0, 1, 2])).value
        0.5
    """
    return _rate(is_broken(adversarial, labels)[is_eligible(clean, labels)])


def is_eligible(clean: Detection, labels: Tensor) -> Tensor:
    """(n,) True where a clean image is accepted under its true label, so that an attack on it counts; labels (n,)."""
    check_verdicts(labels, clean)
    return (clean.labels == labels) & ~clean.is_adversarial


def is_broken(adversarial: Detection, labels: Tensor) -> Tensor:
    """(n,) True where an adversarial image is accepted under a label other than its true one; labels (n,)."""
    check_verdicts(labels, adversarial)
    return (adversarial.labels != labels) & ~adversarial.is_adversarial


def roc_auc(benign: Tensor, adversarial: Tensor) -> float:
    """The probability that an adversarial example is more suspicious than a benign one. A tie counts as one half.

    Args:
        benign: (n,) suspicion of benign examples. A value that is not finite counts as +inf, because such an example is
            refused at every threshold.
        adversarial: (k,) suspicion of adversarial examples, treated in the same way.

    Returns:
        The area under the ROC curve, in [0, 1]; NaN if either tensor is empty.

    Raises:
        InputError: tensors have a wrong shape, dtype or device.

    Example:
        >>> roc_auc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
        0.875
    """
    check_tensor(benign, "benign", "n")
    check_tensor(adversarial, "adversarial", "k", like=benign)
    if not len(benign) or not len(adversarial):
        return math.nan
    wide = torch.promote_types(benign.dtype, adversarial.dtype)
    benign, adversarial = (side.to(wide).masked_fill(~side.isfinite(), torch.inf) for side in (benign, adversarial))
    ordered = benign.sort().values
    below = torch.searchsorted(ordered, adversarial, side="left")
    not_above = torch.searchsorted(ordered, adversarial, side="right")
    return float((below + not_above).double().mean() / (2 * len(benign)))


def expected_roc_auc(
    benign: Detection, benign_labels: Tensor, adversarial: Detection, labels: Tensor, num_classes: int
) -> float:
    """The EROC: the ROC AUC of each class, weighted by the number of attacked images that get its label.

    The benign images of a class are those of its images that are labelled correctly. An attacked image that is still
    labelled correctly counts as perfectly detected. A class without benign images to compare with is left out.

    Args:
        benign: verdicts on k benign images, preferably those that the thresholds were calibrated on.
        benign_labels: (k,) their true labels.
        adversarial: verdicts on n attacked images.
        labels: (n,) their true labels.
        num_classes: number K of classes.

    Returns:
        A number in [0, 1], where larger is better; NaN if there is nothing to compare.

    Reference:
        arXiv 2012.03483, section 5, "Evaluation metric".
    """
    check_verdicts(benign_labels, benign)
    check_verdicts(labels, adversarial)
    correct = benign.labels == benign_labels
    suspicion = adversarial.distances.masked_fill(adversarial.labels == labels, torch.inf)
    total, weighted = 0, 0.0
    for index in range(num_classes):
        attacked = adversarial.labels == index
        area = roc_auc(benign.distances[correct & (benign.labels == index)], suspicion[attacked])
        if not math.isnan(area):
            total += int(attacked.sum())
            weighted += int(attacked.sum()) * area
    return weighted / total if total else math.nan


def _rate(outcomes: Tensor) -> Rate:
    return Rate(int(outcomes.sum()), outcomes.numel())
