"""What every detector that is a module shares: thresholds, the checked `detect`, calibration's record."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from clusterguard.checks import check_calibrated, check_detector, check_images, check_labels, check_tensor
from clusterguard.decision import Detection, Detector, Evidence, decide
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.modes import evaluation_mode
from clusterguard.processes import collect, share
from torch import Tensor, nn
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator
    from clusterguard.calibration import Calibration
    from typing_extensions import Self

Loader = Iterable[tuple[Tensor, Tensor]]
"""Batches of images (B, C, H, W) and labels (B,): a DataLoader, or a list of such pairs."""


class DetectorModule(nn.Module, ABC):
    """Base of detectors that are modules: write `evidence`, get `detect`, `thresholds` and their persistence.

    Args:
        num_classes: K, at least 2.

    Raises:
        ConfigurationError: fewer than two classes.

    Attributes:
        thresholds: (K,) float32 buffer, NaN until calibrated. It stays float32 under ``.half()``, because
            rounding a threshold would void its calibration.
        calibration: how the thresholds were fitted; None if they were not, or not by a `Calibrator`.

    Example:
        >>> class Brighter(DetectorModule):  # of K pixels
        ...     def evidence(self, images):
        ...         return Evidence(images.flatten(1), 1 - images.flatten(1))
        >>> detector = Brighter(num_classes=2)
        >>> detector.thresholds = torch.tensor([0.5, 0.5])
        >>> detector.detect(torch.tensor([[[[0.2, 0.9]]], [[[0.1, 0.3]]]])).is_adversarial
        tensor([False,  True])
    """

    thresholds: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigurationError(f"expected num_classes of at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.register_buffer("thresholds", torch.full((num_classes,), torch.nan))
        self.calibration: Calibration | None = None

    @abstractmethod
    def evidence(self, images: Tensor) -> Evidence:
        """The class scores and suspicion of images (B, C, H, W) in [0, 1]; differentiable in the images."""

    @property
    def is_calibrated(self) -> bool:
        """Whether every class has a threshold."""
        return not bool(self.thresholds.isnan().any())

    @torch.no_grad()
    def detect(self, images: Tensor, *, check: bool = True) -> Detection:
        """Label images and say which to refuse, in eval mode whatever mode the module is in.

        Args:
            images: (B, C, H, W), floating point, in [0, 1].
            check: whether to check images and thresholds first. It costs a wait for the device; without it
                what cannot be judged (an image that is not finite, a missing threshold) is refused all the same.

        Returns:
            Labels, their suspicion, and the verdict, each (B,).

        Raises:
            InputError: images of a wrong shape, dtype or range.
            NotCalibratedError: no thresholds have been fitted.
        """
        if check:
            check_images(images)
            check_calibrated(self.thresholds)
        with evaluation_mode(self):
            return decide(self.evidence(images), self.thresholds)

    def reset_calibration(self) -> None:
        """Forget the thresholds, so that everything is refused until the next calibration."""
        self.thresholds = torch.full_like(self.thresholds, torch.nan)
        self.calibration = None

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
        >>> from clusterguard import ConfidenceDetector
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

    def evidence(self, images: Tensor) -> Evidence:
        """The wrapped detector's evidence on images (B, C, H, W)."""
        return self.detector.evidence(images)


@torch.no_grad()
def judge(
    detector: Detector, loader: Loader, *, accelerator: "Accelerator | None" = None, progress: str = ""
) -> tuple[Detection, Tensor]:
    """Run a detector in eval mode over a whole loader; only verdicts are kept, so memory does not grow with images.

    Args:
        detector: whatever yields evidence; without thresholds everything is refused, labels and suspicion still count.
        loader: batches of images (B, C, H, W) in [0, 1] and labels (B,).
        accelerator: whose processes take a batch each, in turn; all of them get all verdicts.
        progress: the progress bar's title; empty shows none.

    Returns:
        Verdicts on all n images, and their labels (n,), on the CPU.

    Raises:
        InputError: images or labels of a wrong shape, dtype or range, or an empty loader.
    """
    check_detector(detector)
    verdicts: dict[int, list[Tensor]] = {}
    with evaluation_mode(detector):
        bar = tqdm(loader, desc=progress, disable=not progress, leave=False)
        for position, (images, labels) in share(bar, accelerator):
            check_images(images)
            check_labels(labels, images, len(detector.thresholds))
            evidence = detector.evidence(images.to(detector.thresholds.device))
            verdict = decide(evidence, detector.thresholds)
            verdicts[position] = [part.cpu() for part in (*verdict, labels)]
    found = collect(verdicts, accelerator)
    if not found:
        raise InputError("expected a loader with at least one batch, got an empty one")
    *judged, all_labels = map(torch.cat, zip(*found, strict=True))
    return Detection(*judged), all_labels


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


def refuse_non_finite(images: Tensor, suspicion: Tensor) -> Tensor:
    """Suspicion (B, K), made +inf where the image has a pixel that is not finite.

    Activations such as sigmoid turn an infinite pixel into an ordinary number; the guard must refuse it anyway.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    return suspicion.masked_fill(~finite[:, None], torch.inf)
