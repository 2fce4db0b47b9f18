"""Evaluate a detector: run attacks, believe none of them, count what really gets through."""

import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from clusterguard.attacks import Attack
from clusterguard.attacks.base import check_attack_input
from clusterguard.attacks.norms import get_norm
from clusterguard.decision import Detection, Detector, decide
from clusterguard.detector import Loader, judge
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.files import write_atomically
from clusterguard.metrics import (
    Rate,
    accuracy,
    accuracy_after_rejection,
    attack_success_rate,
    expected_roc_auc,
    false_positive_rate,
    is_broken,
    is_eligible,
)
from clusterguard.modes import evaluation_mode
from torch import Generator, Tensor
from tqdm.auto import tqdm


@dataclass(frozen=True)
class AttackResult:
    """What one attack achieved.

    Attributes:
        name: under which it was handed in.
        attack: how it prints, with its options.
        success: ASR, over the images labelled correctly and accepted before the attack.
        expected_roc_auc: EROC.
        invalid: attacked images that left the box or the attack's own budget and so did not count.
        seconds: wall time.
    """

    name: str
    attack: str
    success: Rate
    expected_roc_auc: float
    invalid: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """A detector's figures on clean and attacked images; print it for a table.

    Attributes:
        images: how many images were evaluated.
        accuracy: labelled correctly, refused or not.
        accuracy_after_rejection: labelled correctly among the accepted.
        false_positives: refused among the correctly labelled, all classes together.
        false_positives_by_class: the same for each of the K true classes.
        results: one per attack.
        worst_case: an image counts if any of the attacks broke it; the stricter of the two worst cases.
        benign_reference: what EROC compared with, "calibration" or "evaluated" images.
    """

    images: int
    accuracy: Rate
    accuracy_after_rejection: Rate
    false_positives: Rate
    false_positives_by_class: tuple[Rate, ...]
    results: tuple[AttackResult, ...]
    worst_case: Rate
    benign_reference: str

    @property
    def asr(self) -> float:
        """Worst case per example: the share of images that some attack broke."""
        return self.worst_case.value

    @property
    def eroc(self) -> float:
        """The smallest EROC of any attack."""
        return min((result.expected_roc_auc for result in self.results), default=math.nan)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: rates with count, total, value and 95 % interval, and the versions used."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        return {**_plain(self), "versions": versions}

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict` to a file, whole or not at all."""
        return write_atomically(path, lambda file: file.write_text(json.dumps(self.to_dict(), indent=2) + "\n"))

    def to_markdown(self) -> str:
        """The figures as Markdown, n and 95 % intervals with them."""
        lines = [
            f"n = {self.images}; accuracy {self.accuracy}; after rejection {self.accuracy_after_rejection}; "
            f"false positives {self.false_positives}",
            "",
            "| attack | ASR [95 %] (n) | EROC |",
            "|---|---|---|",
            *(f"| {result.name} | {result.success} | {result.expected_roc_auc:.3f} |" for result in self.results),
            f"| worst case per image | {self.worst_case} | {self.eroc:.3f} |",
        ]
        return "\n".join(lines)

    __str__ = to_markdown


def evaluate(
    detector: Detector,
    attacks: Attack | Mapping[str, Attack],
    loader: Loader,
    *,
    calibration_loader: Loader | None = None,
    generator: Generator | None = None,
    progress: bool = False,
) -> Evaluation:
    """Attack a calibrated detector and count what gets through.

    An attack's word is not taken: each returned image is judged afresh, as it is stored, and does not count if it
    left [0, 1] or the budget that the attack states in its `norm` and `eps`.

    Args:
        detector: calibrated; on the device where the work shall be done.
        attacks: one attack, or several by name.
        loader: batches of clean test images (B, C, H, W) in [0, 1] and labels (B,).
        calibration_loader: the benign images that EROC compares with; None compares with those of `loader`.
        generator: the attacks' randomness, on the detector's device.
        progress: show a progress bar.

    Returns:
        The figures, with counts and intervals.

    Raises:
        NotCalibratedError: the detector has no thresholds.
        InputError: images or labels of a wrong shape, dtype or range, or an empty loader.
        ConfigurationError: no attacks.

    Reference:
        arXiv 2012.03483, section 5, "Evaluation metric".

    Example:
        >>> from clusterguard import FGSM, ConfidenceDetector
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> detector = ConfidenceDetector(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), 2)
        >>> detector.thresholds = torch.tensor([5.0, 5.0])
        >>> loader = DataLoader(TensorDataset(torch.rand(8, 1, 2, 2), torch.arange(8) % 2), batch_size=4)
        >>> evaluate(detector, {"FGSM": FGSM(eps=0.1)}, loader).images
        8
    """
    named = dict(attacks) if isinstance(attacks, Mapping) else {type(attacks).__name__: attacks}
    if not named:
        raise ConfigurationError("expected at least one attack, got none")
    device, num_classes = detector.thresholds.device, len(detector.thresholds)
    batches = [(images.to(device), labels.to(device)) for images, labels in loader]
    if not batches:
        raise InputError("expected a loader with at least one batch, got an empty one")
    for batch in batches:
        check_attack_input(detector, *batch)  # everything is checked before the first attack starts
    clean, labels = judge(detector, batches)
    benign, benign_labels = (clean, labels) if calibration_loader is None else judge(detector, calibration_loader)
    results, any_broken = [], torch.zeros_like(labels, dtype=torch.bool)
    for name, attack in named.items():
        started = time.perf_counter()
        attacked = [
            attack(detector, images, own, generator=generator)
            for images, own in tqdm(batches, desc=name, disable=not progress, leave=False)
        ]
        seconds = time.perf_counter() - started
        valid = torch.cat([_is_valid(attack, old, new) for (old, _), new in zip(batches, attacked, strict=True)])
        verdict = _judge_attacked(detector, attacked)
        verdict = verdict._replace(is_adversarial=verdict.is_adversarial | ~valid)
        any_broken |= is_broken(verdict, labels)
        results.append(
            AttackResult(
                name=name,
                attack=repr(attack),
                success=attack_success_rate(clean, verdict, labels),
                expected_roc_auc=expected_roc_auc(benign, benign_labels, verdict, labels, num_classes),
                invalid=int((~valid).sum()),
                seconds=seconds,
            )
        )
    broken = any_broken[is_eligible(clean, labels)]
    return Evaluation(
        images=len(labels),
        accuracy=accuracy(clean, labels),
        accuracy_after_rejection=accuracy_after_rejection(clean, labels),
        false_positives=false_positive_rate(clean, labels),
        false_positives_by_class=tuple(
            false_positive_rate(Detection(*(part[labels == index] for part in clean)), labels[labels == index])
            for index in range(num_classes)
        ),
        results=tuple(results),
        worst_case=Rate(int(broken.sum()), len(broken)),
        benign_reference="evaluated" if calibration_loader is None else "calibration",
    )


@torch.no_grad()
def _judge_attacked(detector: Detector, batches: list[Tensor]) -> Detection:
    """Verdicts on attacked images as they are stored; unlike clean ones they may be outside [0, 1]."""
    with evaluation_mode(detector):
        verdicts = [decide(detector.evidence(images), detector.thresholds) for images in batches]
    return Detection(*(torch.cat(parts).cpu() for parts in zip(*verdicts, strict=True)))


def _is_valid(attack: Attack, images: Tensor, attacked: Tensor) -> Tensor:
    """(B,) whether attacked images are images, and within the budget that the attack states."""
    if attacked.shape != images.shape:
        raise InputError(f"expected the attack to return shape {tuple(images.shape)}, got {tuple(attacked.shape)}")
    in_box = ((attacked >= 0) & (attacked <= 1)).flatten(1).all(dim=1)
    norm, eps = getattr(attack, "norm", None), getattr(attack, "eps", None)
    if norm is None or eps is None:
        return in_box.cpu()
    tolerance = 1e-5 * (1 + eps)  # float32 rounding of a few thousand summed pixels
    in_budget: Tensor = get_norm(norm).size(attacked - images) <= eps + tolerance
    return (in_box & in_budget).cpu()


def _plain(value: Any) -> Any:
    """Only what JSON has: rates spelled out, and null where there is no number."""
    if isinstance(value, Rate):
        return _plain({"count": value.count, "total": value.total, "value": value.value, "interval": value.interval})
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
