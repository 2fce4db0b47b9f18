"""The check for catastrophic overfitting, and what a training goes back to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from clusterguard._support import check_numbers
from clusterguard.attacks import Attack
from clusterguard.detection import Loader, Verdicts, decide, is_broken
from clusterguard.detection._internal import check_loader
from clusterguard.detectors import DetectorModule, WithThresholds
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


@final
@dataclass(frozen=True)
class OverfittingCheck:
    """A check for catastrophic overfitting after every epoch, and the way back from it.

    Training with a single attack step can lose all robustness within an epoch: the single step then hardly ever
    succeeds, and an attack of several steps nearly always does. So after every epoch an attack of several steps runs on
    held-out images. Its success rate is the share of these images that it gets accepted under a wrong label, at the
    thresholds in use. If the rate exceeds the lowest one so far by more than `max_rise`, the epoch is undone: weights,
    averages, thresholds and the optimizer's moments are again those after the last epoch that was not undone. Training
    goes on from there with smaller steps. An undone epoch counts as an epoch, and schedules of the learning rate go on,
    so that the training takes no longer. Its record names the epoch whose weights were taken.

    The check runs on the weights that are trained, not on their average. Random numbers of the training do not depend
    on it.

    Args:
        loader: batches of images and labels that are not trained on. Some hundred images are enough.
        attack: attack of several steps at the radius of interest, such as
            ``PGD(eps=8 / 255, step_size=2 / 255, steps=10, start="random")``.
        max_rise: largest rise of the success rate that is not undone, in (0, 1).
        step_factor: factor in (0, 1] that multiplies the step size of the training attack after each undone epoch.
            Attacks without the option `step_size`, such as APGD, stay as they are.
        rate_factor: factor in (0, 1] that multiplies the learning rate after each undone epoch.

    Raises:
        ConfigurationError: an option has a wrong type or is out of its range.

    Reference:
        Wong, Rice & Kolter, "Fast is better than free: revisiting adversarial training" (2020); Andriushchenko &
        Flammarion, "Understanding and improving fast adversarial training" (2020).

    Example:
        >>> from clusterguard import PGD
        >>> batches = [(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))]
        >>> OverfittingCheck(batches, PGD(eps=0.1, step_size=0.02, steps=10)).max_rise
        0.2
    """

    loader: Loader = field(repr=False)
    attack: Attack
    max_rise: float = field(default=0.2, kw_only=True)
    step_factor: float = field(default=0.75, kw_only=True)
    rate_factor: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        check_numbers(max_rise=self.max_rise, step_factor=self.step_factor, rate_factor=self.rate_factor)
        check_loader(self.loader, "held-out loader")
        if not callable(self.attack) or isinstance(self.attack, type):
            raise ConfigurationError(f"expected an attack with its options, such as PGD(eps=0.1), got {self.attack!r}")
        if not 0 < self.max_rise < 1:
            raise ConfigurationError(f"expected max_rise in (0, 1), got {self.max_rise}")
        if not (0 < self.step_factor <= 1 and 0 < self.rate_factor <= 1):
            raise ConfigurationError(
                f"expected step_factor and rate_factor in (0, 1], got {self.step_factor} and {self.rate_factor}"
            )


@dataclass(frozen=True)
class LastGood:
    """What a training goes back to after catastrophic overfitting.

    Attributes:
        lowest: lowest success rate of the check so far; +inf before the first check.
        epoch: number of the last epoch that was not undone; 0 if there is none.
        step_factor: factor of the training attack's step size now.
        rate_factor: factor of the learning rate now.
        snapshot: state of the engine after that epoch, see `TrainingEngine.snapshot`.
        thresholds: (K,) thresholds after that epoch; None if there is none.
    """

    lowest: float = math.inf
    epoch: int = 0
    step_factor: float = 1.0
    rate_factor: float = 1.0
    snapshot: dict[str, Any] = field(default_factory=dict)
    thresholds: Tensor | None = None


def successes(
    check: OverfittingCheck,
    detector: DetectorModule,
    thresholds: Tensor,
    images: Tensor,
    labels: Tensor,
    generator: Generator,
) -> Mapping[str, Tensor]:
    """Whether the attack of a check gets images accepted under a wrong label.

    Args:
        check: check with the attack.
        detector: detector in eval mode.
        thresholds: (K,) thresholds in use.
        images: (B, C, H, W) in [0, 1].
        labels: class labels (B,).
        generator: randomness of the attack.

    Returns:
        Truth values (B,) under the name "success".
    """
    judge = WithThresholds(detector, thresholds)
    attacked = check.attack(judge, images.clone(), labels.clone(), generator=generator)
    with torch.no_grad():
        return {"success": is_broken(Verdicts(decide(judge.evidence(attacked), thresholds), labels))}
