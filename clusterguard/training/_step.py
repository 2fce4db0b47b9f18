"""The training step of a batch, as a value and as a module that devices and processes share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from clusterguard.detectors import DetectorModule
from clusterguard.training._step_precision import StepPrecision
from torch import Generator, Tensor, nn


class TrainingStep(NamedTuple):
    """The loss of one batch, with counts for the epoch's record.

    Attributes:
        loss: scalar to minimise.
        correct: scalar, number of images labelled correctly; benign images if the step evaluates them.
        successes: scalar, number of training attacks that got through; None if there was no attack.
        terms: terms of the loss, scalars by name, for trackers.
        again: function that recomputes the loss without a new attack, for weight perturbation; None repeats the step.
    """

    loss: Tensor
    correct: Tensor
    successes: Tensor | None = None
    terms: Mapping[str, Tensor] | None = None
    again: Callable[[], Tensor] | None = None


class WholeStep(nn.Module):
    """A module whose forward pass is a whole training step; accelerate wraps it for devices and processes.

    So the attack runs on the unwrapped detector, and processes exchange gradients only once, for the loss.
    """

    def __init__(
        self, detector: DetectorModule, training_step: Callable[..., TrainingStep], precision: StepPrecision
    ) -> None:
        super().__init__()
        self.detector = detector
        self.training_step = training_step
        self.precision = precision

    def forward(
        self, images: Tensor, labels: Tensor, generator: Generator | None, again: Callable[[], Tensor] | None = None
    ) -> Any:
        """The training step of a batch, or the result of `again` if it is not None."""
        with self.precision.rounding(images.device):
            return self.training_step(images, labels, generator) if again is None else again()
