"""By how much arithmetic alone moves suspicion, which must not decide on an image."""

from collections.abc import Iterator

import torch
from clusterguard.decision import Detector
from clusterguard.detector import Loader
from clusterguard.loaders import Pairs, Unpack
from clusterguard.modes import evaluation_mode
from clusterguard.precision import full_precision
from torch import Tensor


class FirstKept:
    """A loader that keeps the first 16 images it gives, as far as they have the size of the first."""

    def __init__(self, loader: Loader, unpack: Unpack | None = None) -> None:
        self.loader, self.unpack, self.images = loader, unpack, torch.empty(0)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # the same TypeError as of a loader without a length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in Pairs(self.loader, self.unpack):
            yield images, labels  # first, for whoever takes them checks them
            kept = images[: 16 - len(self.images)].detach().cpu()
            if not len(self.images):
                self.images = kept
            elif kept.shape[1:] == self.images.shape[1:]:
                self.images = torch.cat([self.images, kept])


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
