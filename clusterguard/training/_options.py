"""How a training takes its steps, whatever its loss is."""

import gc
import math
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from clusterguard._support import OneProcess, check_numbers
from clusterguard.errors import ConfigurationError

if TYPE_CHECKING:
    from accelerate import Accelerator

_read: "WeakKeyDictionary[Accelerator, int]" = WeakKeyDictionary()  # accelerators, and the number read from each


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
        schedule_every: whether the scheduler steps after every "epoch" or after every "step" of the optimizer, as
            one-cycle ones do. timm's schedulers are told of both and choose themselves.
        accumulate: number of batches, at least 1, whose gradients are averaged for one step of the optimizer. The last
            group of an epoch may be smaller; it is averaged over what it has. None takes the
            `gradient_accumulation_steps` of the accelerator when these options are made. accelerate keeps that number
            for all accelerators together, so it is the newest one's; where it may be another one's, a warning says so.
        accelerator: `accelerate.Accelerator`: devices, processes, mixed precision and trackers are its business.
            Processes hold the whole detector each (DDP); FSDP, DeepSpeed and Megatron-LM are refused. None trains on
            the detector's device in this process, without accelerate and untouched by any accelerator of the script;
            a script that ``accelerate launch`` or ``torchrun`` has started follows the variables that they set.
        log_every: steps between two reports to the accelerator's trackers, such as TensorBoard.

    Raises:
        ConfigurationError: an option of a wrong type or out of its range.

    Warns:
        UserWarning: `accumulate` is None, and a younger accelerator may have changed this accelerator's number.

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
    accumulate: int | None = None
    accelerator: "Accelerator | None" = None
    log_every: int = 10

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        check_numbers(
            **{name: given[name] for name in ("clip_norm", "average_decay", "weight_perturbation") if name in given}
        )
        check_numbers(whole=True, **{name: given[name] for name in ("accumulate", "log_every") if name in given})
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
        if self.accumulate is None and self.accelerator is not None:
            object.__setattr__(self, "accumulate", _steps_of(self.accelerator))
        if self.accumulate is not None and self.accumulate < 1:
            raise ConfigurationError(f"expected accumulate of at least 1 batch, got {self.accumulate}")

    def make_accelerator(self) -> "Accelerator | OneProcess":
        """The accelerator; where there is none, one process without accelerate, unless a launcher says otherwise.

        Raises:
            ConfigurationError: a launcher has started this script, and it has an accelerator of another precision.
        """
        if self.accelerator is not None:
            return self.accelerator
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # set by accelerate's launchers alone
        if launched is None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return OneProcess()
        from accelerate import Accelerator

        accelerator = Accelerator(device_placement=False)
        if accelerator.mixed_precision != (launched or "no"):
            raise ConfigurationError(
                f"expected the launcher's precision, {launched or 'no'}, got an accelerator of this script with "
                f"{accelerator.mixed_precision}; pass it to the trainer in TrainingOptions(accelerator=...)"
            )
        return accelerator

    @property
    def batches_per_step(self) -> int:
        """Number of batches whose gradients make one step."""
        launched = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))  # by ``accelerate launch``
        return launched if self.accumulate is None else self.accumulate


def _steps_of(accelerator: Any) -> int:
    """How many batches an accelerator accumulates, with a warning where the number may be another accelerator's."""
    steps: int = getattr(accelerator, "gradient_accumulation_steps", 1)
    if not hasattr(accelerator, "gradient_state"):  # nothing is shared
        return steps
    if _may_be_anothers(accelerator, steps):
        gc.collect()  # of what has ended
        if _may_be_anothers(accelerator, steps):
            warnings.warn(
                f"there are several accelerators, and accelerate keeps one number of batches per step for all of them, "
                f"{steps} of the newest; say which is meant with TrainingOptions(accelerator=..., accumulate={steps})",
                stacklevel=4,
            )
    _read[accelerator] = steps
    return steps


def _may_be_anothers(accelerator: Any, steps: int) -> bool:
    """Whether the number that accelerate has now may be that of an accelerator younger than this one."""
    kind = type(accelerator)
    others = {own for own in gc.get_referrers(kind) if isinstance(own, kind) and own is not accelerator}
    # All that were read before this one was first seen are older.
    known = _read.get(accelerator, steps if others <= set(_read) else None)
    return bool(others) and known != steps
