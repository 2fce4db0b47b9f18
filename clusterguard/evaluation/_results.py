"""What an evaluation found: figures with their counts, and the verdicts behind them; as JSON and as Markdown."""

import json
import math
import platform
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clusterguard._support import write_atomically
from clusterguard.attacks import Cost, StageRecord
from clusterguard.detection import Detection, Rate
from clusterguard.evaluation._sanity import Sanity
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
        cost: images judged and gradients taken, all images together and in all runs.
        seconds: wall time of the last run.
        runs: how many runs there were; more than one if a suite went on from an interrupted one.
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
    runs: int
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

    @property
    def proved(self) -> list[tuple[str, Rate]]:
        """The certified bound as a row of a table; empty without one."""
        bound = self.certified
        return [] if bound is None else [(f"proved upper bound, linf {bound.eps:g}", bound.success)]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON: rates with count, total, value and 95 % interval, and versions used."""
        versions = {"clusterguard": version("clusterguard"), "python": platform.python_version()}
        return {**plain(self), "versions": versions | {"torch": torch.__version__}, "machine": platform.machine()}

    def to_json(self, path: str | Path) -> Path:
        """The path of the JSON file to which `to_dict` is written, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        return write_atomically(path, lambda file: file.write_text(text))

    def to_markdown(self) -> str:
        """The figures as Markdown, n and 95 % intervals with them; the sanity report comes last."""
        lines = [
            f"n = {self.images}; accuracy {self.accuracy}; after rejection "
            f"{self.accuracy_after_rejection}; false positives {self.false_positives}",
            "",
            "| attack | ASR [95 %] (n) | EROC | forward | gradients |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {result.name} | {result.success} | {show_number(result.expected_roc_auc)} "
            f"| {result.cost.forward:,} | {result.cost.backward:,} |"
            for result in self.results
        ]
        if len(self.worst_by_norm) > 1:
            lines += [f"| worst of {norm}, per image | {rate} | | | |" for norm, rate in self.worst_by_norm.items()]
        lines.append(f"| worst case per image | {self.worst_case} | {show_number(self.eroc)} | | |")
        lines += [f"| {name} | {rate} | | | |" for name, rate in self.proved]
        lines += [line for text in self.resumed_lines() for line in ("", text)]
        for result in self.results:
            if result.stages:
                lines += ["", f"Stages of {result.name}, each on the survivors of those before it:", ""]
                lines += ["| stage | attacked | broken | forward | gradients |", "|---|---|---|---|---|"]
                lines += [
                    f"| {stage.name} | {stage.attacked} | {stage.broken} | {stage.forward:,} | {stage.backward:,} |"
                    for stage in result.stages
                ]
        return "\n".join(lines + self.sanity_lines())

    def resumed_lines(self) -> list[str]:
        """A sentence for each suite that went on from an interrupted run."""
        return [
            f"{result.name} took {result.runs} runs, each going on from the one before; its effort is of all of them."
            for result in self.results
            if result.runs > 1
        ]

    def sanity_lines(self) -> list[str]:
        """What the sanity probe measured, and its warnings, as lines of text; empty without a probe."""
        sanity = self.sanity
        if sanity is None:
            return []
        curve = ", ".join(f"{eps:g}: {rate.value:.2f}" for eps, rate in sanity.by_eps)
        return [
            "",
            f"Sanity, a probe of {sanity.images} images at {sanity.norm} {sanity.eps:g}: ASR by eps {curve}; "
            f"gradient-free {sanity.black_box.value:.2f} against white-box {sanity.white_box.value:.2f}; "
            f"{sanity.zero_gradients:.1%} of gradients 0, {sanity.non_finite_gradients:.1%} not finite; "
            f"{sanity.still_falling:.0%} of losses still falling; {sanity.lost_again:.0%} broken earlier, not at the "
            "end.",
            *(f"WARNING: {warning}." for warning in sanity.warnings),
        ]

    __str__ = to_markdown


def show_number(value: float) -> str:
    """Three decimals, or a dash where there is no number."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def plain(value: Any) -> Any:
    """Only what JSON has: rates spelled out, and null where there is no number."""
    if isinstance(value, Rate):
        return plain({"count": value.count, "total": value.total, "value": value.value, "interval": value.interval})
    if is_dataclass(value):
        shown = (own for own in fields(value) if own.metadata.get("json", True))
        return {own.name: plain(getattr(value, own.name)) for own in shown}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
