"""What every detector that is a module shares: thresholds, the checked `detect`, calibration's record."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from clusterguard._support import (
    CopiedValues,
    check_calibrated,
    check_detector,
    check_images,
    check_names,
    check_tensor,
    evaluation_mode,
    in_range,
)
from clusterguard.detection import Calibration, Detection, Detector, Evidence, decide, full_precision
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

ImageShape: TypeAlias = tuple[int, int, int] | Literal["any"]
"""The (C, H, W) of all images that a detector takes, or "any" where it takes images of several shapes."""


class DetectorModule(nn.Module, ABC):
    """Base of detectors that are modules: write `evidence`, get `detect`, `thresholds` and their persistence.

    The `evidence` that you write sees pixels in [0, 1] alone. Pixels that rounding moved out of it, by 1e-4 at most,
    are moved back. An image with any other pixel, or one that is not finite, is refused: your `evidence` sees a blank
    image in its place, and its suspicion is +inf whatever that says.

    Args:
        num_classes: K, at least 2.
        image_shape: (C, H, W) of the images that it takes; None takes the shape of those that it is trained or
            calibrated on first, "any" leaves it free.

    Raises:
        ConfigurationError: fewer than two classes, or an image shape that is none.

    Attributes:
        thresholds: (K,) float32 buffer, NaN until calibrated. It stays float32 under ``.half()``, because
            rounding a threshold would void its calibration.
        calibration: how the thresholds were fitted; None if they were not, or not by a `Calibrator`.
        frozen: names of submodules that stay in eval mode while the detector is trained, such as those of a BatchNorm
            whose statistics must not move.
        class_names: K different names in the order of the labels; None if they are not known. They travel with a saved
            guard and an exported graph.

    Example:
        >>> class Brighter(DetectorModule):  # of K pixels
        ...     def evidence(self, images):
        ...         return Evidence(images.flatten(1), 1 - images.flatten(1))
        >>> detector = Brighter(num_classes=2)
        >>> detector.thresholds = torch.tensor([0.5, 0.5])
        >>> detector.detect(torch.tensor([[[[0.2, 0.9]]], [[[0.1, 0.3]]]])).is_adversarial
        tensor([False,  True])
        >>> detector.detect(torch.tensor([[[[0.2, 1.1]]]]), check=False).is_adversarial  # no image has such a pixel
        tensor([True])
    """

    thresholds: Tensor
    frozen: frozenset[str] = frozenset()
    _image_shape: ImageShape | None = None
    _class_names: tuple[str, ...] | None = None

    def __init__(self, num_classes: int, *, image_shape: ImageShape | None = None) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigurationError(f"expected num_classes of at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.register_buffer("thresholds", torch.full((num_classes,), torch.nan))
        self.calibration: Calibration | None = None
        self.image_shape = image_shape

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls.evidence, "refuses_invalid_images"):  # an inherited one does already
            cls.evidence = _refusing_invalid_images(cls.evidence)  # type: ignore[method-assign, assignment]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes' names, in the order of the labels; None if they are not known.

        Raises:
            ConfigurationError: when they are set, unless they are K different strings that UTF-8 can write.
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
        """(C, H, W) of the images that it takes; any other shape is an error.

        None means that nothing is known yet: the first images that it is trained or calibrated on decide. Set it to
        None before you train or calibrate at another size, and to "any" to leave the shape free.
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
        """Make sure that images have the shape that this detector takes.

        Args:
            images: (B, C, H, W).

        Raises:
            InputError: they have another one.
        """
        shape = self._image_shape
        if shape is not None and shape != "any" and tuple(images.shape[1:]) != shape:
            raise InputError(
                f"expected images of shape {shape}, as this detector was made for, got {tuple(images.shape[1:])}; "
                "resize or convert them, or set detector.image_shape, to None before you train or calibrate it at "
                'another size, or to "any" if it shall take all sizes'
            )

    def learn_image_shape(self, images: Tensor) -> None:
        """Take only images of this shape (C, H, W) from now on, unless the shape is decided already.

        Args:
            images: (B, C, H, W), of those that the detector is trained or calibrated on.

        Raises:
            InputError: they have another shape than is decided, or are no batch of images.
        """
        check_tensor(images, "images", "B", "C", "H", "W")
        if self._image_shape is None:
            _, channels, height, width = images.shape
            self.image_shape = (channels, height, width)
        self.check_image_shape(images)

    @property
    def is_calibrated(self) -> bool:
        """Whether every class has a threshold."""
        return not bool(self.thresholds.isnan().any())

    @torch.no_grad()
    def detect(self, images: Tensor, *, check: bool = True) -> Detection:
        """Label images and say which to refuse, in eval mode whatever mode the module is in.

        Args:
            images: (B, C, H, W), floating point, in [0, 1].
            check: whether to check images and thresholds first. It costs a wait for the device; without it what
                cannot be judged is refused all the same: an image with a pixel that is not finite or not in [0, 1], and
                any image while thresholds are missing.

        Returns:
            Labels, their suspicion, and the verdict, each (B,).

        Raises:
            InputError: images of a wrong shape, dtype or range; of the range only with `check`.
            NotCalibratedError: no thresholds have been fitted; only with `check`.
        """
        if check:
            check_images(images)
            check_calibrated(self.thresholds)
        with evaluation_mode(self), full_precision():
            return decide(self.evidence(images), self.thresholds)

    def reset_calibration(self) -> None:
        """Forget the thresholds, so that everything is refused until the next calibration."""
        self.thresholds = torch.full_like(self.thresholds, torch.nan)
        self.calibration = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Self":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with CopiedValues():  # a weight that was computed for the last batch is no reason to fail
            copied.__setstate__(copy.deepcopy(self.__reduce_ex__(4)[2], memo))  # type: ignore[no-untyped-call]
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        exact = self.thresholds
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        if self.thresholds.dtype != exact.dtype:
            self.thresholds = exact.to(self.thresholds.device)
        return self


class Normalize(nn.Module):
    """(images - mean) / std per channel, with both in the state dict, since a detection depends on them.

    Args:
        mean: one number, or one per channel.
        std: one positive number, or one per channel.

    Raises:
        ConfigurationError: lengths that do not fit, or a std that is not positive.

    Example:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
        2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        lengths_fit = {len(mean), len(std)} <= {1, max(len(mean), len(std))} - {0}
        if not lengths_fit or not all(map(math.isfinite, (*mean, *std))) or not all(value > 0 for value in std):
            raise ConfigurationError(
                f"expected mean and std with one finite number per channel, std positive, got {mean} and {std}"
            )
        self.register_buffer("mean", torch.tensor(tuple(map(float, mean))).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(map(float, std))).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> the same shape, normalised, in the images' dtype."""
        check_tensor(images, "images", "B", "C", "H", "W", like=self.mean)
        channels = max(len(self.mean), len(self.std))
        if channels not in (1, images.shape[1]):
            raise InputError(
                f"expected images with {channels} channels, got {images.shape[1]}; "
                "pass mean and std for the backbone's channels if it takes these images"
            )
        return (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)


class WithThresholds(nn.Module):
    """The same detector at other thresholds, for other false-positive rates or while training.

    Args:
        detector: whatever yields evidence; it is shared, not copied.
        thresholds: (K,).

    Raises:
        InputError: it yields no evidence, or thresholds are not (K,).

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


def run_network(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a network makes of images (B, C, H, W); where it cannot run on them, that is an error of theirs.

    Raises:
        InputError: the network fails on images of this size, dtype or device.
    """
    if torch.compiler.is_compiling():
        return network(images)
    try:
        return network(images)
    except (RuntimeError, AssertionError) as error:
        if type(error) not in (RuntimeError, NotImplementedError, AssertionError):
            raise  # of memory or the device, which other images do not help
        raise InputError(
            f"expected images that the network can take, got {images.dtype} of shape {tuple(images.shape)} on "
            f"{images.device}; it failed with: {error}"
        ) from error


def valid_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Tell images that can be judged from those that must be refused, whatever the network makes of them.

    Args:
        images: (B, C, H, W), floating point.

    Returns:
        The images (B, C, H, W) with every pixel in [0, 1]: what rounding moved out of it is moved back, and an image to
        be refused is blank. And (B, 1), False for images to be refused: they have a pixel that is not finite, or out of
        [0, 1] by more than 1e-4.

    Raises:
        InputError: images of a wrong shape or dtype.

    Example:
        >>> images, is_valid = valid_images(torch.tensor([0.5, 1.00001, 1.1, torch.nan]).view(4, 1, 1, 1))
        >>> images.flatten(), is_valid.flatten()
        (tensor([0.5000, 1.0000, 0.0000, 0.0000]), tensor([ True,  True, False, False]))
    """
    check_tensor(images, "images", "B", "C", "H", "W")
    is_valid = in_range(images).flatten(1).all(dim=1, keepdim=True)
    # A NaN must not reach the network: runtimes differ in what they make of it, and some layers see a whole batch.
    return images.masked_fill(~is_valid[..., None, None], 0).clamp(0, 1), is_valid


def _refusing_invalid_images(evidence: Callable[[Any, Tensor], Evidence]) -> Callable[[Any, Tensor], Evidence]:
    """The method `evidence` of a detector that sees valid images only, and whose answer to others is overruled."""

    @wraps(evidence)
    def refusing(self: DetectorModule, images: Tensor) -> Evidence:
        visible, is_valid = valid_images(images)
        self.check_image_shape(images)
        scores, suspicion = evidence(self, visible)
        check_tensor(scores, "class_scores", "B", "K")
        check_tensor(suspicion, "suspicion", *scores.shape)
        return Evidence(scores, suspicion.masked_fill(~is_valid, torch.inf))

    refusing.refuses_invalid_images = True  # type: ignore[attr-defined]
    return refusing
