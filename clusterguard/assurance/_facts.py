"""The parts of the evidence about a guard as plain values, each from a result that was measured elsewhere."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from clusterguard.attacks import EFFORTS
from clusterguard.deployment import FalsePositiveMonitor, expected_delay, plausible_rate
from clusterguard.deployment._internal import FACTORS
from clusterguard.detection import (
    Calibration,
    Detection,
    Rate,
    Verdicts,
    accuracy,
    accuracy_after_rejection,
    false_positive_rate,
)
from clusterguard.detectors import ClusterGuard
from clusterguard.detectors._internal import INTENDED_USE, LIMITS, describe_image_shape, describe_thresholds
from clusterguard.errors import InputError
from clusterguard.evaluation import Evaluation

CONFIDENCE = 0.99
PROOF_ARITHMETIC = (
    "The proof is of the guard as its method detect runs it: uncompiled, without autocast, in IEEE float32 or float64.",
    "It includes the rounding of each operation, with sums in any order, fused or not.",
    "Convolutions are computed as direct products, as oneDNN and cuBLAS do. The proof does not hold for Winograd's or "
    "Fourier's method, which cuDNN may choose at stride 1.",
    "It does not hold for half precision, TF32, quantised weights, or an exported graph on another runtime.",
)
_RUN_DEPENDENT = ("seconds", "runs")  # what differs from run to run


def describe_system(
    config: Mapping[str, Any], licence: str | None, names: Sequence[str], purpose: str | None
) -> dict[str, Any]:
    """What the guard is, does and is meant for."""
    backbone, guard = config["backbone"], config["guard"]
    return {
        "purpose": purpose,
        "use": INTENDED_USE,
        "limits": [*LIMITS, describe_image_shape(guard.get("image_shape"))],
        "backbone": f"{backbone['source']}:{backbone.get('name', backbone.get('type'))}",
        "head": guard["head"]["description"],
        "classes": list(names),
        "dtype": guard["dtype"],
        "licence": licence,
        "training_attack": _training_attack(config["training"]),
        "training": config["training"],
    }


def trained_radius(training: Any) -> tuple[str, float] | None:
    """The norm and radius of the attack that the record of a training names; None if it names none.

    Args:
        training: record that was saved with a guard, which may hold anything.

    Example:
        >>> trained_radius({"attack": "PGD(norm='linf', eps=0.3, steps=10)"}), trained_radius({"epochs": 3})
        (('linf', 0.3), None)
    """
    found = re.search(r"norm='(\w+)', eps=([0-9.e+-]+)", str(_training_attack(training)))
    return (found[1], float(found[2])) if found else None


def _training_attack(training: Any) -> str | None:
    """The attack that a record of a training names, under "attack" or, as the benchmarks do, in its "definition"."""
    records = [training, training.get("definition")] if isinstance(training, Mapping) else []
    attacks = [record["attack"] for record in records if isinstance(record, Mapping) and record.get("attack")]
    if not attacks:
        return None
    told = attacks[0]
    return ", ".join(f"{name}={value!r}" for name, value in told.items()) if isinstance(told, Mapping) else str(told)


def describe_benign(benign: Verdicts, names: Sequence[str]) -> dict[str, Any]:
    """How the guard labels and refuses benign test images, in all and by class."""
    by_class = [benign[benign.labels == index] for index in range(len(names))]
    return {
        "images": len(benign),
        "accuracy": accuracy(benign),
        "accuracy_after_rejection": accuracy_after_rejection(benign),
        "false_positives": false_positive_rate(benign),
        "refused": Rate(int(benign.detection.is_adversarial.sum()), len(benign)),
        "by_class": [
            {"name": name, "accuracy": accuracy(part), "false_positives": false_positive_rate(part)}
            for name, part in zip(names, by_class, strict=True)
        ],
    }


def describe_attacks(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation without what differs from run to run, and how far each suite had converged."""
    measured = evaluation.to_dict()
    for name in ("versions", "machine", "certified"):
        measured.pop(name)
    for result, told in zip(evaluation.results, measured["results"], strict=True):
        for name in _RUN_DEPENDENT:
            told.pop(name)
        told["convergence"] = _convergence(result.stages)
    return measured


def _convergence(stages: Sequence[Any]) -> dict[str, Any] | None:
    """How many images the last stages of a suite still broke; None for an attack without stages."""
    if not stages:
        return None
    breaking = [index for index, stage in enumerate(stages, 1) if stage.broken]
    last = stages[-1]
    return {
        "stages": len(stages),
        "last_stage": last.name,
        "last_stage_attacked": last.attacked,
        "last_stage_broke": last.broken,
        "last_stage_that_broke_any": breaking[-1] if breaking else 0,
    }


def describe_budgets() -> dict[str, dict[str, Any]]:
    """The work of each budget of a suite."""
    return {name: effort._asdict() for name, effort in EFFORTS.items()}


def describe_certificate(guard: ClusterGuard, evaluation: Evaluation, settings: Mapping[str, Any]) -> Any:
    """What was proved, and about which arithmetic; None if nothing was proved."""
    if evaluation.certified is None:
        return None
    return {
        "norm": evaluation.certified.norm,
        "eps": evaluation.certified.eps,
        "success": evaluation.certified.success,
        "method": settings.get("proof"),
        "device": guard.thresholds.device.type,
        "arithmetic": list(PROOF_ARITHMETIC),
    }


def describe_threshold_fit(
    guard: ClusterGuard, record: Calibration | None, benign: Verdicts, names: Sequence[str]
) -> dict[str, Any]:
    """How thresholds were fitted, what that guarantees, and what calibration and test images show."""
    thresholds = guard.thresholds.tolist()
    told: dict[str, Any] = {
        "fit": describe_thresholds(guard.is_calibrated, record, names),
        "guarantee": _guarantee(record, names),
        "asked": None if record is None else record.false_positive_rate,
        "plausible": {"confidence": CONFIDENCE, "same_mix": _plausible(record), "any_mix": _plausible(record, True)},
    }
    rows = []
    for index, name in enumerate(names):
        count = 0 if record is None else record.counts[index]
        refused = 0 if record is None else round(record.realised_rates[index] * count)
        part = benign[benign.labels == index]
        realised = {"calibration": Rate(refused, count), "test": false_positive_rate(part)}
        rows.append({"name": name, "threshold": thresholds[index], "realised": realised})
    return {**told, "by_class": rows}


def _guarantee(record: Calibration | None, names: Sequence[str]) -> str:
    if record is None:
        return "None is known, because there is no record of a calibration."
    if record.method != "conformal":
        return "None: the quantile of the calibration images has no guarantee for other images."
    rate = f"{record.false_positive_rate:g}"
    pooled = [names[index] for index in record.pooled]
    text = (
        "A new benign image that would be labelled correctly, exchangeable with the calibration images of its class, "
        f"is refused with probability at most {rate}. The probability is over calibration sets too."
    )
    if pooled:
        text += f" For classes {', '.join(pooled)} this holds only on average over all classes."
    return text + " It says nothing about attacked images, and it ends when traffic drifts."


def _plausible(record: Calibration | None, any_mix: bool = False) -> float | None:
    """The rate that chance makes plausible for this calibration set; None where there is no bound."""
    if record is None:
        return None
    try:
        return plausible_rate(record, confidence=CONFIDENCE, any_mix=any_mix)
    except InputError:
        return None


def describe_monitoring(
    record: Calibration | None, evaluation: Evaluation, benign: Verdicts, run_length: float
) -> dict[str, Any] | None:
    """The plan for watching the guard, and what the monitor says of the images at hand; None without a limit."""
    limit = _plausible(record)
    if limit is None or not limit < 1:
        return None

    def replay(detection: Detection, labels: torch.Tensor | None = None) -> dict[str, Any]:
        report = FalsePositiveMonitor(limit, run_length=run_length).update(detection, labels)
        return {"alarm": report.alarm, "seen": report.seen, "refused": report.refused, "report": str(report)}

    attacked = [
        {"name": result.name, **replay(result.verdict)} for result in evaluation.results if len(result.verdict.labels)
    ]
    rates = [(factor, factor * limit) for factor in FACTORS if factor * limit < 1]
    return {
        "limit": limit,
        "confidence": CONFIDENCE,
        "run_length": run_length,
        "delays": [
            {"factor": factor, "rate": rate, "images": expected_delay(limit, rate, run_length=run_length)}
            for factor, rate in rates
        ],
        "benign": replay(benign.detection, benign.labels),
        "attacked": attacked,
    }


def digest_of_code() -> str:
    """A digest of the source code of clusterguard that runs."""
    root = Path(__file__).parents[1]
    files = [*root.rglob("*.py"), root.parent / "clusterguard_torchvision.py"]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.relative_to(root.parent).as_posix()):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{content}  {file.relative_to(root.parent).as_posix()}\n".encode())
    return digest.hexdigest()
