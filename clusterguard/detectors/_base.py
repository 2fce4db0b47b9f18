"""The base class of detectors that are modules, with thresholds, a checked `detect` and the record of calibration."""

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Literal, Self, TypeAlias

import torch
from clusterguard._support import (
    check_calibrated,
    check_detector,
    check_images,
    check_names,
    check_tensor,
    copy_values,
    evaluation_mode,
    in_range,
    train_when_unread,
)
from clusterguard.detection import Calibration, Detection, Detector, Evidence, decide, full_precision
from clusterguard.detectors._networks import CHANNELS_FIRST
from clusterguard.detectors._records import digest_of_values
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor, nn

ImageShape: TypeAlias = tuple[int, int, int] | Literal["any"]
"""The shape (C, H, W) of all images that a detector takes, or "any" if it takes images of several shapes."""


class DetectorModule(nn.Module, ABC):
    """Base class of detectors that are modules.

    A subclass implements `evidence`. It inherits `detect`, and `thresholds` that are saved in its state dict.

    The `evidence` of a subclass receives only pixels in [0, 1]. Pixels that rounding has moved out of this range, by at
    most 1e-4, are moved back. An image with a pixel further outside, or with one that is not finite, is always refused:
    `evidence` receives a blank image in its place, and the suspicion of this image becomes +inf.

    Args:
        num_classes: number K of classes, at least 2.
        image_shape: shape (C, H, W) of the images that the detector takes. None takes the shape of the first images
            that it is trained or calibrated on, and "any" allows all shapes.

    Raises:
        ConfigurationError: there are fewer than two classes, or the image shape is not valid.

    Attributes:
        thresholds: (K,) float32 buffer, NaN until calibrated. It stays float32 under ``.half()``. A class whose
            threshold is set to infinity by hand is never refused, unless an image cannot be judged.
        calibration: record of how the thresholds were fitted; None if they were not fitted by a `Calibrator`. The
            record holds for one precision: a conversion to or from half precision, such as ``.half()``, removes it
            with a warning, because other images are refused then. Float32 and float64 differ less than the slack for
            rounding that a `Calibrator` adds to thresholds. Other changes of weights, such as an optimizer's step or
            `load_state_dict`, are noticed when the detector is saved or exported: a warning says so, and the record is
            left out. `detect` does not look for them, because that would take as long as reading all weights.
        frozen: names of submodules that stay in eval mode while the detector is trained, such as a BatchNorm whose
            statistics must not change.
        class_names: K different names in the order of the labels; None if they are not known. Training, `align` and
            calibration take them from a data set that has them as `classes`, such as torchvision's `ImageFolder`. They
            are stored with a saved guard and in an exported graph.

    Example:
        >>> class Brighter(DetectorModule):  # labels the brightest of K pixels
        ...     def evidence(self, images):
        ...         return Evidence(images.flatten(1), 1 - images.flatten(1))
        >>> detector = Brighter(num_classes=2)
        >>> detector.thresholds = torch.tensor([0.5, 0.5])
        >>> detector.detect(torch.tensor([[[[0.2, 0.9]]], [[[0.1, 0.3]]]])).is_adversarial
        tensor([False,  True])
        >>> detector.detect(torch.tensor([[[[0.2, 1.1]]]]), check=False).is_adversarial  # a pixel above 1
        tensor([True])
    """

    thresholds: Tensor
    frozen: frozenset[str] = frozenset()
    _image_shape: ImageShape | None = None
    _class_names: tuple[str, ...] | None = None
    _calibration: Calibration | None = None
    _calibrated_values: str | None = None

    def __init__(self, num_classes: int, *, image_shape: ImageShape | None = None) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigurationError(f"expected num_classes of at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.register_buffer("thresholds", torch.full((num_classes,), torch.nan, dtype=torch.float32))
        self.image_shape = image_shape

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not _refuses(cls.evidence):  # an inherited method is wrapped already
            cls.evidence = _refusing_invalid_images(cls.evidence)  # type: ignore[method-assign, assignment]

    @property
    def calibration(self) -> Calibration | None:
        """The record of how the thresholds were fitted.

        It is None if they were not fitted by a `Calibrator`, or are not those that it fitted.
        """
        record = self._calibration
        if record is None or self.thresholds.is_meta:
            return record
        return record if record.describes(self.thresholds) else None

    @calibration.setter
    def calibration(self, record: Calibration | None) -> None:
        self._calibration = record
        self._calibrated_values = None if record is None else digest_of_values(self)

    def digest(self) -> str | None:
        """A digest of the weights and buffers except thresholds, by which others notice that they have changed.

        It takes about as long as reading all weights once, and is the same in float32 and float64.

        Returns:
            The digest; None if the weights have no plain values, as on the meta device.

        Example:
            >>> from clusterguard.detectors import ConfidenceDetector
            >>> detector = ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), num_classes=2)
            >>> before = detector.digest()
            >>> detector.classifier[1].weight.data[0, 0] += 1
            >>> detector.digest() == before
            False
        """
        return digest_of_values(self)

    def current_record(self) -> Calibration | None:
        """The record of the calibration; None if the thresholds or weights are not those of the calibration.

        It takes about as long as reading all weights once.

        Warns:
            UserWarning: weights have changed since the calibration.
        """
        record = self.calibration
        if record is None:
            return None
        if self._calibrated_values in (None, digest_of_values(self)):
            return record
        warnings.warn(
            "the weights have changed since the thresholds were fitted, so their false-positive rate no longer holds; "
            "its record is left out, calibrate the detector again",
            stacklevel=4,
        )
        return None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of the labels; None if they are not known.

        Raises:
            ConfigurationError: the names being set are not K different strings that can be encoded as UTF-8.
        """
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        self._class_names = None if names is None else check_names(names, self.num_classes)

    @abstractmethod
    def evidence(self, images: Tensor) -> Evidence:
        """The class scores and suspicion of images (B, C, H, W) in [0, 1]; differentiable in the images."""

    @property
    def image_shape(self) -> ImageShape | None:
        """(C, H, W) of the images that the detector takes; images of any other shape are an error.

        None means that the shape is not known yet, and will be that of the first images that the detector is trained or
        calibrated on. Set it to None before you train or calibrate at another size, and to "any" to allow all shapes.
        """
        return self._image_shape

    @image_shape.setter
    def image_shape(self, shape: ImageShape | None) -> None:
        if shape is not None and shape != "any":
            sides: tuple[Any, ...] = tuple(shape) if isinstance(shape, Sequence) else ()
            if len(sides) != 3 or not all(type(side) is int and side > 0 for side in sides):
                raise ConfigurationError(
                    f'expected image_shape (C, H, W) of three positive integers, "any" or None, got {shape!r}'
                )
            shape = (sides[0], sides[1], sides[2])
        self._image_shape = shape

    def check_image_shape(self, images: Tensor) -> None:
        """Check that images have the shape that this detector takes.

        Args:
            images: (B, C, H, W) images.

        Raises:
            InputError: they have another shape.
        """
        shape = self._image_shape
        if shape is not None and shape != "any" and tuple(images.shape[1:]) != shape:
            if tuple(images.shape[1:]) == (shape[1], shape[2], shape[0]):
                raise InputError(f"expected images of shape {shape}, got {tuple(images.shape[1:])}; {CHANNELS_FIRST}")
            raise InputError(
                f"expected images of shape {shape}, as this detector was made for, got {tuple(images.shape[1:])}; "
                "resize or convert them, or set detector.image_shape to None before you train or calibrate it at "
                'another size, or to "any" if it may take all sizes'
            )

    def learn_image_shape(self, images: Tensor) -> None:
        """Take only images of this shape (C, H, W) from now on, unless the shape is set already.

        Args:
            images: (B, C, H, W) images that the detector is trained or calibrated on.

        Raises:
            InputError: they are no batch of images, or do not have the shape that is set.
        """
        check_tensor(images, "images", "B", "C", "H", "W")
        if self._image_shape is None:
            _, channels, height, width = images.shape
            self.image_shape = (channels, height, width)
        self.check_image_shape(images)

    @property
    def is_calibrated(self) -> bool:
        """Whether every class has a finite threshold. An infinite one judges nothing."""
        return bool(self.thresholds.isfinite().all())

    def train(self, mode: bool = True) -> Self:
        """Put the detector and all its modules into train mode, or into eval mode.

        Train mode waits until no other thread reads the detector in eval mode.

        Args:
            mode: whether to choose train mode.

        Returns:
            The detector itself.

        Raises:
            ConfigurationError: another thread trains the detector.
        """
        train_when_unread(self, mode)
        return self

    train.only_sets_flags = True  # type: ignore[attr-defined]  # see overrides_mode_methods

    @torch.no_grad()
    def detect(self, images: Tensor, *, check: bool = True) -> Detection:
        """Label images and decide which to refuse. This always runs in eval mode, and leaves the detector in its mode.

        A detector in train mode is copied for this, apart from its weights, and is not compiled.

        It also runs in IEEE float32, whatever precision PyTorch is set to. Such a setting cannot be part of a compiled
        graph, so ``torch.compile(detector.detect)`` compiles the network alone, and ``fullgraph=True`` fails.

        Args:
            images: (B, C, H, W) floating-point images in [0, 1].
            check: whether to check images and thresholds first, which has to wait for the device. Without the check, an
                image that cannot be judged is refused instead: one with a pixel that is not finite or not in [0, 1],
                and every image while thresholds are missing.

        Returns:
            Labels, their suspicion, and whether the image is refused, each (B,).

        Raises:
            InputError: images have a wrong shape, dtype or range. The range is checked only with `check`.
            NotCalibratedError: no thresholds have been fitted. This is raised only with `check`.
        """
        if check:
            check_images(images)
            check_calibrated(self.thresholds)
        with evaluation_mode(self) as seen, full_precision():
            return decide(guarded_evidence(seen, images), seen.thresholds)

    def name_labels(self, detection: Detection) -> list[str | None]:
        """The class names of images.

        Args:
            detection: what `detect` returned.

        Returns:
            The name of each image's label; None for an image that is refused.

        Raises:
            ConfigurationError: the names of the classes are not known.

        Example:
            >>> from clusterguard.detectors import ConfidenceDetector
            >>> detector = ConfidenceDetector(nn.Flatten(), num_classes=2)
            >>> detector.class_names, detector.thresholds = ["cat", "dog"], torch.tensor([0.5, 0.5])
            >>> detector.name_labels(detector.detect(torch.tensor([[[[0.1, 0.9]]], [[[0.5, 0.4]]]])))
            ['dog', None]
        """
        names = self.class_names
        if names is None:
            raise ConfigurationError(
                "expected a detector that knows the names of its classes, got none; set detector.class_names to "
                f"{self.num_classes} names in the order of the labels"
            )
        pairs = zip(detection.labels.tolist(), detection.is_adversarial.tolist(), strict=True)
        return [None if is_refused else names[label] for label, is_refused in pairs]

    def reset_calibration(self) -> None:
        """Forget the thresholds, so that every image is refused until the next calibration."""
        self.thresholds = torch.full_like(self.thresholds, torch.nan)
        self.calibration = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy_values(self.__reduce_ex__(4)[2], memo, of=self))  # type: ignore[no-untyped-call]
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact, before = self.thresholds, self._half_precisions()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        if self.thresholds.dtype != exact.dtype:
            self.thresholds = exact.to(self.thresholds.device)
        if self._calibration is not None and self._half_precisions() != before:
            self.calibration = None
            warnings.warn(
                "the thresholds were fitted in another precision, so their false-positive rate does not hold any more; "
                "calibrate the detector again after it is converted",
                stacklevel=3,
            )
        return self

    def _half_precisions(self) -> set[torch.dtype]:
        """The floating-point types of less than 32 bits in which this detector computes."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dtype.itemsize < 4}


_OTHER_CHANNELS = "make the backbone for that many, as timm's in_chans= does, or repeat the channel of grey images"


class Normalize(nn.Module):
    """Normalises images to ``(images - mean) / std`` in each channel.

    Mean and standard deviation are in the state dict, because detections depend on them.

    Args:
        mean: mean of the pixels, one number or one per channel.
        std: positive standard deviation of the pixels, one number or one per channel.

    Raises:
        ConfigurationError: the lengths do not fit, a number is not finite, or a std is not positive.

    Example:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
        2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        mean, std = ((value,) if isinstance(value, int | float) else value for value in (mean, std))
        lengths_fit = {len(mean), len(std)} <= {1, max(len(mean), len(std))} - {0}
        if not lengths_fit or not all(map(math.isfinite, (*mean, *std))) or not all(value > 0 for value in std):
            raise ConfigurationError(
                f"expected mean and std with one finite number per channel, std positive, got {mean} and {std}"
            )
        if max(mean) > 1 and max(std) > 1:
            raise ConfigurationError(
                f"expected mean and std of pixels in [0, 1], got {mean} and {std}; divide both by 255, because images "
                "come in [0, 1]"
            )
        self.register_buffer("mean", torch.tensor(tuple(map(float, mean))).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(map(float, std))).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images: (B, C, H, W) in [0, 1] -> the same shape and dtype."""
        check_tensor(images, "images", "B", "C", "H", "W", like=self.mean)
        channels = max(len(self.mean), len(self.std))
        if channels not in (1, images.shape[1]):
            advice = CHANNELS_FIRST if images.shape[3] == channels else _OTHER_CHANNELS
            raise InputError(
                f"expected images with {channels} channels, as mean and std have, got {images.shape[1]}; {advice}"
            )
        images = images.to(torch.promote_types(images.dtype, self.mean.dtype))  # half the bits would move the verdict
        return (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)


class WithThresholds(nn.Module):
    """A detector with other thresholds, for another false-positive rate or during training.

    Args:
        detector: detector that yields evidence; it is shared, not copied.
        thresholds: (K,) thresholds, one per label.

    Raises:
        InputError: the detector yields no evidence, or the thresholds are not (K,).

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector
        >>> detector = ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), num_classes=2)
        >>> permissive = WithThresholds(detector, torch.tensor([5.0, 5.0]))
        >>> decide(permissive.evidence(torch.zeros(1, 1, 2, 2)), permissive.thresholds).is_adversarial
        tensor([False])
    """

    thresholds: Tensor

    def __init__(self, detector: Detector, thresholds: Tensor) -> None:
        super().__init__()
        check_detector(detector)
        check_tensor(thresholds, "thresholds", len(detector.thresholds))
        self.detector = detector
        self.register_buffer("thresholds", thresholds.detach())
        self.training = getattr(detector, "training", False)

    def evidence(self, images: Tensor) -> Evidence:
        """The wrapped detector's evidence on images (B, C, H, W)."""
        return self.detector.evidence(images)


def valid_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Separate images that can be judged from images that must always be refused.

    An image must be refused if it has a pixel that is not finite, or that is outside [0, 1] by more than 1e-4.

    Args:
        images: (B, C, H, W) floating-point images.

    Returns:
        The images (B, C, H, W) with every pixel in [0, 1], and a mask (B, 1) that is False for images to be refused.
        Pixels that rounding has moved out of [0, 1] are moved back. An image to be refused is replaced by a blank one.

    Raises:
        InputError: images have a wrong shape or dtype.

    Example:
        >>> images, is_valid = valid_images(torch.tensor([0.5, 1.00001, 1.1, torch.nan]).view(4, 1, 1, 1))
        >>> images.flatten(), is_valid.flatten()
        (tensor([0.5000, 1.0000, 0.0000, 0.0000]), tensor([ True,  True, False, False]))
    """
    check_tensor(images, "images", "B", "C", "H", "W")
    is_valid = in_range(images).flatten(1).all(dim=1, keepdim=True)
    # A NaN must not reach the network: runtimes treat it differently, and some layers would spread it over the batch.
    return images.masked_fill(~is_valid[..., None, None], 0).clamp(0, 1), is_valid


def guarded_evidence(detector: DetectorModule, images: Tensor) -> Evidence:
    """The evidence of a detector, which refuses invalid images even if its `evidence` was assigned after it was made.

    Args:
        detector: detector, of whose class or of which itself `evidence` may have been assigned.
        images: (B, C, H, W) floating-point images.

    Raises:
        InputError: images have a wrong shape or dtype.
    """
    evidence = detector.evidence
    return evidence(images) if _refuses(evidence) else _refuse_invalid_images(detector, evidence, images)


def _refuse_invalid_images(
    detector: DetectorModule, evidence: Callable[[Tensor], Evidence], images: Tensor
) -> Evidence:
    """The evidence of images, of which a function gets the valid ones only; all others are refused."""
    visible, is_valid = valid_images(images)
    detector.check_image_shape(images)
    scores, suspicion = evidence(visible)
    check_tensor(scores, "class_scores", "B", "K")
    check_tensor(suspicion, "suspicion", *scores.shape)
    return Evidence(scores, suspicion.masked_fill(~is_valid, torch.inf))


def _refusing_invalid_images(evidence: Callable[[Any, Tensor], Evidence]) -> Callable[[Any, Tensor], Evidence]:
    """Wrap the `evidence` of a class so that it refuses invalid images."""

    @wraps(evidence)
    def refusing(self: DetectorModule, images: Tensor) -> Evidence:
        return _refuse_invalid_images(self, partial(evidence, self), images)

    refusing.refuses_invalid_images = True  # type: ignore[attr-defined]
    return refusing


def _refuses(evidence: Callable[..., Evidence]) -> bool:
    return hasattr(evidence, "refuses_invalid_images")
