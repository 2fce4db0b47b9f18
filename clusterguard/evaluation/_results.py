"""The result of an evaluation: figures with their counts, and verdicts; it can be written as JSON or Markdown."""

import json
import math
import platform
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from clusterguard._support import escape_markdown, write_atomically
from clusterguard.attacks import Cost, StageRecord
from clusterguard.detection import Detection, Rate
from clusterguard.evaluation._sanity import Sanity
from torch import Tensor


class Gallery(NamedTuple):
    """The up to 12 broken images with the smallest suspicion over threshold, on the CPU.

    Attributes:
        clean: (n, C, H, W) clean images.
        attacked: (n, C, H, W) attacked images.
        labels: (n,) true labels.
        predicted: (n,) labels under which the attacked images were accepted.
        ratios: (n,) suspicion over threshold.
    """

    clean: Tensor
    attacked: Tensor
    labels: Tensor
    predicted: Tensor
    ratios: Tensor


STAGE_HEAD = ("stage", "attacked", "broken", "forward", "gradients", "broken per 1,000 passes")


def stage_figures(stage: StageRecord) -> list[str]:
    """The figures of a stage under `STAGE_HEAD`, all but its name."""
    counts = stage.attacked, stage.broken, stage.forward, stage.backward
    return [*(f"{count:,}" for count in counts), f"{stage.broken_per_thousand:.3g}"]


class CertifiedBound(NamedTuple):
    """A proved upper bound on the success rate of every attack on an evaluation's images.

    Attributes:
        eps: radius.
        success: upper bound, as `certified_success_rate` counts it.
        norm: name of the norm.
    """

    eps: float
    success: Rate
    norm: str = "linf"


@final
@dataclass(frozen=True)
class AttackResult:
    """The result of one attack.

    Attributes:
        name: name under which `evaluate` got the attack.
        attack: `repr` of the attack, with its options.
        norm: norm that the attack states, or None.
        eps: radius that the attack states, or None.
        success: ASR, among the images labelled correctly and accepted before the attack.
        expected_roc_auc: EROC.
        invalid: number of attacked images outside [0, 1] or outside the attack's budget. They do not count as broken.
        cost: images judged and gradients taken, for all images together and in all runs; for a suite, the sum of its
            stages.
        seconds: wall time of the last run.
        runs: number of runs; more than one if a suite was resumed.
        stages: number of images that each stage of a suite attacked and broke, with its cost; empty for other attacks.
        precision: precision in which the attack searched; "bf16 and float32" if attacks inside it differ, None if it
            has no such option.
        verdict: verdicts on the n attacked images; not part of the JSON.
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
    precision: str | None
    verdict: Detection = field(repr=False, metadata={"json": False})


@final
@dataclass(frozen=True)
class Evaluation:
    """The figures of a detector on clean and attacked images; printed, they are a table.

    Attributes:
        images: number n of evaluated images.
        accuracy: share of images labelled correctly, whether refused or not.
        accuracy_after_rejection: share of accepted images that are labelled correctly.
        false_positives: share of correctly labelled images that are refused, for all classes together.
        false_positives_by_class: share of refused images among the correctly labelled ones, for each of the K classes.
        results: one result for each attack.
        worst_by_norm: share of images that any attack of a norm broke, by norm.
        worst_case: share of images that any attack broke, whatever its norm.
        benign_reference: images that EROC compared with, "calibration" or "evaluated".
        thresholds: K floats.
        seed: seed of the generator, or None without one.
        sanity: signs that the attacks are too weak to judge the detector by; None without a probe.
        clean: verdicts on the n clean images; not part of the JSON.
        labels: (n,) true labels; not part of the JSON.
        gallery: worst-broken images; None without attacks; not part of the JSON.
        class_names: K names of the classes; None if the detector does not know them.
        weights: digest of the detector's weights, as `DetectorModule.digest` gives it; None for other detectors.
        certified: proved bound for reports to show; `evaluate` leaves it None, and ``dataclasses.replace`` adds one.
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
    class_names: tuple[str, ...] | None = None
    weights: str | None = None

    @property
    def asr(self) -> float:
        """The share of images that at least one attack broke."""
        return self.worst_case.value

    @property
    def largest_mean_asr(self) -> float:
        """The largest ASR of any single attack, which is the paper's worst case."""
        return max((result.success.value for result in self.results), default=math.nan)

    @property
    def eroc(self) -> float:
        """The smallest EROC of any attack."""
        return min((result.expected_roc_auc for result in self.results), default=math.nan)

    @property
    def proved(self) -> list[tuple[str, Rate]]:
        """The certified bound as a row of a table; empty without one."""
        bound = self.certified
        return [] if bound is None else [(f"proved upper bound, {bound.norm} {bound.eps:g}", bound.success)]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON: rates with count, total, value and 95 % interval, and versions used."""
        versions = {"clusterguard": version("clusterguard"), "python": platform.python_version()}
        return {
            **to_json_value(self),
            "versions": versions | {"torch": torch.__version__},
            "machine": platform.machine(),
        }

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict` to a JSON file, completely or not at all.

        Args:
            path: path of the file.

        Returns:
            The path.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        return write_atomically(path, lambda file: file.write_text(text))

    def to_markdown(self) -> str:
        """The figures as Markdown, with n and 95 % intervals; the sanity report comes last.

        Markup in the names of attacks is escaped.
        """
        lines = [
            f"n = {self.images}; accuracy {self.accuracy}; after rejection "
            f"{self.accuracy_after_rejection}; false positives {self.false_positives}",
            "",
            "| attack | ASR [95 %] (n) | EROC | forward | gradients |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {escape_markdown(result.name)} | {result.success} | {show_number(result.expected_roc_auc)} "
            f"| {result.cost.forward:,} | {result.cost.backward:,} |"
            for result in self.results
        ]
        if len(self.worst_by_norm) > 1:
            lines += [
                f"| worst of {escape_markdown(norm)}, per image | {rate} | | | |"
                for norm, rate in self.worst_by_norm.items()
            ]
        lines.append(f"| worst case per image | {self.worst_case} | {show_number(self.eroc)} | | |")
        lines += [f"| {name} | {rate} | | | |" for name, rate in self.proved]
        lines += [line for text in self.notes() for line in ("", escape_markdown(text))]
        for result in self.results:
            if result.stages:
                lines += [
                    "",
                    f"Stages of {escape_markdown(result.name)}, each on the survivors of those before it:",
                    "",
                ]
                lines += [f"| {' | '.join(STAGE_HEAD)} |", "|" + "---|" * len(STAGE_HEAD)]
                lines += [
                    f"| {' | '.join([escape_markdown(stage.name), *stage_figures(stage)])} |" for stage in result.stages
                ]
        return "\n".join(lines + self.sanity_lines())

    def notes(self) -> list[str]:
        """A sentence if attacks searched in bfloat16, and one for each suite that was resumed."""
        is_rough = any("bf16" in (result.precision or "") for result in self.results)
        rough = ["Attacks searched in bfloat16; every verdict is in the detector's own precision."] * is_rough
        return rough + [
            f"{result.name} took {result.runs} runs, because it was resumed; its cost is that of all runs' stages."
            for result in self.results
            if result.runs > 1
        ]

    def sanity_lines(self) -> list[str]:
        """The measurements and warnings of the sanity probe as lines of text; empty without a probe."""
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
    """The number with three decimals, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def to_json_value(value: Any) -> Any:
    """The value in types of JSON. Rates become dicts, and numbers that are not finite become None."""
    if isinstance(value, Rate):
        return {name: to_json_value(getattr(value, name)) for name in ("count", "total", "value", "interval")}
    if is_dataclass(value):
        shown = (entry for entry in fields(value) if entry.metadata.get("json", True))
        return {entry.name: to_json_value(getattr(value, entry.name)) for entry in shown}
    if hasattr(value, "_asdict"):
        return to_json_value(value._asdict())
    if isinstance(value, dict):
        return {key: to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
