"""What an evaluation found: figures with their counts, and the verdicts behind them."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from clusterguard.attacks.metering import Cost
from clusterguard.attacks.suite_state import StageRecord
from clusterguard.decision import Detection
from clusterguard.metrics import Rate
from clusterguard.sanity import Sanity
from torch import Tensor


class Gallery(NamedTuple):
    """Up to 12 images that were broken at the smallest suspicion over threshold, on the CPU.

    Attributes:
        clean: (n, C, H, W).
        attacked: (n, C, H, W).
        labels: (n,) true labels.
        predicted: (n,) labels under which the attacked images were accepted.
        ratios: (n,) suspicion over threshold.
    """

    clean: Tensor
    attacked: Tensor
    labels: Tensor
    predicted: Tensor
    ratios: Tensor


class CertifiedBound(NamedTuple):
    """What no attack can exceed on the images of an evaluation.

    Attributes:
        eps: radius in l∞.
        success: as `certified_success_rate` counts it.
    """

    eps: float
    success: Rate


@dataclass(frozen=True)
class AttackResult:
    """What one attack achieved.

    Attributes:
        name: under which it was handed in.
        attack: how it prints, with its options.
        norm: that it states, or None.
        eps: that it states, or None.
        success: ASR, over the images labelled correctly and accepted before the attack.
        expected_roc_auc: EROC.
        invalid: attacked images that left the box or the attack's own budget and so did not count.
        cost: images judged and gradients taken, all images together.
        seconds: wall time.
        stages: of a suite, what each stage broke and cost.
        verdict: on the n attacked images; not part of the JSON.
    """

    name: str
    attack: str
    norm: str | None
    eps: float | None
    success: Rate
    expected_roc_auc: float
    invalid: int
    cost: Cost
    seconds: float
    stages: tuple[StageRecord, ...]
    verdict: Detection = field(repr=False, metadata={"json": False})


@dataclass(frozen=True)
class Evaluation:
    """A detector's figures on clean and attacked images; print it for a table.

    Attributes:
        images: n, how many images were evaluated.
        accuracy: labelled correctly, refused or not.
        accuracy_after_rejection: labelled correctly among the accepted.
        false_positives: refused among the correctly labelled, all classes together.
        false_positives_by_class: the same for each of the K true classes.
        results: one per attack.
        worst_by_norm: an image counts if any attack of that norm broke it.
        worst_case: an image counts if any attack at all broke it: the union over norms.
        benign_reference: what EROC compared with, "calibration" or "evaluated" images.
        thresholds: K floats.
        seed: of the generator handed in, or None.
        sanity: signs that attacks failed rather than the detector held; None if it was switched off.
        clean: verdicts on the n clean images; not part of the JSON.
        labels: (n,) true labels; not part of the JSON.
        gallery: the worst-broken images; None without attacks; not part of the JSON.
        certified: a bound that reports show; `evaluate` proves nothing, ``dataclasses.replace`` puts it in.
    """

    images: int
    accuracy: Rate
    accuracy_after_rejection: Rate
    false_positives: Rate
    false_positives_by_class: tuple[Rate, ...]
    results: tuple[AttackResult, ...]
    worst_by_norm: dict[str, Rate]
    worst_case: Rate
    benign_reference: str
    thresholds: tuple[float, ...]
    seed: int | None
    sanity: Sanity | None
    clean: Detection = field(repr=False, metadata={"json": False})
    labels: Tensor = field(repr=False, metadata={"json": False})
    gallery: Gallery | None = field(repr=False, metadata={"json": False})
    certified: CertifiedBound | None = None

    @property
    def asr(self) -> float:
        """Worst case per example: the share of images that some attack broke."""
        return self.worst_case.value

    @property
    def largest_mean_asr(self) -> float:
        """The paper's worst case: the largest ASR of any single attack."""
        return max((result.success.value for result in self.results), default=math.nan)

    @property
    def eroc(self) -> float:
        """The smallest EROC of any attack."""
        return min((result.expected_roc_auc for result in self.results), default=math.nan)

    def to_dict(self) -> dict[str, object]:
        """The figures as plain values for JSON: rates with count, total, value and 95 % interval, and versions used."""
        from clusterguard.report import to_plain

        return to_plain(self)

    def to_json(self, path: str | Path) -> Path:
        """The path of the JSON file to which `to_dict` is written, whole or not at all."""
        from clusterguard.report import write_json

        return write_json(self, path)

    def to_markdown(self) -> str:
        """The figures as Markdown, n and 95 % intervals with them."""
        from clusterguard.report import to_markdown

        return to_markdown(self)

    def to_html(self, path: str | Path) -> Path:
        """The path of one page that holds all it needs: tables, curves, the worst-broken images. Needs matplotlib."""
        from clusterguard.report import write_html

        return write_html(self, path)

    __str__ = to_markdown
