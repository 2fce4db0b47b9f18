"""Takes a training back to its last good weights after catastrophic overfitting."""

from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from clusterguard.detectors import DetectorModule
from clusterguard.training._engine import TrainingEngine
from clusterguard.training._overfitting import LastGood, successes
from clusterguard.training._replay import Run
from clusterguard.training._validation import measure
from torch import Tensor


class CheckedForOverfitting(Protocol):
    """What the check needs of a trainer."""

    detector: DetectorModule
    thresholds: Tensor
    _last_good: LastGood

    @property
    def engine(self) -> TrainingEngine:
        """The engine that takes the steps."""
        ...


def undo_overfitting(trainer: CheckedForOverfitting, run: Run, epoch: int) -> dict[str, Any]:
    """Check the weights after an epoch, and go back to the last good ones if they have overfitted.

    Args:
        trainer: trainer whose epoch is over.
        run: run with the check.
        epoch: number of the epoch.

    Returns:
        The fields of the epoch's record by name; none if the run has no check.
    """
    check, held_out = run.overfitting, run.held_out
    if check is None or held_out is None:
        return {}
    with held_out.undisturbed():
        success = partial(successes, check, trainer.detector, trainer.thresholds)
        rate = measure(success, trainer.detector, held_out.loader, trainer.engine.shared)["success"]
    good = trainer._last_good
    if rate <= good.lowest + check.max_rise:
        trainer._last_good = replace(
            good,
            lowest=min(rate, good.lowest),
            epoch=epoch,
            snapshot=trainer.engine.snapshot(),
            thresholds=trainer.thresholds.to("cpu", copy=True),
        )
        return {"check_success_rate": rate}
    trainer._last_good = replace(
        good,
        step_factor=good.step_factor * check.step_factor,
        rate_factor=good.rate_factor * check.rate_factor,
    )
    trainer.engine.go_back(good.snapshot, rate_factor=trainer._last_good.rate_factor)
    if good.thresholds is not None:
        trainer.thresholds = good.thresholds.to(trainer.thresholds.device, copy=True)
    return {"check_success_rate": rate, "returned_to": good.epoch}
