"""Checks of what users hand in: early, cheap, and each message says what was expected and what came."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from torch import Tensor

# Projections and image decoders overshoot [0, 1] by rounding: 1e-4 is tolerated, as bfloat16 rounds that number, too.
_TOLERANCE = 1.002e-4
IN_GREY_LEVELS = "divide a radius of 8-bit pixels by 255, as in eps=8 / 255"
"""What to do about a radius that is too large, for the end of a message."""
Kind = Literal["floating-point", "float32 or float64", "integer", "bool"]
_DTYPES: dict[Kind, tuple[torch.dtype, ...]] = {
    "floating-point": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "float32 or float64": (torch.float32, torch.float64),
    "integer": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "bool": (torch.bool,),
}


def check_tensor(
    value: Any,
    name: str,
    *shape: int | str,
    kind: Kind = "floating-point",
    like: Tensor | None = None,
) -> None:
    """A value is a dense tensor of this shape, where a letter stands for any length, on the device of another one.

    Raises:
        InputError: otherwise.
    """
    if torch.compiler.is_compiling():
        return
    is_right = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in _DTYPES[kind]
    if is_right:
        lengths = [own if isinstance(want, str) else want for want, own in zip(shape, value.shape, strict=False)]
        is_right = len(shape) == value.ndim and lengths == [*value.shape]
    if not is_right:
        expected = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"expected {kind} {name} of shape {expected}, got {got}")
    if like is not None and value.device != like.device:
        raise InputError(
            f"expected {name} on {like.device} like the rest, got {value.device}; move it with .to(device)"
        )


def check_detector(detector: object) -> None:
    """It can be asked for evidence, and has thresholds or a place for them.

    Raises:
        InputError: otherwise.
    """
    thresholds = getattr(detector, "thresholds", None)
    if not callable(getattr(detector, "evidence", None)) or not isinstance(thresholds, Tensor) or thresholds.ndim != 1:
        raise InputError(
            f"expected a detector with evidence(images) and thresholds (K,), got {type(detector).__name__}; "
            "the Boundary attack alone needs no more than detect(images)"
        )


def in_range(images: Tensor) -> Tensor:
    """Which pixels are in [0, 1] but for rounding, in the shape of the images; NaN and infinity are not."""
    return (images >= -_TOLERANCE) & (images <= 1 + _TOLERANCE)


def check_images(images: Tensor) -> None:
    """Images are (B, C, H, W), floating point, in [0, 1]; non-finite pixels pass, for the guard refuses those.

    Raises:
        InputError: otherwise.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            f"expected images as a tensor of shape (B, C, H, W), got {type(images).__name__}; torch.from_numpy makes "
            "one of an array"
        )
    if images.ndim != 4:
        shape = tuple(images.shape)
        raise InputError(f"expected images of shape (B, C, H, W), got {shape}; add the batch axis with images[None]")
    if images.dtype not in _DTYPES["floating-point"] or images.layout != torch.strided or images.is_meta:
        raise InputError(
            f"expected dense floating-point images in [0, 1], got {images.dtype} ({images.layout}, {images.device}); "
            "divide 8-bit images by 255"
        )
    if not images.shape[1:].numel():
        raise InputError(f"expected images with at least one pixel, got shape {tuple(images.shape)}")
    if (~in_range(images) & images.isfinite()).any():
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
    if not isinstance(images, Tensor) or not images.ndim:
        raise InputError(f"expected images of shape (B, C, H, W), got {type(images).__name__}")
    check_tensor(labels, name, len(images), kind="integer", like=images)
    check_range(labels, num_classes, name=name)


def check_range(labels: Tensor, num_classes: int, *, name: str = "labels") -> None:
    """Labels are in [0, K).

    Raises:
        InputError: otherwise.
    """
    if labels.numel() and not labels.is_meta and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise InputError(f"expected {name} from 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def check_numbers(*, whole: bool = False, **values: object) -> None:
    """Options are numbers, by name; text and truth values are not.

    Args:
        whole: whether they must be integers.
        **values: the options.

    Raises:
        ConfigurationError: otherwise.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            raise ConfigurationError(f"expected {'a whole number' if whole else 'a number'} as {name}, got {value!r}")


def check_linf_radius(eps: float | Tensor, shape: torch.Size | None = None) -> Tensor:
    """A radius in l∞ is in [0, 1], as pixels are: one number or, if they are told, one for each of (B,) images.

    Args:
        eps: the radius.
        shape: (B,); None takes one number alone.

    Returns:
        It in float64, () or (B,).

    Raises:
        InputError: it has another shape or range.
    """
    radii = torch.as_tensor(eps, dtype=torch.float64)
    if radii.shape not in (torch.Size([]), shape) or not bool(((radii >= 0) & (radii <= 1)).all()):
        several = "" if shape is None else f" or {tuple(shape)}"
        raise InputError(f"expected a radius eps in [0, 1], one number{several}, got {eps}; {IN_GREY_LEVELS}")
    return radii


def check_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The names of K classes, if they are K different ones that can be written to files.

    Raises:
        ConfigurationError: otherwise.
    """
    is_right = isinstance(names, Sequence) and not isinstance(names, str)
    is_right = is_right and all(isinstance(own, str) and own.strip() and is_unicode(own) for own in names)
    if not is_right or not len(set(names)) == len(names) == num_classes:
        raise ConfigurationError(
            f"expected names of {num_classes} classes that UTF-8 can write, all different and none empty, got "
            f"{names!r}; give them in the order of the labels"
        )
    return tuple(names)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write a text; names of files may hold bytes that are no characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_verdicts(labels: Tensor, *verdicts: tuple[Tensor, Tensor, Tensor]) -> None:
    """Verdicts, each of labels, distances and is_adversarial, are of as many images as there are labels.

    Raises:
        InputError: otherwise.
    """
    count = len(labels) if isinstance(labels, Tensor) and labels.ndim else "n"
    check_tensor(labels, "labels", count, kind="integer")
    for predicted, distances, is_adversarial in verdicts:
        check_tensor(predicted, "predicted labels", count, kind="integer", like=labels)
        check_tensor(distances, "distances", count, like=labels)
        check_tensor(is_adversarial, "is_adversarial", count, kind="bool", like=labels)


def check_calibrated(thresholds: Tensor) -> None:
    """Thresholds have been fitted.

    Raises:
        NotCalibratedError: if any is NaN.
    """
    if thresholds.is_meta or thresholds.isnan().any():
        raise NotCalibratedError(
            "this detector has no thresholds yet; call "
            "Calibrator(false_positive_rate=0.01).fit(detector, calibration_loader) first"
        )
