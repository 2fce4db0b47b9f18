"""Recipes say how a detector of the comparison is built, trained and attacked. Each detector has one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeAlias, cast, final

from clusterguard import PGD, DetectorModule, DetectorTrainer, TrainingOptions
from clusterguard.attacks import Objective, ramp, shorten_steps
from clusterguard.detection import Loader
from clusterguard.detectors import WithThresholds
from clusterguard.training import TrainingStep
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The settings of training that all detectors of an experiment share.

    Attributes:
        attack: training attack with its budget. A recipe may change its objective and its start.
        optimizer: function that makes the optimizer for the parameters of a detector.
        scheduler: function that makes the scheduler for an optimizer. None keeps the learning rate.
        options: options of the training steps. A recipe may change some.
        warmup_epochs: number of epochs at the beginning without the attack.
    """

    attack: PGD
    optimizer: Callable[[nn.Module], Optimizer]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    options: TrainingOptions = field(default_factory=TrainingOptions)
    warmup_epochs: int = 0


class Loss(Protocol):
    """A loss on images (B, C, H, W) and labels (B,).

    The thresholds of the detector are +inf, so that attacks run on a detector that accepts every image. The attack is
    None in the warm-up.
    """

    def __call__(
        self, detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD | None, generator: Generator | None
    ) -> TrainingStep:
        """The loss of a batch, differentiable in the detector's parameters."""
        ...


@final
class LossTrainer(DetectorTrainer):
    """Trains any detector on a loss. The radius of the attack may grow for some epochs after the warm-up.

    Args:
        detector: detector to train.
        loss: loss of a batch.
        schedule: settings of training.
        ramp_epochs: number of epochs after the warm-up over which the radius of the attack grows.
    """

    def __init__(self, detector: DetectorModule, loss: Loss, schedule: Schedule, *, ramp_epochs: float = 0.0) -> None:
        optimizer = schedule.optimizer(detector)
        scheduler = None if schedule.scheduler is None else schedule.scheduler(optimizer)
        super().__init__(detector, optimizer=optimizer, scheduler=scheduler, options=schedule.options)
        self.loss = loss
        self.schedule = schedule
        self.ramp_epochs = ramp_epochs

    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss, with the attack once the warm-up is over."""
        attack, warmup = None, self.schedule.warmup_epochs
        if len(self.history) >= warmup:
            shortened = shorten_steps(self.schedule.attack, self.step_factor)
            attack = cast(PGD, ramp(shortened, self.epochs_done - warmup, self.ramp_epochs))
        return self.loss(WithThresholds(self.detector, self.thresholds), images, labels, attack, generator)


class Network(Protocol):
    """A network that maps images (B, C, H, W) in [0, 1] to features (B, num_features)."""

    num_features: int

    def __call__(self, images: Tensor, /) -> Tensor:
        """The features."""
        ...


Build: TypeAlias = Callable[[nn.Module], DetectorModule]
"""A function that makes an untrained detector of 10 classes around an untrained `Network`."""

MakeTrainer: TypeAlias = Callable[[DetectorModule, Schedule], DetectorTrainer]
"""A function that makes the trainer of a detector."""
Finish: TypeAlias = Callable[[DetectorModule, Loader], DetectorModule]
"""A function of a trained detector and training batches. It returns the detector that is calibrated and attacked."""


def add_classifier(network: nn.Module) -> nn.Sequential:
    """The network with a linear layer of 10 logits behind it."""
    return nn.Sequential(network, nn.Linear(cast(int, network.num_features), 10))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a detector is built, trained and attacked.

    Attributes:
        title: heading of the column in tables.
        reference: publication of the detector.
        training_name: name of the training, which consists of `build` and `trainer`. Detectors that share a name share
            one training.
        build: function that makes the untrained detector.
        trainer: function that makes the trainer of a detector.
        finish: function that completes the trained detector without gradients, for example by statistics of features.
        objective: objective of an attacker who knows the detector, as in the paper's Table 1.
        attacked: whether training runs an attack. Estimates of the cost depend on it.
        passes: number of forward and backward passes of an image in a training step, without those of the attack.
            Estimates of the cost depend on it.
        with_options: function that makes the recipe with the options that an experiment names. None if the recipe has
            no options.
    """

    title: str
    reference: str
    training_name: str
    build: Build
    trainer: MakeTrainer
    finish: Finish = lambda detector, _: detector
    objective: str | Objective = "adaptive"
    attacked: bool = True
    passes: int = 1
    with_options: Callable[..., "Recipe"] | None = None


def with_loss(recipe: Recipe, loss: Loss, *, ramp_epochs: float = 0.0) -> Recipe:
    """Copy a recipe, and let the copy train on a loss.

    Args:
        recipe: recipe to copy.
        loss: loss of a batch.
        ramp_epochs: number of epochs over which the radius of the attack grows. Experiments
            can name it as an option.
    """
    return replace(
        recipe,
        trainer=lambda detector, schedule: LossTrainer(detector, loss, schedule, ramp_epochs=ramp_epochs),
        with_options=partial(with_loss, recipe, loss),
    )
