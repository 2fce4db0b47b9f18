"""What every training of a detector shares: epochs, records, checkpoints, and the way back when a loss explodes."""

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from clusterguard.calibration import Calibrator
from clusterguard.checkpoints import EpochRecord, Stateful, load_checkpoint, save_checkpoint
from clusterguard.checks import check_images, check_labels
from clusterguard.detector import DetectorModule, Loader
from clusterguard.errors import ConfigurationError, InputError, TooFewCalibrationExamplesError, TrainingDivergedError
from torch import Generator, Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm


class TrainingStep(NamedTuple):
    """What one batch gave.

    Attributes:
        loss: a scalar, to be minimised.
        correct: how many images of the batch were labelled rightly, (); benign ones where they are looked at.
        successes: how many training attacks got through, (); None if there was no attack.
    """

    loss: Tensor
    correct: Tensor
    successes: Tensor | None = None


class DetectorTrainer(ABC):
    """Trains a detector, then calibrates it; write `training_step`, the loss of a batch.

    Args:
        detector: trained in place, on its own device.
        optimizer: of the detector's parameters; None takes Adam with learning rate 1e-3.
        scheduler: stepped after every epoch.
        calibrator: fits the final thresholds; None takes `Calibrator()`.

    Attributes:
        thresholds: (K,) those in use while training, +inf at first.
        history: one record per epoch that is done.

    Example:
        >>> from clusterguard import ConfidenceDetector
        >>> from torch.nn.functional import cross_entropy
        >>> class Plain(DetectorTrainer):
        ...     def training_step(self, images, labels, generator):
        ...         logits = self.detector(images)
        ...         return TrainingStep(cross_entropy(logits, labels), (logits.argmax(1) == labels).sum())
        >>> detector = ConfidenceDetector(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), 2)
        >>> batches = [(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)]
        >>> history = Plain(detector).fit(batches, batches, epochs=2, calibrate=False, progress=False)
        >>> [record.epoch for record in history]
        [1, 2]
    """

    def __init__(
        self,
        detector: DetectorModule,
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        calibrator: Calibrator | None = None,
    ) -> None:
        self.detector = detector
        self.optimizer = Adam(detector.parameters(), lr=1e-3) if optimizer is None else optimizer
        self.scheduler = scheduler
        self.calibrator = Calibrator() if calibrator is None else calibrator
        self.thresholds = torch.full_like(detector.thresholds, torch.inf)
        self.history: list[EpochRecord] = []
        self._steps = 0
        self._last_good: tuple[int, dict[str, Tensor]] = (0, {})

    @abstractmethod
    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss of a batch of images (B, C, H, W) and labels (B,), on the detector's device."""

    def after_step(self, calibration_batches: Iterator[tuple[Tensor, Tensor]]) -> None:  # noqa: B027  # may be left out
        """Called after every step of the optimizer, with an endless supply of calibration batches."""

    def fit(
        self,
        train_loader: Loader,
        calibration_loader: Loader,
        *,
        epochs: int,
        on_epoch_end: Callable[[EpochRecord], None] | None = None,
        checkpoint: str | Path | None = None,
        generator: Generator | None = None,
        calibrate: bool = True,
        progress: bool = True,
    ) -> list[EpochRecord]:
        """Train, then calibrate.

        The detector counts as uncalibrated until the end, and stays so if training fails. A detector in eval mode is
        put into train mode meanwhile; in one in train mode, modules that you have put into eval mode, such as a frozen
        BatchNorm, stay there. Equal seeds of torch's global generator, of the loaders and of `generator` give equal
        weights on the same machine.

        Args:
            train_loader: batches of images (B, C, H, W) in [0, 1] and labels (B,).
            calibration_loader: the same, of images kept out of training and of evaluation.
            epochs: how many there shall be in all, those of a resumed checkpoint included.
            on_epoch_end: called after every epoch with its record, when the checkpoint has been written.
            checkpoint: a file written after every epoch; if it exists, training goes on from it.
            generator: the attack's randomness; None takes torch's global one.
            calibrate: fit thresholds at the end. Where the calibration set turns out too small, a warning says so
                and the trained detector stays uncalibrated.
            progress: show a progress bar.

        Returns:
            One record per epoch.

        Raises:
            ConfigurationError: fewer than one epoch.
            InputError: images or labels of a wrong shape, dtype or range.
            TooFewCalibrationExamplesError: before training, if the calibration set can't suffice.
            TrainingDivergedError: the loss became NaN or infinite; the detector holds the last good weights.
        """
        if epochs < 1:
            raise ConfigurationError(f"expected at least 1 epoch, got {epochs}")
        if calibrate:
            self.calibrator.check_counts(calibration_loader, self.detector.num_classes)
        self.detector.reset_calibration()
        was_training = self.detector.training
        if not was_training:
            self.detector.train()
        generators = {"attack": generator, "loader": getattr(train_loader, "generator", None)}
        if checkpoint is not None and Path(checkpoint).exists():
            self._resume(checkpoint, generators)
        while len(self.history) < epochs:
            record = self._run_epoch(epochs, train_loader, calibration_loader, generator, progress)
            self.history.append(record)
            if self.scheduler is not None:
                self.scheduler.step()
            if checkpoint is not None:
                self._save(checkpoint, generators)
            if on_epoch_end is not None:
                on_epoch_end(record)
        if not was_training:
            self.detector.eval()
        if calibrate:
            try:
                self.calibrator.fit(self.detector, calibration_loader, progress=progress)
            except TooFewCalibrationExamplesError as error:
                warnings.warn(f"trained, but not calibrated: {error}", stacklevel=2)
        return self.history

    def _resume(self, checkpoint: str | Path, generators: dict[str, Generator | None]) -> None:
        values = load_checkpoint(checkpoint, parts=self._parts, generators=generators)
        self.thresholds = values["thresholds"].to(self.thresholds.device)
        self.history = [EpochRecord(**record) for record in values["history"]]
        self._steps = values["steps"]

    def _save(self, checkpoint: str | Path, generators: dict[str, Generator | None]) -> None:
        history = [asdict(record) for record in self.history]
        values = {"thresholds": self.thresholds, "history": history, "steps": self._steps}
        save_checkpoint(checkpoint, parts=self._parts, generators=generators, values=values)

    @property
    def _parts(self) -> dict[str, Stateful | None]:
        return {"guard": self.detector, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def _run_epoch(
        self,
        epochs: int,
        train_loader: Loader,
        calibration_loader: Loader,
        generator: Generator | None,
        progress: bool,
    ) -> EpochRecord:
        epoch = len(self.history) + 1
        started = time.perf_counter()
        calibration_batches = _forever(calibration_loader)
        losses, seen, attacked, correct, successes = [], 0, 0, 0, 0
        bar = tqdm(train_loader, desc=f"epoch {epoch}/{epochs}", disable=not progress, leave=False)
        for images, labels in bar:
            check_images(images)
            check_labels(labels, images, self.detector.num_classes)
            device = self.detector.thresholds.device
            step = self.training_step(images.to(device), labels.to(device), generator)
            self._descend(step.loss)
            losses.append(step.loss.item())
            seen, correct = seen + len(labels), correct + int(step.correct)
            if step.successes is not None:
                attacked, successes = attacked + len(labels), successes + int(step.successes)
            self.after_step(calibration_batches)
            bar.set_postfix(
                loss=f"{losses[-1]:.2f}",
                attack=f"{successes / max(1, attacked):.2f}",
                tau=f"{self.thresholds.mean():.2f}",
            )
        return EpochRecord(
            epoch=epoch,
            loss=sum(losses) / len(losses),
            accuracy=correct / seen,
            attack_success_rate=successes / attacked if attacked else math.nan,
            mean_threshold=float(self.thresholds.mean()),
            seconds=time.perf_counter() - started,
        )

    def _descend(self, loss: Tensor) -> None:
        self._check_loss(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._steps += 1

    def _check_loss(self, loss: Tensor) -> None:
        """A finite loss vouches for the weights that made it: remember them now and then; else go back to them."""
        if loss.isfinite():
            if self._steps % 10 == 0:
                state = self.detector.state_dict()
                self._last_good = self._steps, {name: value.clone() for name, value in state.items()}
            return
        step, weights = self._last_good
        self.detector.load_state_dict(weights)
        raise TrainingDivergedError(
            f"the loss became {loss.item()} at step {self._steps} (epoch {len(self.history) + 1}); the detector holds "
            f"the weights of step {step} again. Lower the learning rate, or train with fewer or smaller attack steps "
            "first"
        )


def _forever(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        count = 0
        for batch in loader:
            count += 1
            yield batch
        if not count:
            raise InputError("expected a calibration loader with at least one batch, got an empty one")
