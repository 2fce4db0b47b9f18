"""How a training takes its steps, whatever its loss is."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from clusterguard.errors import ConfigurationError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How steps are taken; the defaults are the paper's.

    Args:
        clip_norm: largest l2 norm of the gradient of all parameters, longer ones are scaled down; None leaves them.
        average_decay: of an exponential moving average of weights and buffers, in (0, 1), such as 0.999. The
            detector trains on its own weights and holds the average when training has ended. None keeps none.
        weight_perturbation: γ of adversarial weight perturbation, positive, such as 0.005: the gradient is taken at
            weights moved up the loss, each tensor of two or more dimensions by γ times its norm, and applied to those
            that were there before. It costs a second pass over each batch, on the attacked images of the first. With
            several processes they all move the same way, along the mean of their gradients; accumulated batches each
            move their own. Statistics such as BatchNorm's are those of the pass before the move. None moves nothing.
        schedule_every: whether the scheduler steps after every "epoch" or after every "step", as one-cycle ones do.
        accelerator: `accelerate.Accelerator`: devices, processes, mixed precision, gradient accumulation and
            trackers are its business. Processes hold the whole detector each (DDP); FSDP, DeepSpeed and Megatron-LM
            are refused. None leaves the detector on its device and follows the variables that ``accelerate launch``
            sets.
        log_every: steps between two reports to the accelerator's trackers, such as TensorBoard.

    Raises:
        ConfigurationError: an option out of its range.

    Reference:
        Wu, Xia & Wang, "Adversarial weight perturbation helps robust generalization" (2020).

    Example:
        >>> TrainingOptions(clip_norm=1.0, average_decay=0.999).schedule_every
        'epoch'
    """

    clip_norm: float | None = None
    average_decay: float | None = None
    weight_perturbation: float | None = None
    schedule_every: Literal["epoch", "step"] = "epoch"
    accelerator: "Accelerator | None" = None
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigurationError(f"expected a positive clip_norm, got {self.clip_norm}")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise ConfigurationError(f"expected average_decay in (0, 1), such as 0.999, got {self.average_decay}")
        if self.weight_perturbation is not None and not 0 < self.weight_perturbation < math.inf:
            raise ConfigurationError(
                f"expected a positive weight_perturbation, such as 0.005, got {self.weight_perturbation}"
            )
        if self.schedule_every not in ("epoch", "step"):
            raise ConfigurationError(f"expected schedule_every 'epoch' or 'step', got {self.schedule_every!r}")
        if self.log_every < 1:
            raise ConfigurationError(f"expected log_every of at least 1, got {self.log_every}")

    def make_accelerator(self) -> "Accelerator":
        """The accelerator, or one that moves nothing."""
        from accelerate import Accelerator

        return Accelerator(device_placement=False) if self.accelerator is None else self.accelerator
