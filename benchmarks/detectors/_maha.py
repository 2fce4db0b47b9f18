"""Mahalanobis distance of an image's features to the mean of its class. All classes share one covariance.

As in Lee et al., the label is that of the classifier. Their suspicion is the smallest distance to any class. Here it is
the distance to the class that the image is labelled as, like that of the paper's other detectors. Lee et al. also
combine the distances of all layers by a logistic regression and add noise to the input. The paper's Table 1 does
neither.
"""

from dataclasses import replace

import torch
from clusterguard import DetectorModule, Evidence
from clusterguard.detection import Loader
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.detectors._features import FeatureDetector, check_class_sizes, fit_after_training
from benchmarks.detectors._vanilla import VANILLA


class MahalanobisDetector(FeatureDetector):
    """A classifier with the Mahalanobis distance of its features to the mean of each class as suspicion.

    The distance is not squared.

    Attributes:
        whitening: matrix (D, D). The product of features with it has unit covariance within classes. Its columns are 0
            for directions in which features do not vary.
        means: means (K, D) of the classes after whitening.
    """

    whitening: Tensor
    means: Tensor

    def __init__(self, trained: DetectorModule) -> None:
        super().__init__(trained)
        self.register_buffer("whitening", torch.full((self.num_features, self.num_features), torch.nan))
        self.register_buffer("means", torch.full((self.num_classes, self.num_features), torch.nan))

    def fit(self, batches: Loader) -> None:
        """Compute the means and the covariance over all batches, in one pass and in float64."""
        sums = torch.zeros_like(self.means, dtype=torch.float64)
        squares = torch.zeros_like(self.whitening, dtype=torch.float64)
        counts = sums.new_zeros(self.num_classes)
        for features, labels in self.all_features(batches):
            wide, members = features.double(), one_hot(labels, self.num_classes).double()
            counts, sums, squares = counts + members.sum(dim=0), sums + members.T @ wide, squares + wide.T @ wide
        check_class_sizes(counts, 1)
        means = sums / counts[:, None]
        whitening = whiten((squares - means.T @ sums) / counts.sum())
        self.whitening, self.means = whitening.to(self.whitening.dtype), (means @ whitening).to(self.means.dtype)

    def evidence(self, images: Tensor) -> Evidence:
        """Logits as class scores, distances as suspicion, of images (B, C, H, W) in [0, 1]."""
        features, logits = self.features_and_logits(images)
        with torch.autocast(images.device.type, enabled=False):  # autocast would multiply in half precision
            white = features @ self.whitening.to(features.dtype)
            distances = torch.cdist(white, self.means.to(white.dtype), compute_mode="donot_use_mm_for_euclid_dist")
        return Evidence(logits, distances)


def whiten(covariance: Tensor) -> Tensor:
    """A matrix W (D, D) such that W @ W.T is the pseudo-inverse of a covariance (D, D)."""
    variances, directions = torch.linalg.eigh(covariance)
    some = variances > 1e-6 * variances[-1]  # features after a ReLU may be constant, or depend on each other
    root: Tensor = directions * torch.where(some, variances, torch.inf).rsqrt()
    return root


MAHA = replace(
    VANILLA,
    title="MAHA",
    reference="Lee et al., A simple unified framework for detecting out-of-distribution samples and adversarial "
    "attacks (2018)",
    finish=fit_after_training(MahalanobisDetector),
    objective="adaptive",
)
