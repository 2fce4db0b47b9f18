"""Judges a training on other images after each epoch, keeps the best epoch, and stops early."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import torch
from clusterguard._support import check_images, check_labels, check_numbers, evaluation_mode, gather, share, sole_use
from clusterguard.detection import Loader, full_precision
from clusterguard.detection._internal import check_loader
from clusterguard.detectors import DetectorModule
from clusterguard.errors import ConfigurationError, InputError
from torch import Generator, Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Validate = Callable[[Tensor, Tensor, Generator], Mapping[str, Tensor]]
"""A function from images, labels and randomness to a figure (B,) of each image, by name; larger ones are better."""


@final
@dataclass(frozen=True)
class Validation:
    """Images on which a training is judged after every epoch. The detector of the best epoch is kept.

    Epochs of the warm-up and of the ramp, in which the training attack has not its full strength, do not count, unless
    there are no others. Each epoch is judged with the same random numbers, and training is the same as without it.

    Args:
        loader: batches of images and labels, used neither for training nor for evaluation. Take others than those for
            calibration: thresholds that are fitted to images which have chosen the epoch refuse a little too many new
            ones.
        monitor: name of the figure that decides, of which larger is better: "accuracy"; "accepted_accuracy", the share
            of images that are accepted under their true label; "robust_accuracy", the share of these that the training
            attack, at full strength, does not get accepted under another label, of all images; "certified_accuracy",
            the same with bounds in place of the attack. None takes the last one that the trainer has: each trainer has
            the first two, `AdversarialClusterTrainer` also the third, and `CertifiedTrainer` the fourth.
        patience: number of epochs without a better figure after which training stops; None never stops.
        min_gain: smallest gain that counts as better, at least 0.

    Raises:
        ConfigurationError: patience is below 1, or min_gain below 0.

    Example:
        >>> Validation([(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))], patience=3).min_gain
        0.0
    """

    loader: Loader
    monitor: str | None = None
    patience: int | None = field(default=None, kw_only=True)
    min_gain: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_numbers(min_gain=self.min_gain)
        check_numbers(whole=True, **({} if self.patience is None else {"patience": self.patience}))
        if (self.patience is not None and self.patience < 1) or not 0 <= self.min_gain < math.inf:
            raise ConfigurationError(
                f"expected patience of at least 1 epoch and min_gain of at least 0, got {self.patience} and "
                f"{self.min_gain}"
            )


@dataclass
class Best:
    """The best epoch so far.

    Attributes:
        monitor: name of the figure that decides; None before the first epoch.
        value: its value in the best epoch.
        epoch: number of the best epoch; 0 if there is none.
        weights: state dict of the detector after it, on the CPU.
    """

    monitor: str | None = None
    value: float = -math.inf
    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def take(self, validation: Validation, figures: Mapping[str, float], epoch: int, detector: DetectorModule) -> bool:
        """Keep the detector if its figure is better, and return whether it is.

        Args:
            validation: settings that name the figure, and say which is better.
            figures: figures of the epoch.
            epoch: number of the epoch.
            detector: detector after the epoch.
        """
        self.monitor = [*figures][-1] if validation.monitor is None else validation.monitor
        value = figures[self.monitor]
        if self.epoch and not value > self.value + validation.min_gain:
            return False
        self.value, self.epoch = value, epoch
        self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in detector.state_dict().items()}
        return True

    def is_over(self, validation: Validation, epoch: int, first: float) -> bool:
        """Whether training should stop.

        Args:
            validation: settings with the patience.
            epoch: number of finished epochs.
            first: number of epochs that do not count.
        """
        return validation.patience is not None and epoch - max(self.epoch, math.ceil(first)) >= validation.patience


def measure(
    validate: Validate,
    detector: DetectorModule,
    batches: Iterable[tuple[Tensor, Tensor]],
    accelerator: "Accelerator | None" = None,
) -> dict[str, float]:
    """The mean figures of all images.

    Args:
        validate: function that gives the figures of a batch.
        detector: detector that it judges, which is put into eval mode.
        batches: images and labels.
        accelerator: accelerator whose processes take the batches in turn.

    Returns:
        Means by name, the same in all processes.

    Raises:
        InputError: there are no images, or they have a wrong form.
    """
    device, results = detector.thresholds.device, {}
    # What validates uses the detector itself, not a view of it.
    with sole_use(detector), evaluation_mode(detector), full_precision():
        for position, (images, labels) in share(batches, accelerator):
            check_images(images)
            check_labels(labels, images, detector.num_classes)
            # The same in every epoch, and whatever the number of processes.
            generator = torch.Generator(device).manual_seed(position)
            figures = validate(images.to(device), labels.to(device).long(), generator)
            results[position] = len(labels), {name: float(values.double().sum()) for name, values in figures.items()}
    rows = gather(results, accelerator)
    count = sum(number for number, _ in rows)
    if not count:
        raise InputError("expected a validation loader with at least one image, got an empty one")
    return {name: sum(sums[name] for number, sums in rows if number) / count for name in rows[0][1]}


def check_validation(validation: object) -> None:
    """Check that a value is None, or a `Validation` whose loader gives batches in every pass.

    Raises:
        ConfigurationError: the value is no `Validation`, or its loader cannot be iterated twice.
    """
    if validation is None:
        return
    if not isinstance(validation, Validation):
        raise ConfigurationError(f"expected validation=Validation(loader, ...), got {type(validation).__name__}")
    check_loader(validation.loader, "validation loader")


def check_monitor(validation: Validation, figures: Mapping[str, float]) -> None:
    """Check that the trainer computes the figure that is monitored.

    Raises:
        ConfigurationError: there is none of this name.
    """
    if validation.monitor is not None and validation.monitor not in figures:
        raise ConfigurationError(f"expected a monitor among {', '.join(figures)}, got {validation.monitor!r}")
