"""Whether the record of a calibration is still that of the detector: of its thresholds and of its weights."""

import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from clusterguard._support import digest_of
from clusterguard.detection import Calibration
from torch import Tensor, nn

if TYPE_CHECKING:
    from clusterguard.detectors._base import DetectorModule


def digest_of_values(module: nn.Module) -> str | None:
    """A digest of the weights and buffers of a module except thresholds, the same in float32 and float64.

    It takes about as long as reading the weights once. None if they have no plain values, as on the meta device.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> digest_of_values(layer) == digest_of_values(layer.double())
        True
    """
    with suppress(Exception):  # state dicts of a user's modules may hold anything
        return digest_of(
            {
                name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in module.state_dict().items()
                if name != "thresholds"
            }
        )
    return None


def current_record(detector: "DetectorModule") -> Calibration | None:
    """The record of a detector's calibration; None if its thresholds or weights are not those of the calibration.

    Args:
        detector: detector whose record is to be saved or exported.

    Warns:
        UserWarning: weights have changed since the calibration.
    """
    record = detector.calibration
    if record is None or not record.describes(detector.thresholds):
        return None
    if detector.has_calibrated_weights():
        return record
    warnings.warn(
        "the weights have changed since the thresholds were fitted, so their false-positive rate no longer holds; "
        "its record is left out, calibrate the detector again",
        stacklevel=4,
    )
    return None
