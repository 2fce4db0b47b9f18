"""Verdicts on attacked images by `clusterguard.evaluate`, image by image and at several false-positive rates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from clusterguard import Detector, DetectorModule, Evaluation, decide, evaluate
from clusterguard.attacks import find_representation, has_representation
from clusterguard.detection import Loader, Verdicts, fit_thresholds, is_broken, is_eligible, judge
from clusterguard.detectors import WithThresholds
from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """An attack that returns stored images, so that `evaluate` judges them like those of any attack.

    Attributes:
        images: attacked images (n, C, H, W).
        norm: norm of their budget.
        eps: radius of their budget.
    """

    images: Tensor
    norm: str
    eps: float

    def __call__(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """The stored images, whatever the arguments are."""
        return self.images


def thresholds_at(detector: DetectorModule, calibration: Loader, rates: Sequence[float]) -> dict[float, Tensor]:
    """Fit conformal thresholds (K,) for each false-positive rate, in one pass over the benign images."""
    detection, labels = judge(detector, calibration)
    fitted = {}
    for rate in rates:
        fit = fit_thresholds(
            detection.distances,
            detection.labels,
            labels,
            detector.num_classes,
            false_positive_rate=rate,
            scarce="pool",
        )
        fitted[rate] = detector.thresholds.new_tensor(fit.thresholds)
    return fitted


def judge_attacked(
    detector: DetectorModule,
    thresholds: dict[float, Tensor],
    attacked: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    norm: str,
    eps: float,
    calibration: Loader,
) -> tuple[Evaluation, dict[str, Any]]:
    """Judge attacked images at each false-positive rate.

    Args:
        detector: detector under attack.
        thresholds: thresholds (K,) by false-positive rate.
        attacked: attacked images (n, C, H, W) by setting.
        images: clean images (n, C, H, W).
        labels: true classes (n,).
        norm: norm of the budget.
        eps: radius of the budget.
        calibration: benign images that the areas under the ROC curve compare with.

    Returns:
        The evaluation at the first rate, and the verdicts by setting. A verdict holds the area, and for each rate the
        counts and the eligible and broken images as hexadecimal bits.
    """
    # An attack without settings has the setting "", which `evaluate` would refuse as the name of an attack.
    attacks = {f"setting {name}": StoredImages(images=kept, norm=norm, eps=eps) for name, kept in attacked.items()}
    first: Evaluation | None = None
    verdicts: dict[str, Any] = {name: {"rates": {}} for name in attacked}
    for rate, at_rate in thresholds.items():
        report = evaluate(
            WithThresholds(detector, at_rate),
            attacks,
            [(images, labels)],
            calibration_loader=calibration if first is None else None,  # areas do not depend on thresholds
            sanity_images=0,
        )
        eligible = is_eligible(Verdicts(report.clean, report.labels))
        for setting, result in zip(attacked, report.results, strict=True):
            area = result.expected_roc_auc
            if first is None:
                verdicts[setting]["eroc"] = area if math.isfinite(area) else None
            verdicts[setting]["rates"][f"{rate:g}"] = {
                "success": [result.success.count, result.success.total],
                "false_positives": [report.false_positives.count, report.false_positives.total],
                "invalid": result.invalid,
                "eligible": to_hex(eligible),
                "broken": to_hex(is_broken(Verdicts(result.verdict, report.labels)) & eligible),
            }
        first = report if first is None else first
    assert first is not None  # there is at least one rate
    return first, verdicts


def count_unproved(verdicts: dict[str, Any], unproved: Tensor) -> None:
    """Turn verdicts into those of a certificate: each eligible image that is not proved secure counts as broken.

    Areas mean nothing for a certificate, so they become None.

    Args:
        verdicts: verdicts of `judge_attacked`, which are changed in place.
        unproved: boolean mask (n,) of the images that are not proved secure.
    """
    for verdict in verdicts.values():
        verdict["eroc"] = None
        for at in verdict["rates"].values():
            broken = from_hex(at["eligible"], len(unproved)) & unproved.cpu()
            at |= {"success": [int(broken.sum()), at["success"][1]], "broken": to_hex(broken)}


@torch.no_grad()
def map_points(detector: Detector, images: Tensor, labels: Tensor, attacked: Tensor, *, seed: int) -> dict[str, Any]:
    """Map the representations of benign and attacked images to two dimensions by t-SNE.

    Reference:
        van der Maaten & Hinton, "Visualizing data using t-SNE" (2008).
    """
    from sklearn.manifold import TSNE

    represent = find_representation(detector) if has_representation(detector) else _class_scores(detector)
    places = torch.cat([represent(images), represent(attacked)]).float().cpu().numpy()
    tsne = TSNE(perplexity=min(30, len(images) - 1), init="pca", random_state=seed)
    flat = [[round(float(value), 3) for value in point] for point in tsne.fit_transform(places)]
    benign, verdict = (decide(detector.evidence(x), detector.thresholds) for x in (images, attacked))
    return {
        "benign": flat[: len(images)],
        "attacked": flat[len(images) :],
        "labels": labels.tolist(),
        "benign_labels": benign.labels.tolist(),
        "attacked_labels": verdict.labels.tolist(),
        "accepted": (~verdict.is_adversarial).tolist(),
    }


def _class_scores(detector: Detector) -> Callable[[Tensor], Tensor]:
    return lambda images: detector.evidence(images).class_scores


def to_hex(bits: Tensor) -> str:
    """Write booleans (n,) as hexadecimal digits, four booleans a digit, the first image first.

    Example:
        >>> to_hex(torch.tensor([True, False, False, True, True]))
        '98'
    """
    text = "".join("1" if bit else "0" for bit in bits.tolist())
    return "".join(f"{int(text[at : at + 4].ljust(4, '0'), 2):x}" for at in range(0, len(text), 4))


def from_hex(digits: str, count: int) -> Tensor:
    """Read `count` booleans from hexadecimal digits. This is the inverse of `to_hex`.

    Example:
        >>> from_hex("98", 5)
        tensor([ True, False, False,  True,  True])
    """
    return torch.tensor([bit == "1" for digit in digits for bit in f"{int(digit, 16):04b}"][:count])
