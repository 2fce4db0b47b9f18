"""What a trainer keeps in a checkpoint, and how it goes on from one."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from clusterguard._support import gather
from clusterguard.attacks import Precision
from clusterguard.attacks._internal import has_bfloat16
from clusterguard.detection import Calibrator
from clusterguard.detectors import DetectorModule
from clusterguard.training._checkpoints import (
    Checkpoint,
    EpochRecord,
    EpochTotals,
    read_checkpoint,
    read_values,
    save_checkpoint,
)
from clusterguard.training._descriptions import describe, describe_detector, describe_options, digest_of_weights
from clusterguard.training._engine import TrainingEngine
from clusterguard.training._options import TrainingOptions
from clusterguard.training._overfitting import LastGood
from clusterguard.training._replay import Run
from clusterguard.training._validation import Best
from torch import Tensor


class Trainer(Protocol):
    """The state of a trainer that a checkpoint keeps, and what tells one run from another."""

    detector: DetectorModule
    calibrator: Calibrator
    options: TrainingOptions
    thresholds: Tensor
    history: list[EpochRecord]
    _totals: EpochTotals
    _best: Best
    _last_good: LastGood
    _described_at_first: dict[str, str]
    _first_weights: str
    _descriptions: list[dict[str, str]]

    @property
    def engine(self) -> TrainingEngine:
        """The engine that takes the steps."""
        ...

    def defining_options(self) -> Mapping[str, Any]:
        """What a trainer adds to the description of a run."""
        ...


def save(trainer: Trainer, run: Run) -> None:
    """Write the checkpoint, if there is to be one."""
    if run.checkpoint is None:
        return
    accelerator = trainer.engine.accelerator
    kept = trainer.engine.kept.changed(trainer.engine.kept.get())
    state = run.state_dict(trainer.engine.device) | {"totals": asdict(trainer._totals), "detector": kept}
    values = {
        "thresholds": trainer.thresholds,
        "history": [asdict(record) for record in trainer.history],
        "steps": trainer.engine.steps,
        "precision": trainer.engine.precision.name,
        "descriptions": trainer._descriptions,
        "image_shape": trainer.detector.image_shape,
        "best": vars(trainer._best),
        "last_good": vars(trainer._last_good),
        "first_weights": trainer._first_weights,
        "processes": gather({accelerator.process_index: state}, trainer.engine.shared),
    }
    if accelerator.is_main_process:
        save_checkpoint(run.checkpoint, parts=trainer.engine.parts, values=values)
    accelerator.wait_for_everyone()


def resume(trainer: Trainer, run: Run) -> bool:
    """Restore the checkpoint, and return whether there was one."""
    if run.checkpoint is None:
        return False
    accelerator = trainer.engine.accelerator
    weights = digest_of_weights(trainer.detector.state_dict())
    if not trainer._first_weights:  # a later call of fit goes on from other weights
        trainer._first_weights = weights
        trainer._described_at_first |= describe_detector(trainer.detector)
    trainer._descriptions = gather({accelerator.process_index: _describe(trainer, run)}, trainer.engine.shared)
    checkpoint = read_checkpoint(run.checkpoint)
    if checkpoint is None:
        return False
    precision, like = trainer.engine.precision.name, trainer.thresholds
    kept = read_values(checkpoint, accelerator, trainer._descriptions, precision=precision, like=like)
    state = kept.state
    with checkpoint.restored(trainer.engine.parts):
        if "detector" in state:
            trainer.engine.kept.set(state["detector"])
        run.load_state_dict(state, trainer.engine.device)
        if accelerator.num_processes == 1:  # or a pass would have to be ended
            run.train.look_back()
            run.calibration.look_back()
    trainer.thresholds, trainer.history, trainer._totals = kept.thresholds, kept.history, kept.totals
    trainer._best, trainer._last_good = kept.best, kept.last_good
    trainer.engine.steps, trainer.engine.precision.name = kept.steps, _precision_here(trainer, kept.precision)
    _warn_of_other_weights(checkpoint, {weights, trainer._first_weights})
    trainer._first_weights = checkpoint.values.get("first_weights", trainer._first_weights)
    trainer.detector.image_shape = trainer.detector.image_shape or kept.image_shape
    return True


def _precision_here(trainer: Trainer, before: Precision) -> Precision:
    """The precision in which a training goes on: the one before, or float32 if bfloat16 was chosen and is slow here.

    Warns:
        UserWarning: the precision changes.
    """
    if before != "bf16" or trainer.options.precision != "auto":
        return before
    engine = trainer.engine
    suits = gather({engine.accelerator.process_index: has_bfloat16(engine.device)}, engine.shared)
    if all(suits):
        return before
    warnings.warn(
        "the training goes on in float32: it chose bfloat16 where it began, and this device has no instructions for "
        "it. The weights will differ slightly from those of a training on one machine; the records of epochs say which "
        "precision was used",
        stacklevel=5,
    )
    return "float32"


def _warn_of_other_weights(checkpoint: Checkpoint, weights: set[str]) -> None:
    """Warn unless a run began from the weights that this one has, or the detector has its latest weights already."""
    before = checkpoint.values.get("first_weights")
    if before is None:
        warnings.warn(
            f"{checkpoint.file} was written by an older clusterguard, which kept no digests of images, labels, class "
            "names, first weights, and settings of layers; whether these are the same as before is not compared",
            stacklevel=5,
        )
    elif not weights & {before, digest_of_weights(checkpoint.states.get("guard", {}))}:
        warnings.warn(
            f"the training goes on from {checkpoint.file}, which began from other weights than this detector has. That "
            "is right if they were drawn at random; if they were trained, choose another file, or delete it to start "
            "anew",
            stacklevel=5,
        )


def _describe(trainer: Trainer, run: Run) -> dict[str, str]:
    """Describe the settings that a resumed run must share with this one."""
    described = {"trainer": type(trainer), **trainer.defining_options(), "calibrator": trainer.calibrator}
    options = describe_options(trainer.options, trainer.engine.accelerator.mixed_precision)
    names = trainer.detector.class_names
    named = {} if names is None else describe({"class names": names})
    return describe(described) | trainer._described_at_first | named | options | run.describe()
