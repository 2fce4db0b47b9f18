"""What a training takes its batches from, and what is checked before its first step."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from clusterguard._support import check_images, check_place
from clusterguard.detection import Calibrator, Loader, Pairs, Unpack, judge
from clusterguard.detection._internal import check_evidence, check_passes
from clusterguard.detectors import DetectorModule
from clusterguard.training._engine import TrainingEngine
from clusterguard.training._overfitting import OverfittingCheck, successes
from clusterguard.training._overlap import Overlap
from clusterguard.training._replay import Replay, Run, restarting_workers
from clusterguard.training._validation import Validation, check_monitor, measure
from torch import Generator, Tensor


class CheckedTrainer(Protocol):
    """What the checks need of a trainer."""

    detector: DetectorModule
    calibrator: Calibrator
    thresholds: Tensor
    _overlap: Overlap

    @property
    def engine(self) -> TrainingEngine:
        """The engine that takes the steps."""
        ...

    def validate(self, images: Tensor, labels: Tensor, generator: Generator) -> Mapping[str, Tensor]:
        """The figures of validation images, by name."""
        ...


def make_run(
    train_loader: Loader,
    calibration_loader: Loader,
    validation: Validation | None,
    overfitting: OverfittingCheck | None,
    *,
    engine: TrainingEngine,
    unpack: Unpack | None,
    generator: Generator | None,
    checkpoint: str | Path | None,
    checkpoint_every: int | None,
    stop_when: Callable[[], bool] | None,
) -> Run:
    """The batches and settings of a call of `DetectorTrainer.fit`, whose arguments these are.

    Raises:
        ConfigurationError: a loader allows one pass only or cannot be split between processes, `checkpoint_every` is
            below 1, or `stop_when` comes without a checkpoint.
    """

    def replay(loader: Loader) -> Replay:
        return Replay(Pairs(loader, unpack), engine.device)

    train, calibration = (
        loader if checkpoint is None else restarting_workers(loader) for loader in (train_loader, calibration_loader)
    )
    run = Run(
        replay(engine.share(train)),
        replay(calibration),
        generator,
        checkpoint,
        checkpoint_every,
        stop_when,
        None if validation is None else replay(validation.loader),
        validation,
        None if overfitting is None else replay(overfitting.loader),
        overfitting,
    )
    with run.train.undisturbed(), run.calibration.undisturbed():
        check_passes(train_loader, "training loader")
        check_passes(calibration_loader, "calibration loader")
    return run


def check_run(trainer: CheckedTrainer, run: Run, epochs: int, calibrate: bool) -> None:
    """Check everything that could fail after the first step."""
    trainer.engine.check(run.train.length, epochs, resumable=run.checkpoint is not None)
    if run.checkpoint is not None:
        run.warn_of_obstacles(trainer.engine.kept.obstacles, begin=trainer.engine.accelerator.num_processes == 1)
    if calibrate:
        with run.calibration.undisturbed():
            batches, names = _first_judged(trainer, run.calibration.loader), trainer.detector.class_names
            trainer.calibrator.check_counts(batches, trainer.detector.num_classes, class_names=names)
    if run.judged is not None and run.validation is not None:
        with run.judged.undisturbed():
            trainer.thresholds = trainer.thresholds.to(trainer.engine.device)
            first = [(images[:4], labels[:4]) for images, labels in islice(run.judged.loader, 1)]
            check_monitor(run.validation, measure(trainer.validate, trainer.detector, first))
    if run.held_out is not None and run.overfitting is not None:
        with run.held_out.undisturbed():
            trainer.thresholds = trainer.thresholds.to(trainer.engine.device)
            first = [(images[:4], labels[:4]) for images, labels in islice(run.held_out.loader, 1)]
            measure(partial(successes, run.overfitting, trainer.detector, trainer.thresholds), trainer.detector, first)
    if run.checkpoint is not None:
        check_place(run.checkpoint)


def _first_judged(trainer: CheckedTrainer, batches: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Check the batches, and let the detector judge the first one, so that it fails before training if at all."""
    for position, (images, labels) in enumerate(batches):
        check_images(images)
        if not position:
            judge(trainer.detector, [(images, labels)])
            check_evidence(trainer.detector, images)
        trainer._overlap.keep(images)
        yield images, labels
