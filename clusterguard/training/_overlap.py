"""Finds calibration images that are also trained on, by comparing pixels."""

import warnings

import torch
from torch import Tensor

_KEPT = 64  # images
_PIXELS = 256  # of an image that are compared


class Overlap:
    """Compares some calibration images with all training images of the first epoch.

    It finds copies that no loader tells of. Images that a transform changes are not found.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget all images."""
        self._kept: set[bytes] = set()
        self._met: set[bytes] = set()

    def keep(self, images: Tensor) -> None:
        """Remember calibration images (B, C, H, W), as long as there is room."""
        self._kept |= set(_digests(images[: max(0, _KEPT - len(self._kept))]))

    def compare(self, images: Tensor) -> None:
        """Look for the remembered calibration images among training images (B, C, H, W)."""
        if self._kept:
            self._met |= self._kept.intersection(_digests(images))

    def warn(self) -> None:
        """Warn if most of the remembered images were found, and forget them.

        Warns:
            UserWarning: calibration images are trained on.
        """
        if self._kept and len(self._met) > len(self._kept) / 2:
            warnings.warn(
                f"{len(self._met)} of {len(self._kept)} calibration images that were compared are trained on. "
                "Thresholds that are fitted to them refuse too many new images; keep the calibration images out of "
                "training",
                stacklevel=4,
            )
        self.forget()


def _digests(images: Tensor) -> list[bytes]:
    if not len(images):
        return []
    flat = images.detach().flatten(1)
    some = flat[:, :: max(1, flat.shape[1] // _PIXELS)].to("cpu", torch.float32).contiguous()
    return [row.tobytes() for row in some.numpy()]
