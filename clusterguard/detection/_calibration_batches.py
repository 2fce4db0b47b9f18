"""What calibration measures besides the verdicts: the shape of the images, and how far rounding moves suspicion."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from clusterguard._support import evaluation_mode
from clusterguard.detection._arithmetic import full_precision
from clusterguard.detection._class_names import learn_class_names
from clusterguard.detection._decision import Detector
from clusterguard.detection._judging import check_evidence
from clusterguard.detection._loaders import Loader, Pairs, Unpack
from clusterguard.errors import InputError
from torch import Tensor

_LARGEST = 1e38


@runtime_checkable
class KeepsCalibration(Protocol):
    """A detector that keeps the record of its calibration and learns the shape of its images."""

    calibration: Any
    image_shape: Any

    def learn_image_shape(self, images: Tensor) -> None:
        """Take only images of this shape from now on, unless the shape is set already."""


class CalibrationBatches:
    """A loader's batches, which also teach a detector the names of its classes and the shape of its images.

    After the detector has judged the first batch, it learns the shape of these images. It must then give the same
    images the same evidence again, whatever other images are in the batch. The first 16 images that have the shape of
    the first one are kept in `images`.

    Args:
        loader: batches as for `judge`.
        detector: detector that judges the batches.
        unpack: function as for `judge`.
    """

    def __init__(self, loader: Loader, detector: Detector, unpack: Unpack | None = None) -> None:
        self.loader, self.detector, self.unpack, self.images = loader, detector, unpack, torch.empty(0)
        learn_class_names(detector, loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without a length raises its TypeError here too

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in Pairs(self.loader, self.unpack):
            if len(self.images) and isinstance(self.detector, KeepsCalibration):
                self.detector.learn_image_shape(images)  # what judges may be a view that does not know the shape yet
            yield images, labels  # before they are used below, because the caller checks them
            kept = images[: 16 - len(self.images)].detach().cpu()
            if not len(self.images):
                self.images = kept
                if isinstance(self.detector, KeepsCalibration):
                    self.detector.learn_image_shape(images)
                check_evidence(self.detector, images)
            elif kept.shape[1:] == self.images.shape[1:]:
                self.images = torch.cat([self.images, kept])


@contextmanager
def image_shape_kept_on_failure(detector: Detector) -> Iterator[None]:
    """Restore the detector's `image_shape` if the block fails."""
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
    """The slack for rounding: four times the largest change of suspicion when images are judged alone, not as a batch.

    The change depends on the network and its precision, so it cannot be derived from the thresholds. If clusters are
    much tighter than the distance between their centres, it is many units in the last place of a threshold. The
    suspicion of every class counts, because the suspicion of the label may happen to round to the same number in both
    cases. The slack is limited to 1 % of an image's largest suspicion, because a larger one would make the guard accept
    too much. `check_evidence` refuses detectors whose images influence each other.
    """
    if not len(images):
        return 0.0
    images = images.to(detector.thresholds.device)
    with evaluation_mode(detector) as detector, full_precision():
        together = detector.evidence(images).suspicion.double()
        alone = torch.cat([detector.evidence(image).suspicion for image in images.split(1)]).double()
    largest = together.abs().masked_fill(~together.isfinite(), 0).amax(dim=1, keepdim=True)
    moved = (4 * (alone - together).abs()).minimum(0.01 * largest)
    return float(moved[moved.isfinite()].max()) if moved.isfinite().any() else 0.0


def check_finite(thresholds: Tensor) -> None:
    """Check that thresholds are numbers that images can be compared with.

    Raises:
        InputError: one is not finite, or too large.
    """
    if not bool((thresholds.abs() <= _LARGEST).all()):
        raise InputError(
            f"expected suspicion of benign examples to be finite and at most {_LARGEST:.0e}, got infinite, NaN or "
            "larger values where a threshold would lie; inspect the images with such values"
        )
