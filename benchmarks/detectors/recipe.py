"""How a detector of the comparison comes to be, and how it is attacked: one `Recipe` a detector."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, TypeAlias, cast, final

from clusterguard import PGD, DetectorModule, DetectorTrainer, TrainingOptions
from clusterguard.attacks import Objective, ramp
from clusterguard.detection import Loader
from clusterguard.detectors import WithThresholds
from clusterguard.training import TrainingStep
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, how fast and against what to train; the same for every detector of an experiment.

    Attributes:
        attack: the training attack with its budget; a recipe may change objective and start.
        optimizer: made from the detector's parameters.
        scheduler: made from the optimizer.
        schedule_every: when the scheduler steps.
        warmup_epochs: epochs without the attack first.
    """

    attack: PGD
    optimizer: Callable[[nn.Module], Optimizer]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    schedule_every: Literal["epoch", "step"] = "epoch"
    warmup_epochs: int = 0


class Loss(Protocol):
    """(detector, images (B, C, H, W), labels (B,), attack, generator) -> what one batch gives.

    The detector's thresholds are +inf, so that attacks run on it as it is; the attack is None in the warm-up.
    """

    def __call__(
        self, detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD | None, generator: Generator | None
    ) -> TrainingStep:
        """The loss of a batch, differentiable in the detector's parameters."""
        ...


@final
class LossTrainer(DetectorTrainer):
    """Trains any detector on a loss; after the warm-up the attack's radius may grow for some epochs."""

    def __init__(self, detector: DetectorModule, loss: Loss, schedule: Schedule, *, ramp_epochs: float = 0.0) -> None:
        optimizer = schedule.optimizer(detector)
        scheduler = None if schedule.scheduler is None else schedule.scheduler(optimizer)
        options = TrainingOptions(schedule_every=schedule.schedule_every)
        super().__init__(detector, optimizer=optimizer, scheduler=scheduler, options=options)
        self.loss = loss
        self.schedule = schedule
        self.ramp_epochs = ramp_epochs

    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss, with the attack once the warm-up is over."""
        attack, warmup = None, self.schedule.warmup_epochs
        if len(self.history) >= warmup:
            attack = cast(PGD, ramp(self.schedule.attack, self.epochs_done - warmup, self.ramp_epochs))
        return self.loss(WithThresholds(self.detector, self.thresholds), images, labels, attack, generator)


class Network(Protocol):
    """Images (B, C, H, W) in [0, 1] -> features (B, num_features)."""

    num_features: int

    def __call__(self, images: Tensor, /) -> Tensor:
        """The features."""
        ...


Build: TypeAlias = Callable[[nn.Module], DetectorModule]
"""An untrained `Network`, the detector's own from now on -> an untrained detector of 10 classes."""

MakeTrainer: TypeAlias = Callable[[DetectorModule, Schedule], DetectorTrainer]
Finish: TypeAlias = Callable[[DetectorModule, Loader], DetectorModule]
"""What is fitted after training: trained detector, training batches -> the detector that is calibrated and attacked."""


def add_classifier(network: nn.Module) -> nn.Sequential:
    """The network with a linear layer of 10 logits behind it."""
    return nn.Sequential(network, nn.Linear(cast(int, network.num_features), 10))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a detector comes to be, and how it is attacked.

    Attributes:
        title: the column's heading in tables.
        reference: where it was published.
        training: a name for build and trainer together; detectors of the same name are trained once.
        build: makes the untrained detector.
        trainer: trains it.
        finish: what is fitted after training, without gradients.
        objective: of attackers who know the detector, as in the paper's Table 1.
        attacked: whether its training attacks at all; for estimates.
        passes: how many an image takes in a step of training, attacks aside; for estimates.
        variant: makes the recipe with other options, for ablations; None if it has none.
    """

    title: str
    reference: str
    training: str
    build: Build
    trainer: MakeTrainer
    finish: Finish = lambda detector, _: detector
    objective: str | Objective = "adaptive"
    attacked: bool = True
    passes: int = 1
    variant: Callable[..., "Recipe"] | None = None


def with_loss(recipe: Recipe, loss: Loss, *, ramp_epochs: float = 0.0) -> Recipe:
    """The recipe, trained on a loss; its variants have the training attack's radius grow for some epochs."""
    return replace(
        recipe,
        trainer=lambda detector, schedule: LossTrainer(detector, loss, schedule, ramp_epochs=ramp_epochs),
        variant=partial(with_loss, recipe, loss),
    )
