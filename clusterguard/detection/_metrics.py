"""The paper's metrics and their uncertainty, as pure functions of decisions and suspicion."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from clusterguard._support import check_tensor, check_verdicts
from clusterguard.detection._decision import Detection
from clusterguard.errors import InputError
from torch import Tensor


@final
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


@final
@dataclass(frozen=True)
class Verdicts:
    """A detector's verdicts on n images, and the images' true labels.

    It is checked when it is made, so that metrics need not check it again. It unpacks into its two parts.

    Args:
        detection: verdicts on the images.
        labels: (n,) true labels.

    Raises:
        InputError: the verdicts or the labels have a wrong shape, dtype or device.

    Example:
        >>> detection = Detection(torch.tensor([0, 1]), torch.zeros(2), torch.tensor([False, True]))
        >>> str(accuracy(Verdicts(detection, torch.tensor([0, 0]))))
        '0.500 [0.095, 0.905] (1/2)'
    """

    detection: Detection
    labels: Tensor

    def __post_init__(self) -> None:
        check_verdicts(self.labels, self.detection)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.detection, self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Verdicts":
        """The verdicts on some of the images; rows are (k,) integers or (n,) bools."""
        return Verdicts(Detection(*(part[rows] for part in self.detection)), self.labels[rows])

    @property
    def is_correct(self) -> Tensor:
        """(n,) whether each image got its true label, refused or not."""
        return self.detection.labels == self.labels


def guessing_advice(right: int, total: int, num_classes: int) -> str:
    """A sentence about an accuracy that is no better than guessing; empty if it is better, or if it is uncertain.

    Args:
        right: number of images that are labelled correctly.
        total: number of all images.
        num_classes: number K of classes.

    Example:
        >>> guessing_advice(280, 300, num_classes=10)
        ''
        >>> guessing_advice(3, 300, num_classes=10)[:48]
        'only 3 of 300 images are labelled correctly, no '
    """
    guessed = 1 / num_classes
    if not total or wilson_interval(right, total)[1] > min(1.5 * guessed, guessed + 0.05):
        return ""
    return (
        f"only {right} of {total} images are labelled correctly, no more than by guessing: are their classes numbered "
        "as they were in training, and is the detector trained?"
    )


def accuracy(clean: Verdicts) -> Rate:
    """The share of images that are labelled correctly, whether they are refused or not.

    Args:
        clean: verdicts on clean images.
    """
    return _rate(clean.is_correct)


def accuracy_after_rejection(clean: Verdicts) -> Rate:
    """The share of accepted images that are labelled correctly.

    Args:
        clean: verdicts on clean images.
    """
    return _rate(clean.is_correct[~clean.detection.is_adversarial])


def false_positive_rate(clean: Verdicts) -> Rate:
    """The share of correctly labelled clean images that are refused. Calibration limits this rate.

    Args:
        clean: verdicts on clean images.
    """
    return _rate(clean.detection.is_adversarial[clean.is_correct])


def attack_success_rate(clean: Verdicts, attacked: Verdicts) -> Rate:
    """The attack success rate (ASR): the share of eligible images that the attack breaks.

    An image is eligible if it is accepted under its true label before the attack. It is broken if it is accepted under
    a wrong label after the attack. With thresholds for p % false positives, this is the paper's ASR-p.

    Args:
        clean: verdicts on n clean images.
        attacked: verdicts on the same images after the attack.

    Reference:
        arXiv 2012.03483, equation 8.

    Example:
        >>> def verdicts(labels, refused):
        ...     detection = Detection(torch.tensor(labels), torch.zeros(3), torch.tensor(refused))
        ...     return Verdicts(detection, torch.tensor([0, 1, 2]))
        >>> clean = verdicts([0, 1, 2], [False, False, True])
        >>> attack_success_rate(clean, verdicts([1, 0, 0], [False, True, False])).value
        0.5
    """
    return _rate(is_broken(attacked)[is_eligible(clean)])


def is_eligible(clean: Verdicts) -> Tensor:
    """(n,) True where a clean image is accepted under its true label, so that an attack can break it."""
    return clean.is_correct & ~clean.detection.is_adversarial


def is_broken(attacked: Verdicts) -> Tensor:
    """(n,) True where an attacked image is accepted under a wrong label."""
    return ~attacked.is_correct & ~attacked.detection.is_adversarial


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


def expected_roc_auc(benign: Verdicts, attacked: Verdicts, num_classes: int) -> float:
    """The EROC: the ROC AUC of each class, weighted by the number of attacked images that get its label.

    The benign images of a class are those of its images that are labelled correctly. An attacked image that is still
    labelled correctly counts as perfectly detected. A class without benign images to compare with is left out.

    Args:
        benign: verdicts on benign images, preferably those that the thresholds were calibrated on.
        attacked: verdicts on attacked images.
        num_classes: number K of classes.

    Returns:
        A number in [0, 1], where larger is better; NaN if there is nothing to compare.

    Reference:
        arXiv 2012.03483, section 5, "Evaluation metric".
    """
    distances, labels = benign.detection.distances, attacked.detection.labels
    suspicion = attacked.detection.distances.masked_fill(attacked.is_correct, torch.inf)
    total, weighted = 0, 0.0
    for index in range(num_classes):
        got_label = labels == index
        area = roc_auc(distances[benign.is_correct & (benign.detection.labels == index)], suspicion[got_label])
        if not math.isnan(area):
            total += int(got_label.sum())
            weighted += int(got_label.sum()) * area
    return weighted / total if total else math.nan


def _rate(outcomes: Tensor) -> Rate:
    return Rate(int(outcomes.sum()), outcomes.numel())
