"""The precision and the memory layout in which a training computes its steps."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from clusterguard._support import OneProcess, evaluation_mode, gather
from clusterguard.attacks import Precision
from clusterguard.attacks._internal import choose_precision
from clusterguard.detectors import DetectorModule, WithThresholds
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.training._faulty_convolutions import find_faulty_convolution
from clusterguard.training._options import TrainingOptions
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepPrecision:
    """Decides on the precision of training steps, and puts images and weights into the layout that suits it.

    Args:
        detector: detector to train.
        optimizer: optimizer of its weights.
        options: options of the steps.
        accelerator: accelerator of the training.

    Attributes:
        name: "float32" or "bf16"; "auto" until `settle` has decided.

    Raises:
        ConfigurationError: the options name bfloat16 although the accelerator sets a mixed precision.
    """

    def __init__(
        self,
        detector: DetectorModule,
        optimizer: Optimizer,
        options: TrainingOptions,
        accelerator: "Accelerator | OneProcess",
    ) -> None:
        is_theirs = accelerator.mixed_precision != "no"
        if options.precision == "bf16" and is_theirs:
            raise ConfigurationError(
                "expected precision='float32' or 'auto' beside an accelerator that sets the precision by "
                f"mixed_precision={accelerator.mixed_precision!r}, got precision='bf16'"
            )
        self.name: Precision = "float32" if is_theirs else options.precision
        self._detector, self._optimizer, self._accelerator = detector, optimizer, accelerator
        self._options = options
        self._rearranged: list[Tensor] = []  # weights that were contiguous before the training
        self._layout: torch.memory_format | None = None  # of images; None until the first batch has decided

    @property
    def in_use(self) -> str:
        """The precision of the steps, which may be the accelerator's, such as "fp16"."""
        theirs = str(self._accelerator.mixed_precision)
        return self.name if theirs == "no" else theirs

    def settle(self, images: Tensor, labels: Tensor) -> None:
        """Replace "auto" by a precision, according to the time that gradients of a batch take.

        All processes get the same precision.

        Args:
            images: (B, C, H, W) on the detector's device.
            labels: class labels (B,).

        Raises:
            ConfigurationError: the options or the accelerator name bfloat16, and PyTorch computes gradients of this
                network wrongly in it.
        """
        if self.in_use not in ("auto", "bf16") or self._layout is not None:
            return
        accepting = WithThresholds(self._detector, torch.full_like(self._detector.thresholds, torch.inf))
        with evaluation_mode(accepting) as seen:
            faulty = find_faulty_convolution(seen, images)
            if faulty and self.in_use == "bf16":
                raise ConfigurationError(
                    "expected float32 or larger images, because in bfloat16 on a CPU PyTorch computes "
                    f"wrong gradients for the weights of {faulty}"
                )
            if self.in_use == "bf16":
                return
            choice = choose_precision(seen, images, labels)
        choice = "float32" if faulty else choice
        one = None if isinstance(self._accelerator, OneProcess) else self._accelerator
        self.name = "bf16" if set(gather({self._accelerator.process_index: choice}, one)) == {"bf16"} else "float32"

    def arrange(self, images: Tensor) -> Tensor:
        """Put images (B, C, H, W) into the layout of the options, and the weights too until `restore` is called.

        Raises:
            ConfigurationError: the options name channels last, and the network does not work with it.
        """
        if self._layout is None:
            self._layout = self._choose_layout(images)
        return images.contiguous(memory_format=self._layout) if self._layout == torch.channels_last else images

    def _choose_layout(self, images: Tensor) -> torch.memory_format:
        """The layout of the options; "auto" is channels last in bfloat16 if the network works with it."""
        wanted = self._options.memory_format
        if wanted == "contiguous" or (wanted == "auto" and self.name == "float32"):
            return torch.contiguous_format
        if isinstance(self._accelerator, OneProcess):  # under DDP, gradients keep the first layout of weights
            self._rearranged = [
                weight for weight in self._detector.parameters() if weight.ndim == 4 and weight.is_contiguous()
            ]
            self._put_weights(torch.channels_last)
        few = images[:2].contiguous(memory_format=torch.channels_last)
        try:
            with torch.no_grad(), evaluation_mode(self._detector) as seen, self.rounding(images.device):
                seen.evidence(few)
        except (InputError, RuntimeError) as error:  # such as a network that flattens feature maps with `view`
            self.restore()
            if wanted == "auto":
                return torch.contiguous_format
            raise ConfigurationError(
                f"expected memory_format='contiguous', because the network fails with channels last: {error}"
            ) from error
        return torch.channels_last

    def restore(self) -> None:
        """Make the weights contiguous again that `arrange` has rearranged."""
        self._put_weights(torch.contiguous_format)
        self._rearranged, self._layout = [], None

    def _put_weights(self, layout: torch.memory_format) -> None:
        """Put rearranged weights, their gradients and the optimizer's moments into a layout, which must be the same."""
        for weight in self._rearranged:
            # `contiguous` would leave weights of one input channel, which counts as either layout.
            weight.data = weight.data.to(memory_format=layout)
            if weight.grad is not None:
                weight.grad = weight.grad.to(memory_format=layout)
            state = self._optimizer.state.get(weight, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    state[name] = value.to(memory_format=layout)

    def rounding(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of a training step on a device."""
        if self.name != "bf16":
            return nullcontext()
        # The attack casts weights without gradients. With a cache, the loss would reuse these casts, and its gradients
        # would not reach the weights.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
