"""The paper's metrics and their uncertainty: pure functions of decisions and suspicion."""

import math
from dataclasses import dataclass

import torch
from clusterguard._support import check_tensor, check_verdicts
from clusterguard.detection._decision import Detection
from clusterguard.errors import InputError
from torch import Tensor


@dataclass(frozen=True)
class Rate:
    """A share with what it was counted from.

    Attributes:
        count: how many did.
        total: of how many.

    Example:
        >>> str(Rate(1, 4))
        '0.250 [0.046, 0.699] (1/4)'
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """Count / total, NaN if there was nothing to count."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval."""
        return wilson_interval(self.count, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] ({self.count}/{self.total})"


def wilson_interval(count: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share; unlike the normal one it is sound near 0 and 1.

    Args:
        count: successes.
        total: trials; with 0 of them the interval is (0, 1).
        confidence: its coverage, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        InputError: a count that is not from 0 to the total, or a confidence outside (0, 1).

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
    """The share of images that are labelled correctly, refused or not.

    Args:
        detection: of n clean images.
        labels: (n,) true labels.
    """
    check_verdicts(labels, detection)
    return _rate(detection.labels == labels)


def accuracy_after_rejection(detection: Detection, labels: Tensor) -> Rate:
    """The share of accepted images that are labelled correctly.

    Args:
        detection: of n clean images.
        labels: (n,) true labels.
    """
    check_verdicts(labels, detection)
    accepted = ~detection.is_adversarial
    return _rate((detection.labels == labels)[accepted])


def false_positive_rate(detection: Detection, labels: Tensor) -> Rate:
    """The share of correctly labelled clean images that are refused: what the thresholds were calibrated for.

    Args:
        detection: of n clean images.
        labels: (n,) true labels.
    """
    check_verdicts(labels, detection)
    return _rate(detection.is_adversarial[detection.labels == labels])


def attack_success_rate(clean: Detection, adversarial: Detection, labels: Tensor) -> Rate:
    """The ASR: of the images labelled correctly and accepted before the attack, the share accepted wrongly after it.

    With thresholds at p % false positives this is the paper's ASR-p.

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
    """(n,) True where a clean image is accepted under its true label, of labels (n,): there is something to break."""
    check_verdicts(labels, clean)
    return (clean.labels == labels) & ~clean.is_adversarial


def is_broken(adversarial: Detection, labels: Tensor) -> Tensor:
    """(n,) True where an adversarial image is accepted under another label than its own, of labels (n,)."""
    check_verdicts(labels, adversarial)
    return (adversarial.labels != labels) & ~adversarial.is_adversarial


def roc_auc(benign: Tensor, adversarial: Tensor) -> float:
    """The chance that an adversarial example is more suspicious than a benign one, ties counted half.

    Args:
        benign: (n,) suspicion; what is not finite is refused at every threshold, so it counts as +inf.
        adversarial: (k,) suspicion, likewise.

    Returns:
        The area under the ROC curve, in [0, 1]; NaN if either is empty.

    Raises:
        InputError: tensors of a wrong shape, dtype or device.

    Example:
        >>> roc_auc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
        0.875
    """
    check_tensor(benign, "benign", "n")
    check_tensor(adversarial, "adversarial", "k", like=benign)
    if not len(benign) or not len(adversarial):
        return math.nan
    wide = torch.promote_types(benign.dtype, adversarial.dtype)
    benign, adversarial = (own.to(wide).masked_fill(~own.isfinite(), torch.inf) for own in (benign, adversarial))
    ordered = benign.sort().values
    below = torch.searchsorted(ordered, adversarial, side="left")
    not_above = torch.searchsorted(ordered, adversarial, side="right")
    return float((below + not_above).double().mean() / (2 * len(benign)))


def expected_roc_auc(
    benign: Detection, benign_labels: Tensor, adversarial: Detection, labels: Tensor, num_classes: int
) -> float:
    """EROC: the ROC AUC of each class's detection metric, weighted by how many attacked images got that label.

    Benign are the correctly labelled ones of the class. An attacked image that is still labelled correctly counts
    as perfectly detected. A class with attacked images but no benign ones to compare with is left out.

    Args:
        benign: verdicts on k benign images, best those that the thresholds were calibrated on.
        benign_labels: (k,) their true labels.
        adversarial: verdicts on n attacked images.
        labels: (n,) their true labels.
        num_classes: K.

    Returns:
        In [0, 1], larger is better; NaN if there is nothing to compare.

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
