"""Your own detector under the `Detector` protocol: calibration, every attack and the evaluation work on it as it is."""

import clusterguard as cg
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


class NearestMean(cg.DetectorModule):
    """Label an image by the nearest class mean of pixels, refuse it if that is far."""

    def __init__(self, means: Tensor) -> None:
        super().__init__(num_classes=len(means))
        self.register_buffer("means", means)

    def evidence(self, images: Tensor) -> cg.Evidence:
        """Minus the distances as class scores, the distances as suspicion."""
        distances = torch.cdist(images.flatten(1), self.means)
        return cg.Evidence(-distances, distances)


images, labels = cg.samples.load_digits("train").tensors
means = torch.stack([images[labels == index].flatten(1).mean(dim=0) for index in range(10)])
detector: nn.Module = NearestMean(means)
calibration, test = (DataLoader(cg.samples.load_digits(split), batch_size=250) for split in ("calibration", "test"))
cg.Calibrator(false_positive_rate=0.05, scarce="pool").fit(detector, calibration)
print(cg.evaluate(detector, cg.WorstCaseSuite("l2", eps=0.5, budget="quick"), [next(iter(test))], sanity_images=20))
