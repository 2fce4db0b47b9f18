"""What every training of a detector shares: epochs, records, checkpoints, calibration at the end."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from clusterguard.calibration import Calibrator
from clusterguard.checkpoints import EpochRecord, EpochTotals, read_checkpoint, save_checkpoint
from clusterguard.checks import check_images, check_labels
from clusterguard.detector import DetectorModule, Loader
from clusterguard.errors import (
    ConfigurationError,
    InputError,
    PersistenceError,
    TooFewCalibrationExamplesError,
    TrainingStoppedError,
)
from clusterguard.modes import names_in_eval_mode, to_eval_mode, training_mode
from clusterguard.processes import collect
from clusterguard.replay import Replay, Run
from clusterguard.training_engine import TrainingEngine, TrainingStep
from clusterguard.training_options import TrainingOptions
from torch import Generator, Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm


class DetectorTrainer(ABC):
    """Trains a detector, then calibrates it; write `training_step`, the loss of a batch.

    Args:
        detector: trained in place, on its own device.
        optimizer: of the detector's parameters; None takes Adam with learning rate 1e-3.
        scheduler: stepped after every epoch, or as the options say.
        calibrator: fits the final thresholds; None takes `Calibrator()`.
        options: how steps are taken: clipping, averaging, devices and processes; None takes `TrainingOptions()`.

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
        options: TrainingOptions | None = None,
    ) -> None:
        self.detector = detector
        self.optimizer = Adam(detector.parameters(), lr=1e-3) if optimizer is None else optimizer
        self.scheduler = scheduler
        self.calibrator = Calibrator() if calibrator is None else calibrator
        self.options = TrainingOptions() if options is None else options
        self.thresholds = torch.full_like(detector.thresholds, torch.inf)
        self.history: list[EpochRecord] = []
        self._totals = EpochTotals()
        self._batches: int | None = None
        self._noted: dict[str, float] = {}

    @abstractmethod
    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss of a batch.

        Args:
            images: (B, C, H, W) in [0, 1], on the detector's device.
            labels: (B,).
            generator: the attack's randomness; None takes torch's global one.
        """

    def after_step(self, calibration_batches: Iterator[tuple[Tensor, Tensor]]) -> None:  # noqa: B027  # may be left out
        """Called after every step of the optimizer, with an endless supply of calibration batches."""

    def note(self, values: Mapping[str, float]) -> None:
        """Hand values, numbers by name, to the trackers with the next report."""
        self._noted |= values

    @property
    def epochs_done(self) -> float:
        """Epochs so far; the present one counts in part where the loader tells its length."""
        return len(self.history) + (self._totals.steps / self._batches if self._batches else 0)

    @cached_property
    def engine(self) -> TrainingEngine:
        """What takes the steps; made when it is first needed."""
        return TrainingEngine(
            self.detector,
            self.training_step,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            options=self.options,
        )

    def fit(
        self,
        train_loader: Loader,
        calibration_loader: Loader,
        *,
        epochs: int,
        on_epoch_end: Callable[[EpochRecord], None] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        stop_when: Callable[[], bool] | None = None,
        generator: Generator | None = None,
        calibrate: bool = True,
        progress: bool = True,
    ) -> list[EpochRecord]:
        """Train, then calibrate.

        The detector counts as uncalibrated until the end, and stays so if training fails. It is in train mode within
        epochs and in eval mode afterwards, also if training fails. Modules that its attribute `frozen` names stay in
        eval mode; in a detector that you hand over in train mode, these are the ones you have put into eval mode, such
        as a frozen BatchNorm. Equal seeds of torch's global generator, of the loaders and of `generator` give equal
        weights on the same machine. With several processes, batches of the training loader are dealt out in turn.

        Args:
            train_loader: batches of images (B, C, H, W) in [0, 1] and labels (B,).
            calibration_loader: the same, of images kept out of training and of evaluation.
            epochs: how many there shall be in all, those of a resumed checkpoint included.
            on_epoch_end: called after every epoch with its record, when the checkpoint has been written.
            checkpoint: a file written after every epoch; if it exists, training goes on from it, to the same weights
                as without the interruption. The one before it is kept beside it, as ``.previous``.
            checkpoint_every: steps of the optimizer after which it is written too; None writes it after epochs only.
            stop_when: asked after every step of the optimizer; once any process says yes, the checkpoint is written and
                `TrainingStoppedError` ends the call. The same call goes on. For limits of time, and for SIGTERM.
            generator: the attack's randomness; None takes torch's global one.
            calibrate: fit thresholds at the end. Where the calibration set turns out too small, a warning says so
                and the trained detector stays uncalibrated.
            progress: show a progress bar.

        Returns:
            One record per epoch.

        Raises:
            ConfigurationError: fewer than one epoch or step, a training loader that processes cannot share, or
                `stop_when` without a checkpoint.
            PersistenceError: the checkpoint and the one before it are damaged, or another run's; nothing has changed.
            InputError: images or labels of a wrong shape, dtype or range.
            TooFewCalibrationExamplesError: before training, if the calibration set can't suffice.
            TrainingDivergedError: the loss became NaN or infinite; the detector holds the last good weights.
            TrainingStoppedError: `stop_when` said so, and the checkpoint is written.
        """
        if epochs < 1:
            raise ConfigurationError(f"expected at least 1 epoch, got {epochs}")
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ConfigurationError(f"expected checkpoint_every of at least 1 step, got {checkpoint_every}")
        if stop_when is not None and checkpoint is None:
            raise ConfigurationError("expected a checkpoint with stop_when, or what is stopped would be lost, got none")
        if calibrate:
            self.calibrator.check_counts(calibration_loader, self.detector.num_classes)
        train = Replay(self.engine.share(train_loader), self.engine.device)
        calibration = Replay(calibration_loader, self.engine.device)
        run = Run(train, calibration, generator, checkpoint, checkpoint_every, stop_when)
        self.thresholds = self.thresholds.to(self.engine.device)
        self._resume(run)
        self.detector.reset_calibration()
        if self.detector.training:
            self.detector.frozen = names_in_eval_mode(self.detector)
        to_eval_mode(self.detector)
        while len(self.history) < epochs:
            with training_mode(self.detector, frozen=self.detector.frozen):
                self._finish_epoch(run, f"epoch {len(self.history) + 1}/{epochs}" if progress else "")
            if not self._totals.images:
                raise InputError("expected a training loader with at least one image, got an empty one")
            record = self.engine.end_epoch(self._totals).record(len(self.history) + 1, float(self.thresholds.mean()))
            self.history.append(record)
            self._totals = EpochTotals()
            run.calibration.rewind()
            self._save(run)
            if on_epoch_end is not None:
                on_epoch_end(record)
        self.engine.finish()
        if calibrate:
            try:
                accelerator = self.engine.accelerator
                self.calibrator.fit(self.detector, calibration_loader, accelerator=accelerator, progress=progress)
            except TooFewCalibrationExamplesError as error:
                warnings.warn(f"trained, but not calibrated: {error}", stacklevel=2)
        return self.history

    def _finish_epoch(self, run: Run, title: str) -> None:
        """Go on with the present epoch to its end."""
        totals, started = self._totals, time.perf_counter() - self._totals.seconds
        calibration_batches = run.calibration.forever()
        self._batches = run.train.length
        bar = tqdm(
            run.train,
            desc=title,
            total=self._batches,
            initial=run.train.taken,
            disable=not title,
            leave=False,
            mininterval=0.5,
        )
        for images, labels in bar:
            check_images(images)
            check_labels(labels, images, self.detector.num_classes)
            self.detector.learn_image_shape(images)
            step, is_whole = self.engine.take_step(images, labels, generator=run.generator)
            totals.add(step.loss, len(labels), step.correct, step.successes)
            totals.seconds = time.perf_counter() - started
            if is_whole:
                self.after_step(calibration_batches)
                self._report(step, len(labels))
                stopped = self._is_stopped(run)
                if stopped or (run.checkpoint_every is not None and self.engine.steps % run.checkpoint_every == 0):
                    self._save(run)
                if stopped:
                    raise TrainingStoppedError(
                        f"stopped, as asked, after {self.engine.steps} steps; fit with {run.checkpoint} goes on"
                    )
            if title:
                record = totals.record(len(self.history) + 1, float(self.thresholds.mean()))
                attack, tau = f"{record.attack_success_rate:.2f}", f"{record.mean_threshold:.2f}"
                bar.set_postfix(loss=f"{record.loss:.2f}", attack=attack, tau=tau, refresh=False)

    def _is_stopped(self, run: Run) -> bool:
        """Whether any process is asked to stop; all of them then do."""
        if run.stop_when is None:
            return False
        accelerator = self.engine.accelerator
        return any(collect({accelerator.process_index: run.stop_when()}, accelerator))

    def _report(self, step: TrainingStep, images: int) -> None:
        if not self.engine.is_reporting:
            return
        measured = {"loss": step.loss, "accuracy": step.correct / images, **(step.terms or {})}
        if step.successes is not None:
            measured["attack_success_rate"] = step.successes / images
        values = {name: value.item() for name, value in measured.items()}
        values |= {f"threshold/{index}": value for index, value in enumerate(self.thresholds.tolist())}
        values["images_per_second"] = self._totals.images / self._totals.seconds
        self.engine.report(values | self._noted)
        self._noted = {}

    def _save(self, run: Run) -> None:
        if run.checkpoint is None:
            return
        accelerator = self.engine.accelerator
        own = {accelerator.process_index: run.state_dict(self.engine.device) | {"totals": asdict(self._totals)}}
        values = {
            "thresholds": self.thresholds,
            "history": [asdict(record) for record in self.history],
            "steps": self.engine.steps,
            "image_shape": self.detector.image_shape,
            "processes": collect(own, accelerator),
        }
        if accelerator.is_main_process:
            save_checkpoint(run.checkpoint, parts=self.engine.parts, values=values)
        accelerator.wait_for_everyone()

    def _resume(self, run: Run) -> None:
        checkpoint = None if run.checkpoint is None else read_checkpoint(run.checkpoint)
        if checkpoint is None:
            return
        accelerator, values = self.engine.accelerator, checkpoint.values
        if len(values["processes"]) != accelerator.num_processes:
            raise PersistenceError(
                f"{checkpoint.file} was written by {len(values['processes'])} processes; go on with as many, "
                f"not with {accelerator.num_processes}"
            )
        own = values["processes"][accelerator.process_index]
        with checkpoint.restored(self.engine.parts):
            run.load_state_dict(own, self.engine.device)
        self.thresholds = values["thresholds"].to(self.engine.device)
        self.history = [EpochRecord(**record) for record in values["history"]]
        self.engine.steps = values["steps"]
        self.detector.image_shape = self.detector.image_shape or values.get("image_shape")
        self._totals = EpochTotals(**own["totals"])
