"""Checks of what users hand in: early, cheap, and each message says what was expected and what came."""

import torch
from clusterguard.errors import InputError, NotCalibratedError
from torch import Tensor

_TOLERANCE = 1e-4  # projections and image decoders overshoot [0, 1] by rounding


def check_images(images: Tensor) -> None:
    """Images are (B, C, H, W), floating point, in [0, 1]; non-finite pixels pass, for the guard refuses those.

    Raises:
        InputError: otherwise.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"expected images of shape (B, C, H, W), got {shape}; add the batch axis with images[None]")
    if not images.is_floating_point():
        raise InputError(f"expected floating-point images in [0, 1], got {images.dtype}; divide 8-bit images by 255")
    outside = ((images < -_TOLERANCE) | (images > 1 + _TOLERANCE)) & images.isfinite()
    if outside.any():
        low, high = images[images.isfinite()].aminmax()
        raise InputError(
            f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}; "
            "do not normalise them yourself, the detector does"
        )


def check_labels(labels: Tensor, images: Tensor, num_classes: int, *, name: str = "labels") -> None:
    """Labels are (B,) integers in [0, K), one an image, on the images' device.

    Raises:
        InputError: otherwise.
    """
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"expected integer {name} of shape ({len(images)},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.device != images.device:
        raise InputError(f"expected {name} on {images.device} like the images, got {labels.device}")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise InputError(f"expected {name} from 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def check_calibrated(thresholds: Tensor) -> None:
    """Thresholds have been fitted.

    Raises:
        NotCalibratedError: if any is NaN.
    """
    if thresholds.isnan().any():
        raise NotCalibratedError(
            "this detector has no thresholds yet; call "
            "Calibrator(false_positive_rate=0.01).fit(detector, calibration_loader) first"
        )
