"""What calibration finds out beside the verdicts: the images' shape, and how far arithmetic moves suspicion."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from clusterguard._support import evaluation_mode
from clusterguard.detection._decision import Detector
from clusterguard.detection._judging import check_repeated
from clusterguard.detection._loaders import Loader, Pairs, Unpack
from clusterguard.detection._precision import full_precision
from torch import Tensor


@runtime_checkable
class KeepsCalibration(Protocol):
    """A detector that keeps the record of its calibration, and takes images of the shape that it has learned."""

    calibration: Any
    image_shape: Any

    def learn_image_shape(self, images: Tensor) -> None:
        """Take only images of this shape from now on, unless the shape is decided already."""


class CalibrationBatches:
    """A loader's batches; once the detector has judged the first of them, they teach it their shape.

    The same images must then get the same evidence again. The first 16 images are kept, as far as they have the size
    of the first.

    Args:
        loader: as for `judge`.
        detector: that judges the batches.
        unpack: as for `judge`.
    """

    def __init__(self, loader: Loader, detector: Detector, unpack: Unpack | None = None) -> None:
        self.loader, self.detector, self.unpack, self.images = loader, detector, unpack, torch.empty(0)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # the same TypeError as of a loader without a length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in Pairs(self.loader, self.unpack):
            yield images, labels  # first, for whoever takes them checks them
            kept = images[: 16 - len(self.images)].detach().cpu()
            if not len(self.images):
                self.images = kept
                if isinstance(self.detector, KeepsCalibration):
                    self.detector.learn_image_shape(images)
                check_repeated(self.detector, kept.to(self.detector.thresholds.device))
            elif kept.shape[1:] == self.images.shape[1:]:
                self.images = torch.cat([self.images, kept])


@contextmanager
def image_shape_kept_on_failure(detector: Detector) -> Iterator[None]:
    """Undo what a detector has learned of its images' shape if the block fails."""
    if not isinstance(detector, KeepsCalibration):
        yield
        return
    shape = detector.image_shape
    try:
        yield
    except BaseException:
        detector.image_shape = shape
        raise


@torch.no_grad()
def measure_rounding(detector: Detector, images: Tensor) -> float:
    """By how much arithmetic alone moves suspicion: four times the most that it moved when images were judged alone.

    This depends on the network and its precision, which thresholds do not tell. Where clusters are much tighter than
    their centres are apart, it is many units in the last place of a threshold. The suspicion of every class counts, for
    that of the label may round to the same number in each batch. More than 1 % of an image's largest suspicion is no
    rounding, but images of a batch that influence each other; it would open the guard and is cut off.
    """
    if not len(images):
        return 0.0
    images = images.to(detector.thresholds.device)
    with evaluation_mode(detector), full_precision():
        together = detector.evidence(images).suspicion.double()
        alone = torch.cat([detector.evidence(image).suspicion for image in images.split(1)]).double()
    largest = together.abs().masked_fill(~together.isfinite(), 0).amax(dim=1, keepdim=True)
    moved = (4 * (alone - together).abs()).minimum(0.01 * largest)
    return float(moved[moved.isfinite()].max()) if moved.isfinite().any() else 0.0
