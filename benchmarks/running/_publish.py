"""Publish a trained guard of the benchmarks as a calibrated and evaluated folder with a model card."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from clusterguard import Calibrator, ClusterGuard, WorstCaseSuite, certified_success_rate, evaluate
from clusterguard.detection import accuracy, false_positive_rate, judge
from clusterguard.detectors import CardDetails
from clusterguard.errors import ConfigurationError
from torch import Generator, nn

from benchmarks.data import DataSet, FloatBatches, load_data_set
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
    data = trainings.dataset(cell.training.dataset)
    Calibrator().fit(guard, FloatBatches(data.calibration, JUDGED_AT_ONCE), progress=trainings.progress)
    _measure_and_save(guard, record, data, folder, trainings.device, images, attacked, cell.seed, trainings.progress)


def measure_again(
    folder: Path,
    *,
    images: int | None = None,
    attacked: int = 300,
    device: torch.device,
    data: Path | None = None,
    progress: bool = False,
) -> None:
    """Write new figures into the folder of a guard that `publish_guard` saved, as the suite finds them today.

    Args:
        folder: folder of the guard.
        images: number of test images for accuracy and certificates, the first ones. None takes all.
        attacked: number of test images for the suite, the first ones.
        device: where to attack.
        data: folder of the data sets; None means CLUSTERGUARD_DATA or data/.
        progress: whether to show a progress bar.

    Raises:
        ConfigurationError: the folder does not tell what the guard was trained on and against which attack.
    """
    guard = ClusterGuard.from_pretrained(folder).to(device)
    record = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("training") or {}
    if "definition" not in record:
        raise ConfigurationError(f"expected a guard that `python -m benchmarks publish` saved, got {folder}")
    definition = record["definition"]
    source = load_data_set(definition["dataset"], data)
    _measure_and_save(guard, record, source, folder, device, images, attacked, definition["seed"], progress)


def _measure_and_save(
    guard: ClusterGuard,
    record: dict[str, Any],
    data: DataSet,
    folder: Path,
    device: torch.device,
    images: int | None,
    attacked: int,
    seed: int,
    progress: bool,
) -> None:
    """Attack, judge and certify a guard at the radius of its training, and save it with these figures."""
    eps = record["definition"]["attack"]["eps"]
    references = data.calibration.head(REFERENCE_IMAGES).floats()
    test = data.open_test()
    few = FloatBatches(test.head(attacked).to(device), attacked)
    report = evaluate(
        guard,
        {f"suite linf {eps:g}": WorstCaseSuite("linf", eps=eps, references=references)},
        few,
        generator=Generator(device).manual_seed(seed),
        sanity_images=0,
        precision="auto",
        progress=progress,
    )
    judged = FloatBatches(test.head(images).to(device), JUDGED_AT_ONCE)
    verdicts = judge(guard, judged)
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
