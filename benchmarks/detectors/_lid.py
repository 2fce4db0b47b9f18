"""Local intrinsic dimensionality, which is higher for the features of adversarial images.

The dimensionality is the maximum-likelihood estimate of Ma et al. from the k nearest images of a fixed reference batch.
They find it higher for adversarial images, so a high value is suspicious here, while the paper's Table 1 prints "Low".
The paper takes the score itself. Ma et al. train a classifier on the scores of all layers.
"""

from dataclasses import replace

import torch
from clusterguard import DetectorModule, Evidence
from clusterguard.detection import Loader
from torch import Tensor

from benchmarks.detectors._features import FeatureDetector, check_class_sizes, fit_after_training
from benchmarks.detectors._vanilla import VANILLA

_REFERENCES, _NEIGHBOURS = 100, 20  # Ma et al.'s mini-batch and k


class LocalDimensionality(FeatureDetector):
    """A classifier with the local intrinsic dimensionality of its features as suspicion, the same for every label.

    Attributes:
        references: features (100, D) of benign training images, equally many of each class.
    """

    references: Tensor

    def __init__(self, trained: DetectorModule) -> None:
        super().__init__(trained)
        self.register_buffer("references", torch.full((_REFERENCES, self.num_features), torch.nan))

    def fit(self, batches: Loader) -> None:
        """Take the first images of every class as references."""
        each, seen, counts = _REFERENCES // self.num_classes, [], torch.zeros(self.num_classes)
        for batch in self.all_features(batches):
            seen.append(batch)
            features, labels = map(torch.cat, zip(*seen, strict=True))
            counts = labels.bincount(minlength=self.num_classes)
            if counts.min() >= each:
                break
        check_class_sizes(counts, each)
        self.references = torch.cat([features[labels == index][:each] for index in range(self.num_classes)])

    def evidence(self, images: Tensor) -> Evidence:
        """Logits as class scores, the dimensionality as suspicion, of images (B, C, H, W) in [0, 1]."""
        features, logits = self.features_and_logits(images)
        dimensionality = local_dimensionality(features, self.references.to(features.dtype))
        return Evidence(logits, dimensionality[:, None].expand_as(logits))


def local_dimensionality(features: Tensor, references: Tensor, neighbours: int = _NEIGHBOURS) -> Tensor:
    """The dimensionality (B,) at features (B, D): −1 / mean log(rᵢ / rₖ) over the k nearest references (R, D)."""
    distances = torch.cdist(features, references, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(neighbours, largest=False, sorted=True).values
    # An image of the reference batch itself is at distance 0, where the logarithm has no value and no slope.
    logarithms = nearest.clamp_min(torch.finfo(nearest.dtype).tiny).log()
    spread = logarithms[:, -1] - logarithms.mean(dim=1)
    return 1 / spread.clamp_min(torch.finfo(spread.dtype).eps)


LID = replace(
    VANILLA,
    title="LID",
    reference="Ma et al., Characterizing adversarial subspaces using local intrinsic dimensionality (2018)",
    finish=fit_after_training(LocalDimensionality),
    objective="adaptive",
)
