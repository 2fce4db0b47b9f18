"""Search in bfloat16, judge in the detector's own precision: twice to seven times the steps on hardware that has it."""

from time import perf_counter
from typing import Literal, get_args

import torch
from clusterguard.attacks._working_copy import cast_weights, fold_batch_norms, working_copy
from clusterguard.detection import Detector, Evidence, success_margin
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor
from torch.nn import functional

Precision = Literal["float32", "bf16", "auto"]
_WORTH_IT = 0.9  # bfloat16 must take at most this share of the time
_AGREES = 0.9  # the cosine between both gradients must be at least this, on average


class InBfloat16:
    """A detector whose network computes in bfloat16, with channels last, which is what matrix units want.

    Distances and everything after them stay in float32. Its evidence is good enough to follow gradients, and never to
    decide on a success.

    Args:
        detector: detector in eval mode. A copy of it runs, see `working_copy`, so later changes of it have no effect.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> images = torch.rand(3, 1, 4, 4)
        >>> difference = InBfloat16(guard).evidence(images).suspicion - guard.evidence(images).suspicion
        >>> bool(difference.abs().max() < 0.1)
        True
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = working_copy(detector)
        self.thresholds = detector.thresholds
        self._is_ready = self.detector is detector  # what is shared stays as it is

    def evidence(self, images: Tensor) -> Evidence:
        """The evidence on images (B, C, H, W), computed in bfloat16 and returned in float32."""
        if not self._is_ready:
            fold_batch_norms(self.detector, images.detach())
            cast_weights(self.detector, images.detach())
            self._is_ready = True
        with torch.autocast(images.device.type, torch.bfloat16):
            scores, suspicion = self.detector.evidence(images.contiguous(memory_format=torch.channels_last))
        return Evidence(scores.float(), suspicion.float())


def check_precision(precision: str) -> None:
    """Check the name of a precision.

    Raises:
        ConfigurationError: it is unknown.
    """
    if precision not in get_args(Precision):
        raise ConfigurationError(f"expected precision 'float32', 'bf16' or 'auto', got {precision!r}")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32, as far as its type tells."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supports = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(ask() for ask in supports if ask is not None)


def choose_precision(detector: Detector, images: Tensor, labels: Tensor) -> Literal["float32", "bf16"]:
    """The precision in which input gradients come faster, if both agree and the network works in both.

    Two gradients of up to 100 images are timed in each precision, unless the device has no bfloat16.

    Args:
        detector: detector that will be attacked.
        images: (B, C, H, W), at least one.
        labels: (B,) true labels.
    """
    if images.dtype != torch.float32 or not len(images) or not has_bfloat16(images.device):
        return "float32"
    images, labels = images[:100], labels[:100]
    exact, seconds = _time_gradient(detector, images, labels)
    try:
        rough, fewer = _time_gradient(InBfloat16(detector), images, labels)
    except (RuntimeError, InputError):  # a layer that does not know bfloat16
        return "float32"
    cosine = functional.cosine_similarity(exact.flatten(1), rough.flatten(1))
    agrees = bool(cosine.isfinite().all()) and float(cosine.mean()) >= _AGREES
    return "bf16" if agrees and fewer <= _WORTH_IT * seconds else "float32"


def _time_gradient(detector: Detector, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """The gradient (B, C, H, W) of the success margins, and the seconds that it takes the second time."""
    for _ in range(2):
        started = perf_counter()
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            margins = success_margin(detector.evidence(leaf), detector.thresholds, labels)
            (gradient,) = torch.autograd.grad(margins.sum(), leaf)
        gradient[0, 0, 0, 0].item()  # waits for the device
        seconds = perf_counter() - started
    return gradient, seconds
