"""Run a cell: train its detector, attack it, judge the attacked images and write the result."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from clusterguard import Detector, DetectorModule, Evaluation
from clusterguard.attacks import Objective
from clusterguard.detectors import ConsistentDetector, WithThresholds
from torch import Tensor

from benchmarks.data import FloatBatches
from benchmarks.detectors import RECIPES
from benchmarks.experiments import KINDS, Cell, Outcome
from benchmarks.running._attacking import REFERENCE_IMAGES, AttackedDetector, attack_cell
from benchmarks.running._judging import count_unproved, judge_attacked, map_points, thresholds_at
from benchmarks.running._store import provenance
from benchmarks.running._training import JUDGED_AT_ONCE, Trainings


def run_cell(cell: Cell, trainings: Trainings, twin: Cell | None = None) -> dict[str, Any]:
    """Run a cell, or read its result if the store has it.

    Args:
        cell: cell to run.
        trainings: source of the detector. Its store keeps the result.
        twin: cell of the same attack with the other goal, if that cell is run next. Both attacks share batches where
            memory allows. The results agree up to rounding with those of cells that are run alone.

    Returns:
        The result, in types of JSON.

    Raises:
        OutOfTimeError: the budget is used up. The next call resumes the cell.
    """
    store = trainings.store
    known = store.read_cell(cell.key)
    if known is not None:
        return known
    started = time.perf_counter()
    detector, record = trainings.detector(cell)
    if cell.consistency:
        detector = ConsistentDetector(detector, **cell.consistency)
    surrogate = None if cell.surrogate is None else _surrogate(cell.surrogate, trainings)
    data = trainings.dataset(cell.training.dataset)
    held, judged = data.held_out() if cell.split == "validation" else (data.calibration, data.open_test())
    images, labels = judged.head(cell.images).to(trainings.device).floats()
    calibration = FloatBatches(held, JUDGED_AT_ONCE)
    thresholds = thresholds_at(detector, calibration, cell.rates)

    def attack(rate: float) -> Outcome:
        target = AttackedDetector(
            detector=WithThresholds(detector, thresholds[rate]),
            rate=rate,
            images=images,
            labels=labels,
            references=data.calibration.head(REFERENCE_IMAGES).floats(),
            surrogate=surrogate,
        )
        return attack_cell(cell, target, store, clock=trainings.clock, progress=trainings.progress, twin=twin)

    result = {
        "title": cell.title,
        "definition": cell.definition,
        "training": record,
        "images": cell.images,
        **_judge(cell, detector, thresholds, images, labels, calibration, attack),
        "seconds": round(time.perf_counter() - started, 2),
        "checksums": data.checksums,
        "provenance": provenance(trainings.device) | {"compiled": trainings.compile_mode(cell.training)},
    }
    store.write_cell(cell, result)
    store.remove_work(cell.key)
    return result


def _surrogate(cell: Cell, trainings: Trainings) -> tuple[Detector, str | Objective]:
    """The detector that transfer attacks are computed on, and the objective of an attacker who knows it."""
    detector, _ = trainings.detector(cell)
    calibration = FloatBatches(trainings.dataset(cell.training.dataset).calibration, JUDGED_AT_ONCE)
    (thresholds,) = thresholds_at(detector, calibration, cell.rates[:1]).values()
    return WithThresholds(detector, thresholds), RECIPES[cell.detector].objective


def _judge(
    cell: Cell,
    detector: DetectorModule,
    thresholds: dict[float, Tensor],
    images: Tensor,
    labels: Tensor,
    calibration: FloatBatches,
    attack: Callable[[float], Outcome],
) -> dict[str, Any]:
    """The verdicts in a result, at every false-positive rate. `attack` returns the attacked images at one rate."""
    # An attack that sees thresholds is run for each rate. The images of any other attack are judged at all rates.
    groups = [cell.rates] if not KINDS[cell.kind].sees_thresholds else [(rate,) for rate in cell.rates]
    results: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []
    first: Evaluation | None = None
    for rates in groups:
        outcome = attack(rates[0])
        report, verdicts = judge_attacked(
            detector,
            {rate: thresholds[rate] for rate in rates},
            outcome.attacked,
            images,
            labels,
            norm=cell.norm,
            eps=cell.options["eps"],
            calibration=calibration,
        )
        if outcome.unproved is not None:
            count_unproved(verdicts, outcome.unproved)
        first = first or report
        stages += [{"rate": rates[0], **asdict(stage)} for stage in outcome.stages]
        for setting, verdict in verdicts.items():
            results.setdefault(setting, {"eroc": verdict["eroc"], "rates": {}})["rates"] |= verdict["rates"]
    assert first is not None  # there is at least one rate
    judged = {"accuracy": [first.accuracy.count, first.accuracy.total], "results": results, "stages": stages}
    if cell.points:
        seen = WithThresholds(detector, thresholds[cell.rates[0]])
        shown = (part[: cell.points] for part in (images, labels, next(iter(outcome.attacked.values()))))
        judged["points"] = map_points(seen, *shown, seed=cell.seed)
    return judged
