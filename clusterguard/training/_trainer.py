"""The base class of trainers, with epochs, records, checkpoints and the calibration at the end."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from clusterguard._support import (
    check_images,
    check_kind,
    check_labels,
    check_numbers,
    gather,
    names_in_eval_mode,
    only_writer,
    to_eval_mode,
    training_mode,
)
from clusterguard.detection import Calibrator, Loader, Unpack, Verdicts, decide
from clusterguard.detection._internal import (
    check_loader,
    learn_class_names,
    set_epoch,
    without_autocast,
)
from clusterguard.detectors import DetectorModule
from clusterguard.errors import (
    ConfigurationError,
    InputError,
    TooFewCalibrationExamplesError,
    TrainingStoppedError,
)
from clusterguard.training._checkpoints import EpochRecord, EpochTotals
from clusterguard.training._descriptions import describe_steps
from clusterguard.training._engine import TrainingEngine
from clusterguard.training._optimizers import OptimizerOrFactory, SchedulerOrFactory, make_optimizer, make_scheduler
from clusterguard.training._options import TrainingOptions
from clusterguard.training._overfitting import LastGood, OverfittingCheck
from clusterguard.training._overlap import Overlap
from clusterguard.training._preparing import check_run, make_run
from clusterguard.training._replay import Run, warn_of_shared_images
from clusterguard.training._reporting import Reporter
from clusterguard.training._resuming import resume, save
from clusterguard.training._step import TrainingStep
from clusterguard.training._undoing import undo_overfitting
from clusterguard.training._validation import Best, Validation, check_validation, measure
from clusterguard.training._weights import frozen_modules
from torch import Generator, Tensor
from torch.optim import Optimizer


class DetectorTrainer(ABC):
    """Trains a detector and then calibrates it; a subclass defines the loss of a batch in `training_step`.

    Args:
        detector: detector to train, in place and on its own device.
        optimizer: optimizer of ``detector.parameters()``, or a function that makes one from the detector's parameters,
            such as ``lambda parameters: torch.optim.SGD(parameters, lr=0.1)``; None takes Adam with learning rate 1e-3.
        scheduler: scheduler of the optimizer, of torch or timm, or a function that makes one from the optimizer. It is
            stepped after every epoch, or as the options say. `ReduceLROnPlateau` gets the mean loss of each epoch.
        calibrator: calibrator that fits the final thresholds; None takes `Calibrator()`.
        options: options of the training steps, such as clipping, averaging, devices and processes; None takes
            `TrainingOptions()`.

    Attributes:
        optimizer: optimizer that takes the steps.
        scheduler: scheduler of the learning rate, or None.
        thresholds: (K,) thresholds in use during training, +inf at first.
        history: one record for each finished epoch.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector
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
        optimizer: OptimizerOrFactory | None = None,
        scheduler: SchedulerOrFactory | None = None,
        calibrator: Calibrator | None = None,
        options: TrainingOptions | None = None,
    ) -> None:
        self.detector = detector
        self.optimizer: Optimizer = make_optimizer(optimizer, detector)
        self.scheduler: Any = make_scheduler(scheduler, self.optimizer)
        self.calibrator = Calibrator() if calibrator is None else calibrator
        self.options = TrainingOptions() if options is None else options
        check_kind(self.calibrator, Calibrator, "calibrator", "a Calibrator, such as Calibrator(0.01)")
        check_kind(self.options, TrainingOptions, "options", "TrainingOptions(...)")
        self.thresholds = torch.full_like(detector.thresholds, torch.inf)
        self.history: list[EpochRecord] = []
        self._totals = EpochTotals()
        self._best, self._overlap, self._last_good = Best(), Overlap(), LastGood()
        self._batches: int | None = None
        self._noted: dict[str, float] = {}
        self._described_at_first = describe_steps(self.optimizer, self.scheduler)  # before the first step changes them
        self._first_weights = ""  # digest of the weights that checkpoints of this run began with
        self._descriptions: list[dict[str, str]] = []  # one description of this run for each process

    @abstractmethod
    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss of a batch.

        Args:
            images: (B, C, H, W) in [0, 1], on the detector's device.
            labels: class labels (B,).
            generator: randomness of the attack; None takes torch's global one.
        """

    def validate(self, images: Tensor, labels: Tensor, generator: Generator) -> Mapping[str, Tensor]:
        """The figures of validation images, by name; larger ones are better. It is called in eval mode.

        Args:
            images: (B, C, H, W) in [0, 1], on the detector's device.
            labels: class labels (B,).
            generator: randomness, the same in every epoch.

        Returns:
            A number or truth value (B,) of each image. The last figure decides which epoch is the best one, unless a
            `Validation` names another.
        """
        with torch.no_grad():
            verdicts = Verdicts(decide(self.detector.evidence(images), self.thresholds), labels)
        accepted = verdicts.is_correct & ~verdicts.detection.is_adversarial
        return {"accuracy": verdicts.is_correct, "accepted_accuracy": accepted}

    def seconds_ahead(self, epochs: int, images: Tensor, labels: Tensor, seconds: float) -> float:
        """The estimated seconds of the remaining epochs, if each had one step.

        Args:
            epochs: number of epochs that are left, with the present one.
            images: images (B, C, H, W) of the last step.
            labels: class labels (B,) of the last step.
            seconds: seconds that it took.
        """
        return epochs * seconds

    @property
    def step_factor(self) -> float:
        """The factor of the training attack's step size; below 1 after catastrophic overfitting.

        A trainer of your own with an attack multiplies its step size by it in `training_step`, for `OverfittingCheck`.
        """
        return self._last_good.step_factor

    @property
    def epochs_before_full_strength(self) -> float:
        """The number of first epochs that count neither as the best one nor for the patience of a `Validation`."""
        return 0

    def limit_weights(self) -> None:  # noqa: B027  # optional
        """A hook that is called after every optimizer step, before weights are averaged.

        Override it to move weights into a set that they must not leave. If the set is convex, averages stay in it.
        """

    def after_step(self, calibration_batches: Iterator[tuple[Tensor, Tensor]]) -> None:  # noqa: B027  # optional
        """A hook that is called after every optimizer step, with an endless iterator of calibration batches."""

    def defining_options(self) -> Mapping[str, Any]:
        """The options of a trainer that change weights. The base class has none.

        A checkpoint keeps a description of these options, and `fit` refuses a checkpoint of a training with other ones.
        Override this method if your trainer's `__init__` takes options.

        Returns:
            Numbers, strings, dataclasses, functions or objects by name. Functions, and objects without a readable
            `repr`, are compared by their names only.

        Example:
            >>> from clusterguard import PGD, AdversarialClusterTrainer, ClusterGuard
            >>> guard = ClusterGuard(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), 2)
            >>> trainer = AdversarialClusterTrainer(guard, PGD(eps=0.1, step_size=0.05), warmup_epochs=3)
            >>> trainer.defining_options()["warmup_epochs"]
            3
        """
        return {}

    def note(self, values: Mapping[str, float]) -> None:
        """Send values, numbers by name, to the trackers with the next report."""
        self._noted |= values

    @property
    def epochs_done(self) -> float:
        """The number of epochs so far, including a fraction of the present one if the loader's length is known."""
        return len(self.history) + (self._totals.steps / self._batches if self._batches else 0)

    @cached_property
    def engine(self) -> TrainingEngine:
        """The engine that takes the steps; it is made at its first use."""
        return TrainingEngine(
            self.detector,
            self.training_step,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            options=self.options,
            limit_weights=self.limit_weights,
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
        validation: Validation | None = None,
        overfitting: OverfittingCheck | None = None,
        unpack: Unpack | None = None,
        progress: bool = True,
    ) -> list[EpochRecord]:
        """Train the detector, then calibrate it.

        The detector is uncalibrated during training, and stays so if training fails. It is in train mode within epochs,
        and in eval mode afterwards, also if training fails. Modules that the detector's attribute `frozen` names stay
        in eval mode. If the detector is in train mode when `fit` is called, these are its modules that are in eval
        mode, such as a frozen BatchNorm. A module whose parameters are all frozen stays in eval mode too, with all
        modules in it, so that it does not change: neither running statistics nor spectral normalisation move, and
        dropout is off. A norm layer without parameters is frozen only as a part of such a module. Beside frozen layers
        its statistics move; `frozen` can name it. Equal seeds of torch's global generator, of the loaders and of
        `generator` give equal weights on the same machine. Several processes take the batches of the training loader
        in turn.

        Args:
            train_loader: batches of images (B, C, H, W) in [0, 1] and labels (B,), in any form that
                `clusterguard.detection.unpack_batch` knows. The loader may be a stream. Samplers and data sets with a
                method `set_epoch` are told the number of each epoch.
            calibration_loader: batches in the same form, of images that are used neither for training nor for
                evaluation.
            epochs: total number of epochs, including those of a resumed checkpoint and of earlier calls.
            on_epoch_end: function to call with the record of each epoch, after the checkpoint is written.
            checkpoint: file to write after every epoch. If it exists, training resumes from it and ends with the same
                weights as without the interruption. The data, the generator's seed and all options that change weights
                must be the same as before; epochs, devices and callbacks need not be. The checkpoint before it is kept
                next to it under the suffix ``.previous``, and a file ``.lock`` keeps a second training from writing at
                the same time. Persistent workers of loaders are restarted for every pass, because their random states
                cannot be kept. Before training, the first batch of each loader is drawn twice, and four batches further
                on if the loader takes items by an index, to check that they can be repeated.
            checkpoint_every: number of optimizer steps between two further checkpoints; None writes them after epochs
                only.
            stop_when: function to call after every optimizer step. When it returns True in any process, the checkpoint
                is written and `TrainingStoppedError` ends the call; the same call of `fit` resumes the training. It is
                meant for time limits and for SIGTERM.
            generator: randomness of the attack; None takes torch's global one.
            calibrate: whether to fit thresholds at the end. If the calibration set is then too small, a warning is
                given and the trained detector stays uncalibrated.
            validation: images on which the detector is judged after every epoch; the best epoch is kept, and training
                can stop early. None keeps the last epoch.
            overfitting: check that undoes epochs with catastrophic overfitting; None undoes none.
            unpack: function that takes images and labels from a batch of another form, such as
                ``lambda batch: (batch["photo"], batch["species"])``.
            progress: whether to write a line after each epoch and an estimate of the time to stderr, with a bar on
                terminals and in notebooks. Logging that shows level INFO of "clusterguard" gets the lines instead.

        Returns:
            One record for each epoch.

        Raises:
            ConfigurationError: `epochs` or `checkpoint_every` is below 1; a loader allows one pass only, or cannot be
                split between processes; a detector to be calibrated gives the same image different evidence;
                the optimizer or the scheduler would change nothing, or has changed nothing at
                the end; nothing is trainable; no file can be written at the checkpoint's path; or `stop_when` comes
                without a checkpoint.
            PersistenceError: the checkpoint and the one before it are damaged or belong to another run, or another run
                writes the checkpoint at the moment; in these cases nothing has changed. Or the checkpoint could not
                be written.
            InputError: images or labels have a wrong form, shape, dtype or range.
            TooFewCalibrationExamplesError: the calibration set is certainly too small; this is found before training.
            TrainingDivergedError: the loss became NaN or infinite; the detector holds the last good weights.
            TrainingStoppedError: `stop_when` returned True, and the checkpoint is written.

        Warns:
            UserWarning: the checkpoint began from other weights; calibration images are also trained on; the optimizer
                lacks parameters; the first epoch has changed no weight; a loader has randomness that no checkpoint can
                keep; or a batch of one image meets batch normalisation.
        """
        check_numbers(whole=True, epochs=epochs)
        if epochs < 1:
            raise ConfigurationError(f"expected at least 1 epoch, got {epochs}")
        check_loader(train_loader, "training loader")
        check_loader(calibration_loader, "calibration loader")
        check_validation(validation)
        if overfitting is not None:
            check_kind(overfitting, OverfittingCheck, "overfitting", "an OverfittingCheck(loader, attack)")
        if generator is not None:
            check_kind(generator, Generator, "generator", "a torch.Generator, such as torch.Generator().manual_seed(0)")
        with torch.inference_mode(False), torch.enable_grad(), without_autocast():
            run = make_run(
                train_loader,
                calibration_loader,
                validation,
                overfitting,
                engine=self.engine,
                unpack=unpack,
                generator=generator,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                stop_when=stop_when,
            )
            judged = None if validation is None else validation.loader
            is_told = warn_of_shared_images(train_loader, calibration_loader if calibrate else None, judged)
            learn_class_names(self.detector, train_loader)
            check_run(self, run, epochs, calibrate)
            if is_told:
                self._overlap.forget()
            reporter = Reporter(epochs, progress=progress, is_main=self.engine.accelerator.is_main_process)
            with only_writer(checkpoint, self.engine.shared):
                self._begin(run)
                try:
                    self._train(run, reporter, on_epoch_end)
                finally:
                    self.engine.precision.restore()
                self.engine.finish(self._best.weights)
                if calibrate:
                    self._calibrate(run, progress)
        return self.history

    def _train(self, run: Run, reporter: Reporter, on_epoch_end: Callable[[EpochRecord], None] | None) -> None:
        while len(self.history) < reporter.epochs and not self._is_over(run):
            frozen = self.detector.frozen | frozen_modules(self.detector)
            with training_mode(self.detector, frozen=frozen):
                is_stopped = self._finish_epoch(run, reporter)
            self._end_epoch(run, reporter)
            if on_epoch_end is not None:
                on_epoch_end(self.history[-1])
            if is_stopped:
                raise self._stopped(run)

    def _begin(self, run: Run) -> None:
        """Resume from the checkpoint if there is one, or begin anew."""
        self.thresholds = self.thresholds.to(self.engine.device, copy=True)
        if run.validation is None or run.validation.monitor not in (None, self._best.monitor):
            self._best = Best()  # an earlier call may have judged by something else
        if not resume(self, run):
            self._totals = EpochTotals()  # an earlier call may have left an unfinished epoch
        self.engine.begin()
        self.engine.rate_factor = self._last_good.rate_factor
        self.detector.reset_calibration()
        if self.detector.training:
            self.detector.frozen = names_in_eval_mode(self.detector)
        to_eval_mode(self.detector)

    def _finish_epoch(self, run: Run, reporter: Reporter) -> bool:
        """Train until the present epoch ends, and return whether to stop then."""
        totals, started = self._totals, time.perf_counter() - self._totals.seconds
        calibration_batches = run.calibration.forever()
        self._batches = run.train.length
        if not run.train.taken:
            set_epoch(run.train.loader, len(self.history))
        bar = reporter.bar(run.train, len(self.history) + 1)
        step, count = None, 0
        for batch, labels in bar:
            images = self.engine.augment(batch)
            check_images(images)
            labels = labels.to(images.device) if images is not batch and isinstance(labels, Tensor) else labels
            check_labels(labels, images, self.detector.num_classes)
            if not len(labels):
                continue
            self.detector.learn_image_shape(images)
            self._overlap.compare(images)
            step, is_whole = self.engine.take_step(images, labels, generator=run.generator)
            count = len(labels)
            totals.add(step.loss, count, step.correct, step.successes)
            totals.seconds = time.perf_counter() - started
            left = reporter.epochs - len(self.history)
            reporter.step(self._batches, partial(self.seconds_ahead, left, images, labels))
            if is_whole:
                self.after_step(calibration_batches)
                self._report(step, count)
                is_stopped = self._is_stopped(run)
                if is_stopped or (run.checkpoint_every is not None and self.engine.steps % run.checkpoint_every == 0):
                    save(self, run)
                if is_stopped:
                    raise self._stopped(run)
            if not bar.disable:
                record = totals.record(len(self.history) + 1, float(self.thresholds.mean()))
                attack, tau = f"{record.attack_success_rate:.2f}", f"{record.mean_threshold:.2f}"
                bar.set_postfix(loss=f"{record.loss:.2f}", attack=attack, tau=tau, refresh=False)
        if step is None and not totals.images:
            if self.history:
                raise InputError(
                    "expected a training loader that can be iterated repeatedly, got none of its images in epoch "
                    f"{len(self.history) + 1}; let its __iter__ begin anew each time, or pass a list of the batches"
                )
            raise InputError("expected a training loader with at least one image, got an empty one")
        if not self.engine.apply_gradients() or step is None:
            return False
        # This was the step of a smaller last group. The loader has ended its pass, so no checkpoint within the epoch
        # can follow, only that of the whole epoch.
        self.after_step(calibration_batches)
        self._report(step, count)
        return self._is_stopped(run)

    def _stopped(self, run: Run) -> TrainingStoppedError:
        steps = self.engine.steps
        return TrainingStoppedError(
            f"stopped by stop_when after {steps} steps; fit with checkpoint {run.checkpoint} goes on from there"
        )

    def _end_epoch(self, run: Run, reporter: Reporter) -> None:
        epochs, started = len(self.history) + 1, time.perf_counter()
        record = self.engine.end_epoch(self._totals, epochs).record(epochs, float(self.thresholds.mean()))
        undone = undo_overfitting(self, run, epochs)
        record = replace(record, precision=self.engine.precision.in_use, validation=self._judge(run, epochs), **undone)
        self.history.append(record)
        self._overlap.warn()
        self._totals = EpochTotals()
        run.calibration.rewind()
        save(self, run)
        self.engine.report_epoch(record)
        seconds = (record.seconds + time.perf_counter() - started) * (reporter.epochs - epochs)
        is_typical = epochs > self.epochs_before_full_strength or not self.epochs_before_full_strength
        reporter.epoch(record, is_best=self._best.epoch == epochs, seconds=seconds if is_typical else None)

    def _judge(self, run: Run, epochs: int) -> dict[str, float]:
        """The figures of the validation images after an epoch, whose detector is kept if it is the best so far."""
        if run.judged is None or run.validation is None:
            return {}
        with run.judged.undisturbed(), self.engine.delivered():
            figures = measure(self.validate, self.detector, run.judged.loader, self.engine.shared)
            if epochs > self.epochs_before_full_strength:
                self._best.take(run.validation, figures, epochs, self.detector)
        return figures

    def _is_over(self, run: Run) -> bool:
        """Whether the validation images have told for long enough that nothing improves."""
        first = self.epochs_before_full_strength
        return run.validation is not None and self._best.is_over(run.validation, len(self.history), first)

    def _calibrate(self, run: Run, progress: bool) -> None:
        loader, accelerator = run.calibration.loader, self.engine.shared
        try:
            with run.calibration.undisturbed():  # a further call of fit must train as without this calibration
                self.calibrator.fit(self.detector, loader, accelerator=accelerator, progress=progress)
        except TooFewCalibrationExamplesError as error:
            warnings.warn(f"trained, but not calibrated: {error}", stacklevel=3)

    def _is_stopped(self, run: Run) -> bool:
        """Whether `stop_when` is true in any process; all processes get the same answer."""
        if run.stop_when is None:
            return False
        return any(gather({self.engine.accelerator.process_index: run.stop_when()}, self.engine.shared))

    def _report(self, step: TrainingStep, images: int) -> None:
        if not self.engine.is_reporting:
            return
        measured = {"loss": step.loss, "accuracy": step.correct / images, **(step.terms or {})}
        if step.successes is not None:
            measured["attack_success_rate"] = step.successes / images
        values = {name: value.item() for name, value in measured.items()}
        names = self.detector.class_names or range(self.detector.num_classes)
        values |= {f"threshold/{name}": value for name, value in zip(names, self.thresholds.tolist(), strict=True)}
        values["images_per_second"] = self._totals.images / self._totals.seconds
        self.engine.report(values | self._noted)
        self._noted = {}
