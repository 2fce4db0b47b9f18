"""SGD with one cycle of the learning rate and averaged weights, as publications train on photos."""

from collections.abc import Iterable
from typing import NamedTuple

from clusterguard import TrainingOptions
from clusterguard.training import crop_and_flip
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

_MOMENTUM, _DECAY = 0.9, 5e-4
_AVERAGED = 1 / 20  # share of the training over which weights are averaged


class OneCycle(NamedTuple):
    """One cycle of the learning rate.

    Attributes:
        rate: largest learning rate.
        steps: number of steps of the whole training.
    """

    rate: float
    steps: int

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """SGD with Nesterov momentum."""
        return SGD(parameters, self.rate, momentum=_MOMENTUM, weight_decay=_DECAY, nesterov=True)

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """The schedule, which takes a step with the optimizer."""
        return OneCycleLR(optimizer, max_lr=self.rate, total_steps=self.steps)

    def options(self) -> TrainingOptions:
        """The options of the steps, in bfloat16 where that is faster."""
        return TrainingOptions(
            schedule_every="step",
            average_decay=1 - 1 / max(2.0, self.steps * _AVERAGED),
            augment=crop_and_flip,
            precision="auto",
            memory_format="channels_last",
        )
