"""The paper's training algorithm: attack the current guard, relabel the successful attacks, fit the clusters."""

import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, final

import torch
from clusterguard._support import check_numbers, evaluation_mode, random_states, set_random_states
from clusterguard.attacks import Attack, ramp, shorten_steps
from clusterguard.attacks._internal import check_radius, scale
from clusterguard.detection import (
    Calibrator,
    Loader,
    Verdicts,
    decide,
    false_positive_rate,
    fit_thresholds,
    is_broken,
    judge,
)
from clusterguard.detectors import ClusterGuard, WithThresholds
from clusterguard.errors import ConfigurationError, TooFewCalibrationExamplesError
from clusterguard.training._losses import ClusterLoss, RelabelledBatch, counts_of
from clusterguard.training._optimizers import OptimizerOrFactory, SchedulerOrFactory
from clusterguard.training._options import TrainingOptions
from clusterguard.training._relabelling import Relabel, Separate
from clusterguard.training._step import TrainingStep
from clusterguard.training._trainer import DetectorTrainer
from torch import Generator, Tensor


@final
class AdversarialClusterTrainer(DetectorTrainer):
    """Trains a guard to put benign classes and adversarial images into separate clusters.

    Each step attacks a batch with the current guard in eval mode and relabels the attacked images. An attacked image
    gets through if the guard accepts it under a wrong label; it then belongs to the adversarial cluster, and otherwise
    to its original class. The step ends with one optimizer step on benign and attacked images together.

    Args:
        guard: guard to train, in place and on its own device.
        attack: training attack, such as ``PGD(norm="linf", eps=0.3, step_size=0.01, steps=40, keep="last")``.
        optimizer: optimizer of ``guard.parameters()``, or a function that makes one from the guard's parameters, such
            as ``lambda parameters: torch.optim.SGD(parameters, lr=0.1)``; None takes Adam with learning rate 1e-3.
        scheduler: scheduler of the optimizer, or a function that makes one from it; see `DetectorTrainer`.
        warmup_epochs: number of first epochs on benign images alone (equations 9 and 10).
        loss: loss to minimise, see `ClusterLoss`; None takes the paper's.
        relabel: rule that says which cluster attacked images belong to: `Separate()`, the paper's method, `Graded()`,
            or `Original()`, the paper's ablation L-Ben; None takes the paper's method.
        ramp_epochs: number of epochs after the warm-up over which the attack's radius and steps grow to full length.
        refresh_every: number of steps between refreshes of the thresholds that decide which attacked images get
            through. They are +inf before the first refresh, so every misclassified image then gets through.
        refresh_batches: number of calibration batches that each refresh uses, taken in turn.
        calibrator: calibrator that fits the final thresholds; its false-positive rate also holds for the refreshes.
        options: options of the training steps, such as clipping, averaging, devices and processes; None takes
            `TrainingOptions()`.

    Raises:
        ConfigurationError: an option is out of its range, or the attack lacks what an option needs, such as a radius.

    Reference:
        arXiv 2012.03483, section 3.3 and algorithm 1.

    Example:
        >>> from clusterguard import PGD
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> loader = DataLoader(TensorDataset(torch.rand(64, 1, 4, 4), torch.arange(64) % 2), batch_size=16)
        >>> trainer = AdversarialClusterTrainer(guard, PGD(eps=0.1, step_size=0.05, steps=2, keep="last"))
        >>> history = trainer.fit(loader, loader, epochs=2, calibrate=False, progress=False)
        >>> history[-1].loss < history[0].loss
        True
    """

    def __init__(
        self,
        guard: ClusterGuard,
        attack: Attack,
        *,
        optimizer: OptimizerOrFactory | None = None,
        scheduler: SchedulerOrFactory | None = None,
        warmup_epochs: int = 0,
        loss: ClusterLoss | None = None,
        relabel: Relabel | None = None,
        ramp_epochs: float = 0.0,
        refresh_every: int = 10,
        refresh_batches: int = 4,
        calibrator: Calibrator | None = None,
        options: TrainingOptions | None = None,
    ) -> None:
        loss, relabel = ClusterLoss() if loss is None else loss, Separate() if relabel is None else relabel
        if not isinstance(loss, ClusterLoss):
            raise ConfigurationError(f"expected loss ClusterLoss(...), got {loss!r}")
        if not isinstance(relabel, Relabel):
            raise ConfigurationError(f"expected relabel Separate(), Graded() or Original(), got {relabel!r}")
        _check_order(guard, attack)
        relabel.check(attack)
        check_numbers(ramp_epochs=ramp_epochs)
        check_numbers(
            whole=True, warmup_epochs=warmup_epochs, refresh_every=refresh_every, refresh_batches=refresh_batches
        )
        if not 0 <= ramp_epochs < math.inf:
            raise ConfigurationError(f"expected ramp_epochs of at least 0, got {ramp_epochs}")
        if ramp_epochs:
            scale(attack, 1.0)  # refuses an attack that cannot be scaled now, rather than after the warm-up
        if warmup_epochs < 0 or refresh_every < 1 or refresh_batches < 1:
            raise ConfigurationError(
                "expected warmup_epochs of at least 0, refresh_every and refresh_batches of at least 1, got "
                f"{warmup_epochs}, {refresh_every} and {refresh_batches}"
            )
        super().__init__(guard, optimizer=optimizer, scheduler=scheduler, calibrator=calibrator, options=options)
        self.guard = guard
        self.attack = attack
        self.warmup_epochs = warmup_epochs
        self.loss = loss
        self.relabel = relabel
        self.ramp_epochs = ramp_epochs
        self.refresh_every = refresh_every
        self.refresh_batches = refresh_batches

    def defining_options(self) -> dict[str, Any]:
        """All that the trainer was made with, beside the guard."""
        names = ("attack", "loss", "relabel", "warmup_epochs", "ramp_epochs", "refresh_every", "refresh_batches")
        return {name: getattr(self, name) for name in names}

    @property
    def _is_warming_up(self) -> bool:
        return len(self.history) < self.warmup_epochs

    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss of a batch after both phases of algorithm 1, which attack and relabel it.

        Args:
            images: (B, C, H, W) in [0, 1], on the guard's device.
            labels: class labels (B,).
            generator: randomness of the attack; None takes torch's global one.
        """
        batch = RelabelledBatch(images, labels, labels, torch.zeros(len(labels), device=labels.device))
        successes = None
        check_radius(self.attack, images)  # in the warm-up too, so that a wrong radius fails at once
        if not self._is_warming_up:
            detector = WithThresholds(self.guard, self.thresholds)
            # A copy, because an attack of one's own may write into its images, which are trained on.
            attacked = self._present_attack(detector, images.clone(), labels.clone(), generator=generator)
            with torch.no_grad(), evaluation_mode(detector) as seen:
                detection = decide(seen.evidence(attacked), self.thresholds)
            got_through = is_broken(Verdicts(detection, labels))
            successes = got_through.sum()
            shares = self.relabel.shares(self.attack, images, attacked, got_through)
            attacked_batch = RelabelledBatch(attacked, labels, detection.labels, shares)
            batch = RelabelledBatch(*map(torch.cat, zip(batch, attacked_batch, strict=True)))
        loss, terms, predicted = self._loss(batch)
        correct = (predicted[: len(labels)] == labels).sum()
        return TrainingStep(loss, correct, successes, terms, again=lambda: self._loss(batch)[0])

    def validate(self, images: Tensor, labels: Tensor, generator: Generator) -> Mapping[str, Tensor]:
        """The figures of validation images, attacked at full strength; see `DetectorTrainer`.

        Args:
            images: (B, C, H, W) in [0, 1], on the guard's device.
            labels: class labels (B,).
            generator: randomness of the attack.
        """
        figures = super().validate(images, labels, generator)
        detector = WithThresholds(self.guard, self.thresholds)
        attacked = self.attack(detector, images.clone(), labels.clone(), generator=generator)
        with torch.no_grad():
            got_through = is_broken(Verdicts(decide(detector.evidence(attacked), self.thresholds), labels))
        return {**figures, "robust_accuracy": figures["accepted_accuracy"] & ~got_through}

    def seconds_ahead(self, epochs: int, images: Tensor, labels: Tensor, seconds: float) -> float:
        """Estimate the seconds that the remaining epochs take if each had one step.

        Before the warm-up ends, the attack is timed by one extra run, unless all remaining epochs are of the warm-up.

        Args:
            epochs: number of epochs that are left, with the present one.
            images: images (B, C, H, W) of the last step.
            labels: class labels (B,) of the last step.
            seconds: seconds that it took.
        """
        warmups = min(epochs, max(0, self.warmup_epochs - len(self.history)))
        if warmups == epochs or not warmups:
            return epochs * seconds
        device = self.engine.device
        images, labels, generator = images.to(device), labels.to(device), Generator(device).manual_seed(0)
        states = random_states(device)  # an attack of another library may draw from a global generator
        started = time.perf_counter()
        self.attack(WithThresholds(self.guard, self.thresholds), images.clone(), labels.clone(), generator=generator)
        attacking = time.perf_counter() - started
        set_random_states(states, device)
        return warmups * seconds + (epochs - warmups) * (2 * seconds + attacking)  # a step then has twice the images

    @property
    def epochs_before_full_strength(self) -> float:
        """The epochs of the warm-up and of the ramp."""
        return self.warmup_epochs + self.ramp_epochs

    def _loss(self, batch: RelabelledBatch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of a relabelled batch, its terms, and the labels (B,) that the guard gives to the images."""
        head, representations = self.guard.head, self.guard.represent(batch.images)
        # Means are over the images of all processes, so that the loss does not depend on how batches are distributed.
        counts = self.engine.accelerator.reduce(counts_of(batch.adversarial_share), "mean")
        loss, terms = self.loss(head, representations, batch, self.thresholds, counts)
        measured = {f"loss/{name}": term.detach() for name, term in terms.items()}
        return loss, measured, head.distances(representations.detach()).argmin(dim=1)

    @property
    def _present_attack(self) -> Attack:
        """The attack, scaled down during the ramp, with shorter steps after catastrophic overfitting."""
        attack = shorten_steps(self.attack, self.step_factor)
        return ramp(attack, self.epochs_done - self.warmup_epochs, self.ramp_epochs)

    def after_step(self, calibration_batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Refresh the thresholds after every `refresh_every` steps."""
        if not self._is_warming_up and self.engine.steps % self.refresh_every == 0:
            count = self.refresh_batches * self.engine.accelerator.num_processes
            self._refresh_thresholds(islice(calibration_batches, count))

    def _refresh_thresholds(self, batches: Loader) -> None:
        detector = WithThresholds(self.guard, self.thresholds)
        verdicts = judge(detector, batches, accelerator=self.engine.shared)
        self.note({"false_positive_rate": false_positive_rate(verdicts).value})
        detection, labels = verdicts
        finite = detection.distances.isfinite()
        try:
            fitted = fit_thresholds(
                detection.distances[finite],
                detection.labels[finite],
                labels[finite],
                self.guard.num_classes,
                false_positive_rate=self.calibrator.false_positive_rate,
                method="quantile",
                scarce="pool",
            )
        except TooFewCalibrationExamplesError:
            return  # early in training too few images are classified correctly, so the old thresholds stay
        self.thresholds = self.thresholds.new_tensor(fitted.thresholds)


def _check_order(guard: object, attack: object) -> None:
    if not isinstance(guard, ClusterGuard) or not callable(attack):
        given = f"{type(guard).__name__} and {type(attack).__name__}"
        raise ConfigurationError(f"expected a ClusterGuard and an attack, in this order, got {given}")
    if isinstance(attack, type):
        raise ConfigurationError(f"expected an attack with its options, such as PGD(eps=0.1), got {attack.__name__}")
