"""Feature squeezing: an image is suspicious if a median filter changes its class probabilities.

The paper compares with the median filter alone. Xu et al. also combine it with fewer grey levels and non-local means.
"""

from dataclasses import replace

from clusterguard import Evidence
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.detectors._features import FeatureDetector, fit_after_training
from benchmarks.detectors._vanilla import VANILLA


class FeatureSqueezing(FeatureDetector):
    """A classifier with ‖p(x) − p(median(x))‖₁ as suspicion, the same for every label."""

    def evidence(self, images: Tensor) -> Evidence:
        """Logits as class scores, the change of the probabilities as suspicion, of images (B, C, H, W)."""
        logits, squeezed = self.features_and_logits(images)[1], self.features_and_logits(median_filter(images))[1]
        change = (logits.softmax(dim=1) - squeezed.softmax(dim=1)).abs().sum(dim=1, keepdim=True)
        return Evidence(logits, change.expand_as(logits))


def median_filter(images: Tensor) -> Tensor:
    """The median of each pixel of images (B, C, H, W) and its left, upper and upper left neighbours.

    The result is that of `scipy.ndimage.median_filter` with size 2 and mode "reflect", as Xu et al. call it. The median
    of four values is the third smallest, and pixels beyond the edge repeat the edge.
    """
    windows = pad(images, (1, 0, 1, 0), mode="replicate").unfold(2, 2, 1).unfold(3, 2, 1)
    return windows.flatten(4).sort(dim=4).values[..., 2]


FS = replace(
    VANILLA,
    title="FS",
    reference="Xu et al., Feature squeezing (2018)",
    finish=fit_after_training(FeatureSqueezing),
    objective="adaptive",
)
