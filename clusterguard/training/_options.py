"""Options of the training steps that do not depend on the loss."""

import gc
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final
from weakref import WeakKeyDictionary

from clusterguard._support import OneProcess, check_accelerator, check_numbers
from clusterguard.attacks import Precision
from clusterguard.attacks._internal import check_precision
from clusterguard.errors import ConfigurationError
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

# The number of accumulated batches that was last read from each accelerator.
_steps_read: "WeakKeyDictionary[Accelerator, int]" = WeakKeyDictionary()


@final
@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training steps; the defaults are the paper's.

    Args:
        clip_norm: largest l2 norm of the gradient of all parameters together; a longer gradient is scaled down to it.
            None does not clip.
        average_decay: decay factor of an exponential moving average of weights and buffers, in (0, 1), such as 0.999.
            Training goes on with the plain weights, and the detector gets the average at the end. None keeps no
            average.
        weight_perturbation: factor γ of adversarial weight perturbation, positive, such as 0.005. Each tensor of two
            or more dimensions is moved by γ times its norm in the direction that raises the loss. The gradient is
            taken there and applied to the weights before the move. This costs a second pass over each batch, with the
            attacked images of the first pass. Several processes all move along the mean of their gradients, whereas
            accumulated batches are moved separately. Buffers such as BatchNorm's statistics are those of the first
            pass. None moves nothing.
        schedule_every: unit after which the scheduler steps, "epoch" or "step" of the optimizer; one-cycle schedulers
            need "step". timm's schedulers are told of both and choose themselves.
        accumulate: number of batches, at least 1, whose gradients are averaged for one step of the optimizer. The last
            group of an epoch may be smaller and is averaged over its actual size. None takes the accelerator's
            `gradient_accumulation_steps` when these options are made. accelerate shares this number between all
            accelerators, so it is that of the newest one. A warning is given if it may come from another accelerator.
        accelerator: `accelerate.Accelerator` that handles devices, processes, mixed precision and trackers. Each
            process holds the whole detector (DDP); FSDP, DeepSpeed and Megatron-LM are refused. None trains in this
            process on the detector's device, without accelerate, and ignores any accelerator of the script. In a
            script that ``accelerate launch`` or ``torchrun`` started, None follows the variables that they set.
        augment: function of training images (B, C, H, W), such as transforms of `torchvision.transforms.v2`, that is
            called on the device before the attack. It returns as many images in [0, 1], perhaps of another size. So the
            loader may give images of 8 bits that it converts. `EachImage` lets it draw other random numbers for each
            image. None changes nothing.
        log_every: number of steps between two reports to the accelerator's trackers, such as TensorBoard.
        precision: precision of attacks and gradients, "float32", "bf16", or "auto", which times both on the first batch
            and takes bfloat16 if it is faster and works as well. On a CPU, PyTorch computes wrong gradients in bfloat16
            for padded convolutions whose stride exceeds their feature map. There, "auto" takes float32, and "bf16"
            makes the training raise an error. Weights, optimizer, thresholds and the head's distances stay in float32.
            If an accelerator sets a mixed precision, that one is used. With "auto", the choice can depend on what else
            the machine does. A resumed training keeps the first choice, unless that is bfloat16 and the device has
            no instructions for it.
        memory_format: layout of the images that the network gets, "channels_last", which convolutions in bfloat16 need
            to be fast, "contiguous", or "auto", which is channels_last in bfloat16 and contiguous in float32.

    Raises:
        ConfigurationError: an option has a wrong type or is out of its range, or the state of the accelerator is gone.

    Warns:
        UserWarning: `accumulate` is None, and a newer accelerator may have changed the number of this accelerator.

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
    augment: "Callable[[Tensor], Tensor] | None" = None
    log_every: int = 10
    precision: Precision = "float32"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"

    def __post_init__(self) -> None:
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        check_numbers(
            **{name: chosen[name] for name in ("clip_norm", "average_decay", "weight_perturbation") if name in chosen}
        )
        check_numbers(whole=True, **{name: chosen[name] for name in ("accumulate", "log_every") if name in chosen})
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
        if self.augment is not None and not callable(self.augment):
            raise ConfigurationError(f"expected augment to be a function of images, got {type(self.augment).__name__}")
        if type(self.augment).__name__ in ("CutMix", "MixUp"):  # of torchvision
            raise ConfigurationError(
                f"expected augment to change images only, got {type(self.augment).__name__}, which mixes labels too; "
                "the paper's loss needs one label for each image"
            )
        if self.log_every < 1:
            raise ConfigurationError(f"expected log_every of at least 1, got {self.log_every}")
        check_precision(self.precision)
        check_accelerator(self.accelerator)
        if self.memory_format not in ("auto", "contiguous", "channels_last"):
            raise ConfigurationError(
                f"expected memory_format 'auto', 'contiguous' or 'channels_last', got {self.memory_format!r}"
            )
        if self.accumulate is None and self.accelerator is not None:
            object.__setattr__(self, "accumulate", _steps_of(self.accelerator))
        if self.accumulate is not None and self.accumulate < 1:
            raise ConfigurationError(f"expected accumulate of at least 1 batch, got {self.accumulate}")

    def make_accelerator(self) -> "Accelerator | OneProcess":
        """The accelerator of the options, or a new one if a launcher started this script, or else a single process.

        Raises:
            ConfigurationError: the state of the accelerator is gone; or a launcher started this script, and the script
                made an accelerator of another precision.
        """
        if self.accelerator is not None:
            check_accelerator(self.accelerator)
            return self.accelerator
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # only accelerate's launchers set it
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
        """The number of batches whose gradients make one step."""
        launched = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))  # ``accelerate launch`` sets it
        return launched if self.accumulate is None else self.accumulate


def _steps_of(accelerator: Any) -> int:
    """The number of batches an accelerator accumulates, with a warning if it may be that of another accelerator."""
    steps: int = getattr(accelerator, "gradient_accumulation_steps", 1)
    if not hasattr(accelerator, "gradient_state"):  # without this attribute, accelerators do not share the number
        return steps
    if _may_be_of_another(accelerator, steps):
        gc.collect()  # unused accelerators must not count
        if _may_be_of_another(accelerator, steps):
            warnings.warn(
                f"there are several accelerators, and accelerate keeps one number of batches per step for all of them, "
                f"{steps} of the newest; choose the number with TrainingOptions(accelerator=..., accumulate={steps})",
                stacklevel=4,
            )
    _steps_read[accelerator] = steps
    return steps


def _may_be_of_another(accelerator: Any, steps: int) -> bool:
    """Whether accelerate's present number may come from an accelerator newer than this one."""
    kind = type(accelerator)
    others = {other for other in gc.get_referrers(kind) if isinstance(other, kind) and other is not accelerator}
    # If all others were read before, they are older than an accelerator that is read for the first time.
    known = _steps_read.get(accelerator, steps if others <= set(_steps_read) else None)
    return bool(others) and known != steps
