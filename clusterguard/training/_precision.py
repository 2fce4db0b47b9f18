"""The precision and the memory layout in which a training computes its steps."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from clusterguard._support import OneProcess, collect, evaluation_mode
from clusterguard.attacks import Precision, choose_precision
from clusterguard.detectors import DetectorModule, WithThresholds
from clusterguard.errors import ConfigurationError
from clusterguard.training._options import TrainingOptions
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepPrecision:
    """Settles the precision of training steps, and gives images and weights the layout that suits it.

    Args:
        detector: detector to train.
        options: options of the steps.
        accelerator: accelerator of the training.

    Attributes:
        name: "float32" or "bf16"; "auto" until `settle` has decided.

    Raises:
        ConfigurationError: the options name bfloat16 although the accelerator sets a mixed precision.
    """

    def __init__(
        self, detector: DetectorModule, options: TrainingOptions, accelerator: "Accelerator | OneProcess"
    ) -> None:
        is_theirs = accelerator.mixed_precision != "no"
        if options.precision == "bf16" and is_theirs:
            raise ConfigurationError(
                "expected precision='float32' or 'auto' beside an accelerator that sets the precision by "
                f"mixed_precision={accelerator.mixed_precision!r}, got precision='bf16'"
            )
        self.name: Precision = "float32" if is_theirs else options.precision
        self._detector, self._accelerator = detector, accelerator
        self._memory_format = options.memory_format
        self._rearranged: list[Tensor] = []  # weights that were contiguous before the training

    @property
    def in_use(self) -> str:
        """The precision of the steps, which may be the accelerator's, such as "fp16"."""
        theirs = str(self._accelerator.mixed_precision)
        return self.name if theirs == "no" else theirs

    def settle(self, images: Tensor, labels: Tensor) -> None:
        """Decide what "auto" means, by the time that gradients of a batch take; all processes decide alike.

        Args:
            images: (B, C, H, W) on the detector's device.
            labels: class labels (B,).
        """
        if self.name != "auto":
            return
        accepting = WithThresholds(self._detector, torch.full_like(self._detector.thresholds, torch.inf))
        with evaluation_mode(accepting):
            choice = choose_precision(accepting, images, labels)
        one = None if isinstance(self._accelerator, OneProcess) else self._accelerator
        self.name = "bf16" if set(collect({self._accelerator.process_index: choice}, one)) == {"bf16"} else "float32"

    def arrange(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in the layout of the options. Weights get it too, until `restore` is called."""
        if self._memory_format == "contiguous" or (self._memory_format == "auto" and self.name == "float32"):
            return images
        # DDP keeps gradients in the layout that weights had when it wrapped them.
        if not self._rearranged and isinstance(self._accelerator, OneProcess):
            kernels: list[Tensor] = [
                weight for weight in self._detector.parameters() if weight.ndim == 4 and weight.is_contiguous()
            ]
            for weight in kernels:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            self._rearranged = kernels
        return images.contiguous(memory_format=torch.channels_last)

    def restore(self) -> None:
        """Make the weights contiguous again that `arrange` has rearranged."""
        for weight in self._rearranged:
            weight.data = weight.data.contiguous()
        self._rearranged = []

    def rounding(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of a training step on a device."""
        if self.name != "bf16":
            return nullcontext()
        # Without a cache, because weights cast within the attack, which needs no gradients of them, would serve the
        # loss too, which does.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
