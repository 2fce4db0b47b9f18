"""Feature squeezing: an image is suspicious if a median filter changes its class probabilities.

The paper compares with the median filter alone; Xu et al. also join it with fewer grey levels and non-local means.
"""

from dataclasses import replace

from clusterguard import Evidence
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.detectors.features import FeatureDetector, fitted
from benchmarks.detectors.vanilla import VANILLA


class FeatureSqueezing(FeatureDetector):
    """A classifier under ‖p(x) − p(median(x))‖₁, the same for every label."""

    def evidence(self, images: Tensor) -> Evidence:
        """Logits as class scores, the change of the probabilities as suspicion, of images (B, C, H, W)."""
        logits, squeezed = self.read(images)[1], self.read(median(images))[1]
        change = (logits.softmax(dim=1) - squeezed.softmax(dim=1)).abs().sum(dim=1, keepdim=True)
        return Evidence(logits, change.expand_as(logits))


def median(images: Tensor) -> Tensor:
    """Median of each pixel, its left, upper and upper left neighbours: (B, C, H, W) -> the same shape.

    That is `scipy.ndimage.median_filter` with size 2 and mode "reflect", as Xu et al. call it: of four values it takes
    the third smallest, and beyond the edge it sees the edge again.
    """
    windows = pad(images, (1, 0, 1, 0), mode="replicate").unfold(2, 2, 1).unfold(3, 2, 1)
    return windows.flatten(4).sort(dim=4).values[..., 2]


FS = replace(
    VANILLA,
    title="FS",
    reference="Xu et al., Feature squeezing (2018)",
    finish=fitted(FeatureSqueezing),
    objective="adaptive",
)
