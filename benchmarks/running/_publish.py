"""Publish a trained guard of the benchmarks as a calibrated and evaluated folder with a model card."""

from pathlib import Path
from typing import cast

from clusterguard import Calibrator, ClusterGuard, WorstCaseSuite, certified_success_rate, evaluate
from clusterguard.detection import accuracy, false_positive_rate, judge
from clusterguard.detectors import CardDetails
from clusterguard.errors import ConfigurationError
from torch import Generator, nn

from benchmarks.data import FloatBatches
from benchmarks.detectors import Features
from benchmarks.experiments import Cell
from benchmarks.running._attacking import REFERENCE_IMAGES
from benchmarks.running._training import JUDGED_AT_ONCE, Trainings


def publish_guard(
    cell: Cell, trainings: Trainings, folder: Path, *, images: int | None = None, attacked: int = 300
) -> None:
    """Save the detector of a cell, which is trained first if need be.

    Args:
        cell: any cell of the detector. The attack of the cell does not matter.
        trainings: source of the detector.
        folder: folder to save to, see `ClusterGuard.save_pretrained`.
        images: number of test images for accuracy and certificates, the first ones. None takes all.
        attacked: number of test images for the suite, the first ones.

    Raises:
        ConfigurationError: the detector is not a `ClusterGuard`.
    """
    guard, record = trainings.detector(cell)
    if not isinstance(guard, ClusterGuard):
        raise ConfigurationError(f"expected a guard to publish, got a {type(guard).__name__}")
    encoder = cast(nn.Sequential, guard.encoder)
    if isinstance(encoder[0], Features):
        encoder[0] = encoder[0].body  # so that the folder loads where benchmarks is not installed
    data, eps = trainings.dataset(cell.training.dataset), cell.training.attack["eps"]
    Calibrator().fit(guard, FloatBatches(data.calibration, JUDGED_AT_ONCE), progress=trainings.progress)
    references = data.calibration.head(REFERENCE_IMAGES).floats()
    test = data.open_test()
    report = evaluate(
        guard,
        {f"suite linf {eps:g}": WorstCaseSuite("linf", eps=eps, references=references)},
        FloatBatches(test.head(attacked).to(trainings.device), attacked),
        generator=Generator(trainings.device).manual_seed(cell.seed),
        sanity_images=0,
        precision="auto",
        progress=trainings.progress,
    )
    judged = FloatBatches(test.head(images).to(trainings.device), JUDGED_AT_ONCE)
    verdicts = judge(guard, judged)
    few = FloatBatches(test.head(attacked).to(trainings.device), attacked)
    is_provable = certified_success_rate(guard, few, eps=0.75 * eps).value < 1
    figures = {
        "accuracy": accuracy(verdicts),
        "false positives": false_positive_rate(verdicts),
        **{
            f"any attack of linf {share * eps:g} breaks at most": certified_success_rate(guard, judged, eps=share * eps)
            for share in (0.75, 1)
            if is_provable
        },
    }
    training = {**record, "on the test set": {name: str(rate) for name, rate in figures.items()}}
    guard.save_pretrained(folder, training=training, evaluation=report, card=CardDetails(licence="mit"))
