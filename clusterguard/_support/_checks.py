"""Input checks. They are early and cheap, and each message says what was expected and what was passed instead."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from clusterguard._support._tracing import is_traced
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from torch import Tensor

# Rounding in projections and image decoders can overshoot [0, 1], so 1e-4 is tolerated. The constant is a little
# larger because bfloat16 rounds 1e-4 up.
_TOLERANCE = 1.002e-4
IN_GREY_LEVELS = "divide a radius of 8-bit pixels by 255, as in eps=8 / 255"
"""Advice about a radius that is too large, for the end of an error message."""
DtypeKind = Literal["floating-point", "float32 or float64", "integer", "bool"]
_DTYPES: dict[DtypeKind, tuple[torch.dtype, ...]] = {
    "floating-point": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "float32 or float64": (torch.float32, torch.float64),
    "integer": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "bool": (torch.bool,),
}


def check_tensor(
    value: Any,
    name: str,
    *shape: int | str,
    kind: DtypeKind = "floating-point",
    like: Tensor | None = None,
) -> None:
    """Check that a value is a dense tensor of the right shape, data type and device.

    Args:
        value: object to check.
        name: name of the value in the error message.
        *shape: length of each axis; a letter stands for any length.
        kind: allowed data types.
        like: tensor on whose device the value must be; None allows any device.

    Raises:
        InputError: if the check fails.
    """
    if is_traced():
        return
    is_right = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in _DTYPES[kind]
    if is_right:
        lengths = [actual if isinstance(want, str) else want for want, actual in zip(shape, value.shape, strict=False)]
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
    """Check that a detector has a method `evidence` and a tensor of thresholds (K,), fitted or not.

    Raises:
        InputError: if the check fails.
    """
    thresholds = getattr(detector, "thresholds", None)
    if not callable(getattr(detector, "evidence", None)) or not isinstance(thresholds, Tensor) or thresholds.ndim != 1:
        raise InputError(
            f"expected a detector with evidence(images) and thresholds (K,), got {type(detector).__name__}; "
            "only the Boundary attack works with detect(images) alone"
        )


def in_range(images: Tensor) -> Tensor:
    """Mask of the pixels that are in [0, 1] up to rounding, in the shape of the images. NaN and infinity are False."""
    return (images >= -_TOLERANCE) & (images <= 1 + _TOLERANCE)


_ADVICE = {  # keys are names of types, or of the libraries that define them
    "numpy": "torch.from_numpy converts an array",
    "PIL": "torchvision.transforms.functional.to_tensor(image)[None] converts one, in [0, 1]",
    "list": "torch.stack makes a batch of tensors",
    "tuple": "pass the images alone, such as batch[0]",
    "dict": 'pass the images alone, such as batch["pixel_values"]',
    "BatchFeature": 'pass the images alone, batch["pixel_values"]',
}


def _advice_for(kind: type) -> str:
    return _ADVICE.get(kind.__name__, _ADVICE.get(kind.__module__.split(".")[0], "pass the images alone"))


def check_images(images: Tensor) -> None:
    """Check that images are (B, C, H, W), floating point and in [0, 1].

    Pixels that are not finite pass this check, because the guard refuses such images itself.

    Raises:
        InputError: if the check fails.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            f"expected images as a tensor of shape (B, C, H, W), got {type(images).__name__}; "
            f"{_advice_for(type(images))}"
        )
    if images.ndim != 4:
        shape = tuple(images.shape)
        advice = (
            "images[None] makes a batch of one image (C, H, W), and images[:, None] one of grey images (B, H, W)"
            if images.ndim == 3
            else "are images and labels in their places?"
        )
        raise InputError(f"expected images of shape (B, C, H, W), got {shape}; {advice}")
    if images.dtype not in _DTYPES["floating-point"] or images.layout != torch.strided or images.is_meta:
        raise InputError(
            f"expected dense floating-point images in [0, 1], got {images.dtype} ({images.layout}, {images.device}); "
            "divide 8-bit images by 255"
        )
    if not images.shape[1:].numel():
        raise InputError(f"expected images with at least one pixel, got shape {tuple(images.shape)}")
    if (~in_range(images) & images.isfinite()).any():
        low, high = images[images.isfinite()].aminmax()
        is_grey = low >= 0 and high > 2  # normalised images have values below 0
        advice = "divide 8-bit images by 255" if is_grey else "do not normalise them yourself, the detector does"
        raise InputError(f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}; {advice}")


def check_labels(labels: Tensor, images: Tensor, num_classes: int, *, name: str = "labels") -> None:
    """Check that labels are (B,) integers in [0, K), one per image, on the images' device.

    Raises:
        InputError: if the check fails.
    """
    if not isinstance(images, Tensor) or not images.ndim:
        raise InputError(f"expected images of shape (B, C, H, W), got {type(images).__name__}")
    try:
        check_tensor(labels, name, len(images), kind="integer", like=images)
    except InputError as error:
        advice = _advice_on_labels(labels, len(images), num_classes)
        raise InputError(f"{error}; {advice}") if advice else error from None
    check_range(labels, num_classes, name=name)


def _advice_on_labels(labels: object, count: int, num_classes: int) -> str:
    """What helps with labels of a wrong form; an empty text if that cannot be told."""
    if isinstance(labels, list | tuple) and labels and all(isinstance(label, str) for label in labels):
        return "labels are numbers of classes: names.index(label) for each label, with the names in a fixed order"
    if not isinstance(labels, Tensor):
        return "make a tensor of them with torch.as_tensor(labels)"
    if labels.shape == (count, num_classes):
        return "labels.argmax(dim=1) makes class numbers of one-hot labels; mixed labels cannot be used"
    if labels.shape == (count, 1):
        return "labels.squeeze(1) takes away the second axis"
    if labels.shape == (count,) and (labels.is_floating_point() or labels.dtype == torch.bool):
        return "labels.long() makes integers of them"
    return ""


def check_range(labels: Tensor, num_classes: int, *, name: str = "labels") -> None:
    """Check that labels are in [0, K).

    Raises:
        InputError: if the check fails.
    """
    if labels.numel() and not labels.is_meta and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        low, high = int(labels.min()), int(labels.max())
        advice = "; classes are counted from 0, so subtract 1" if (low, high) == (1, num_classes) else ""
        raise InputError(f"expected {name} from 0 to {num_classes - 1}, got {low} to {high}{advice}")


def check_kind(value: object, kind: type, name: str, advice: str) -> None:
    """Check that an option is an object of a class.

    Raises:
        ConfigurationError: it is something else; the message says what to pass.
    """
    if not isinstance(value, kind):
        raise ConfigurationError(f"expected {name} to be {advice}, got {value!r:.100}")


def check_numbers(*, whole: bool = False, **values: object) -> None:
    """Check that options are numbers. Strings and booleans are refused.

    Args:
        whole: whether the numbers must be integers.
        **values: options by name.

    Raises:
        ConfigurationError: if the check fails.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            raise ConfigurationError(f"expected {'a whole number' if whole else 'a number'} as {name}, got {value!r}")


def check_linf_radius(eps: float | Tensor, shape: torch.Size | None = None) -> Tensor:
    """Check that an l∞ radius is in [0, 1], the range of the pixels.

    Args:
        eps: one radius, or one radius per image if `shape` allows it.
        shape: shape (B,) of one radius per image; None allows a single number only.

    Returns:
        The radius in float64, of shape () or (B,).

    Raises:
        InputError: the radius has another shape or is out of range.
    """
    if isinstance(eps, bool) or not isinstance(eps, Real | Tensor):
        raise InputError(f"expected a radius eps as a number, got {eps!r}")
    radii = torch.as_tensor(eps, dtype=torch.float64)
    if radii.shape not in (torch.Size([]), shape) or not bool(((radii >= 0) & (radii <= 1)).all()):
        several = "" if shape is None else f" or a tensor of shape {tuple(shape)}"
        raise InputError(f"expected a radius eps in [0, 1], one number{several}, got {eps}; {IN_GREY_LEVELS}")
    return radii


def check_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Check that K class names are all different, not empty, and encodable as UTF-8.

    Returns:
        The names as a tuple.

    Raises:
        ConfigurationError: if the check fails.
    """
    is_right = isinstance(names, Sequence) and not isinstance(names, str)
    is_right = is_right and all(isinstance(name, str) and name.strip() and is_unicode(name) for name in names)
    if not is_right or not len(set(names)) == len(names) == num_classes:
        raise ConfigurationError(
            f"expected {num_classes} class names that are all different, not empty, and encodable as UTF-8, got "
            f"{names!r}; give them in the order of the labels"
        )
    return tuple(names)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8. A file name may hold bytes that are not characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_verdicts(labels: Tensor, *verdicts: tuple[Tensor, Tensor, Tensor]) -> None:
    """Check that each verdict covers as many images as there are labels.

    Args:
        labels: (n,) true labels.
        *verdicts: tuples of predicted labels, distances and is_adversarial, each (n,).

    Raises:
        InputError: if the check fails.
    """
    count = len(labels) if isinstance(labels, Tensor) and labels.ndim else "n"
    check_tensor(labels, "labels", count, kind="integer")
    for predicted, distances, is_adversarial in verdicts:
        check_tensor(predicted, "predicted labels", count, kind="integer", like=labels)
        check_tensor(distances, "distances", count, like=labels)
        check_tensor(is_adversarial, "is_adversarial", count, kind="bool", like=labels)


def check_calibrated(thresholds: Tensor) -> None:
    """Check that thresholds have been fitted.

    Raises:
        NotCalibratedError: if a threshold is NaN.
    """
    if thresholds.is_meta or thresholds.isnan().any():
        raise NotCalibratedError(
            "this detector has no thresholds yet; call Calibrator(false_positive_rate=0.01).fit(detector, "
            "calibration_loader) first; if another thread trains it, wait for the end of the training"
        )


def check_deployable(thresholds: Tensor) -> None:
    """Check that thresholds have been fitted, and that each can refuse something.

    Raises:
        NotCalibratedError: a threshold is NaN or infinite.
    """
    check_calibrated(thresholds)
    if thresholds.isinf().any():
        classes = ", ".join(map(str, thresholds.isinf().nonzero().flatten().tolist()))
        raise NotCalibratedError(
            f"expected finite thresholds, got infinite ones for classes {classes}, which judge nothing; fit them with "
            "Calibrator before you hand the detector on"
        )
