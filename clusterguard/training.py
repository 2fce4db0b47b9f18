"""The paper's training algorithm: attack the guard as it is, relabel what got through, fit the clusters."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from clusterguard.attacks import Attack
from clusterguard.calibration import Calibrator, fit_thresholds
from clusterguard.checkpoints import EpochRecord, Stateful, load_checkpoint, save_checkpoint
from clusterguard.checks import check_images, check_labels
from clusterguard.clusters import cluster_loss
from clusterguard.decision import decide
from clusterguard.detector import Loader, WithThresholds, judge
from clusterguard.errors import ConfigurationError, TooFewCalibrationExamplesError, TrainingDivergedError
from clusterguard.guard import ClusterGuard
from clusterguard.metrics import is_broken
from clusterguard.modes import evaluation_mode
from torch import Generator, Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

Relabel = Literal["separate", "original"]


class AdversarialClusterTrainer:
    """Teaches a guard to keep benign classes and adversarial images in clusters of their own.

    Each step attacks a batch with the guard as it is (in eval mode), relabels each attacked image by whether it
    got through (accepted under a wrong label: adversarial cluster; otherwise: its original class), and takes one
    optimiser step on benign and attacked images together. The loss is equation 31 as a negative log-likelihood,
    ``mean over successes of ½d² · adversarial_weight + mean over the rest of ½d²``; the likelihood itself
    underflows in float32 at the distances of an untrained network.

    Args:
        guard: trained in place, on its own device.
        attack: the training attack, such as ``PGD(norm="linf", eps=0.3, step_size=0.01, steps=40, keep="last")``.
        optimizer: of the guard's parameters; None takes Adam with learning rate 1e-3.
        scheduler: stepped after every epoch.
        warmup_epochs: epochs on benign images alone first (equations 9 and 10).
        adversarial_weight: of the term of successful attacks, at least 0.
        relabel: "separate" is the paper's method; "original" gives every attacked image its original class, the
            paper's ablation L-Ben, which is adversarial training of the same head.
        refresh_every: steps between refreshes of the thresholds that decide what got through. Before the first
            they are +inf, so that "got through" means "misclassified".
        refresh_batches: calibration batches a refresh looks at, taken in turn.
        calibrator: fits the final thresholds; its rate is also that of the refreshes.

    Raises:
        ConfigurationError: an option out of its range.

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
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        warmup_epochs: int = 0,
        adversarial_weight: float = 1.0,
        relabel: Relabel = "separate",
        refresh_every: int = 10,
        refresh_batches: int = 4,
        calibrator: Calibrator | None = None,
    ) -> None:
        if relabel not in ("separate", "original"):
            raise ConfigurationError(f"expected relabel 'separate' or 'original', got {relabel!r}")
        if not 0 <= adversarial_weight < math.inf:
            raise ConfigurationError(f"expected adversarial_weight of at least 0, got {adversarial_weight}")
        if warmup_epochs < 0 or refresh_every < 1 or refresh_batches < 1:
            raise ConfigurationError(
                "expected warmup_epochs of at least 0, refresh_every and refresh_batches of at least 1, got "
                f"{warmup_epochs}, {refresh_every} and {refresh_batches}"
            )
        self.guard = guard
        self.attack = attack
        self.optimizer = Adam(guard.parameters(), lr=1e-3) if optimizer is None else optimizer
        self.scheduler = scheduler
        self.warmup_epochs = warmup_epochs
        self.adversarial_weight = adversarial_weight
        self.relabel = relabel
        self.refresh_every = refresh_every
        self.refresh_batches = refresh_batches
        self.calibrator = Calibrator() if calibrator is None else calibrator
        self.thresholds = torch.full_like(guard.thresholds, torch.inf)
        self.history: list[EpochRecord] = []
        self._steps = 0
        self._last_good: tuple[int, dict[str, Tensor]] = (0, {})

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

        The guard counts as uncalibrated until the end, and stays so if training fails. A guard in eval mode is put
        into train mode meanwhile; in a guard in train mode, modules that you have put into eval mode, such as a
        frozen BatchNorm, stay there. Equal seeds of torch's
        global generator, of the loaders and of `generator` give equal weights on the same machine.

        Args:
            train_loader: batches of images (B, C, H, W) in [0, 1] and labels (B,).
            calibration_loader: the same, of images kept out of training and of evaluation.
            epochs: how many there shall be in all, those of a resumed checkpoint included.
            on_epoch_end: called after every epoch with its record.
            checkpoint: a file written after every epoch; if it exists, training goes on from it.
            generator: the attack's randomness; None takes torch's global one.
            calibrate: fit thresholds at the end. Where the calibration set turns out too small, a warning says so
                and the trained guard stays uncalibrated.
            progress: show a progress bar.

        Returns:
            One record per epoch.

        Raises:
            ConfigurationError: fewer than one epoch.
            InputError: images or labels of a wrong shape, dtype or range.
            TooFewCalibrationExamplesError: before training, if the calibration set can't suffice.
            TrainingDivergedError: the loss became NaN or infinite; the guard holds the last good weights.
        """
        if epochs < 1:
            raise ConfigurationError(f"expected at least 1 epoch, got {epochs}")
        if calibrate:
            self.calibrator.check_counts(calibration_loader, self.guard.num_classes)
        self.guard.reset_calibration()
        was_training = self.guard.training
        if not was_training:
            self.guard.train()
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
            self.guard.eval()
        if calibrate:
            try:
                self.calibrator.fit(self.guard, calibration_loader, progress=progress)
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
        return {"guard": self.guard, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def _run_epoch(
        self,
        epochs: int,
        train_loader: Loader,
        calibration_loader: Loader,
        generator: Generator | None,
        progress: bool,
    ) -> EpochRecord:
        epoch = len(self.history) + 1
        warmup = epoch <= self.warmup_epochs
        started = time.perf_counter()
        calibration_batches = _forever(calibration_loader)
        losses, seen, correct, successes = [], 0, 0, 0
        bar = tqdm(train_loader, desc=f"epoch {epoch}/{epochs}", disable=not progress, leave=False)
        for images, labels in bar:
            check_images(images)
            check_labels(labels, images, self.guard.num_classes)
            device = self.guard.thresholds.device
            outcome = self._update(images.to(device), labels.to(device), warmup, generator)
            losses.append(outcome[0])
            seen, correct, successes = seen + len(labels), correct + outcome[1], successes + outcome[2]
            if not warmup and self._steps % self.refresh_every == 0:
                self._refresh_thresholds(islice(calibration_batches, self.refresh_batches))
            bar.set_postfix(
                loss=f"{losses[-1]:.2f}",
                attack=f"{successes / seen:.2f}",
                tau=f"{self.thresholds.mean():.2f}",
            )
        return EpochRecord(
            epoch=epoch,
            loss=sum(losses) / len(losses),
            accuracy=correct / seen,
            attack_success_rate=math.nan if warmup else successes / seen,
            mean_threshold=float(self.thresholds.mean()),
            seconds=time.perf_counter() - started,
        )

    def _update(
        self, images: Tensor, labels: Tensor, warmup: bool, generator: Generator | None
    ) -> tuple[float, int, int]:
        """One step of algorithm 1; returns the loss, and how many images were right and how many attacks succeeded."""
        batch, batch_labels = images, labels
        is_separate = torch.zeros_like(labels, dtype=torch.bool)
        successes = 0
        if not warmup:
            detector = WithThresholds(self.guard, self.thresholds)
            attacked = self.attack(detector, images, labels, generator=generator)
            with torch.no_grad(), evaluation_mode(detector):
                got_through = is_broken(decide(detector.evidence(attacked), self.thresholds), labels)
            successes = int(got_through.sum())
            batch, batch_labels = torch.cat([images, attacked]), torch.cat([labels, labels])
            separate = got_through if self.relabel == "separate" else torch.zeros_like(got_through)
            is_separate = torch.cat([is_separate, separate])
        representations = self.guard.represent(batch)
        loss = cluster_loss(
            self.guard.clusters,
            representations,
            batch_labels,
            is_separate,
            adversarial_weight=self.adversarial_weight,
        )
        self._check_loss(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._steps += 1
        predicted = self.guard.clusters.logits(representations[: len(labels)].detach()).argmax(dim=1)
        return loss.item(), int((predicted == labels).sum()), successes

    def _check_loss(self, loss: Tensor) -> None:
        """A finite loss vouches for the weights that made it: remember them now and then; else go back to them."""
        if loss.isfinite():
            if self._steps % self.refresh_every == 0:
                state = self.guard.state_dict()
                self._last_good = self._steps, {name: value.clone() for name, value in state.items()}
            return
        step, weights = self._last_good
        self.guard.load_state_dict(weights)
        raise TrainingDivergedError(
            f"the loss became {loss.item()} at step {self._steps} (epoch {len(self.history) + 1}); the guard holds the "
            f"weights of step {step} again. Lower the learning rate, or train with fewer or smaller attack steps first"
        )

    def _refresh_thresholds(self, batches: Loader) -> None:
        detection, labels = judge(self.guard, batches)
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
            return  # hardly anything is classified correctly yet: the old thresholds stand
        self.thresholds = self.thresholds.new_tensor(fitted.thresholds)


def _forever(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader
