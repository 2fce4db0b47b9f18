"""A head of Gaussians that are fitted to the features of a trained classifier, one a class, with one covariance."""

from typing import Any

import torch
from clusterguard._support import check_tensor
from clusterguard.detectors._head_bounds import Bounds, RepresentationBox
from clusterguard.detectors._heads import Head
from einops import reduce
from torch import Tensor


class FeatureGaussians(Head):
    """A Gaussian per class, with the mean of the features of its images; all classes share one covariance.

    `clusterguard.detectors.fit_feature_gaussians` makes a guard with this head from a trained classifier. The last
    layer of that guard whitens the features. So the representation z of an image has the identity as its covariance
    within each class, and its Euclidean distance to a centre is the Mahalanobis distance of its features to the mean of
    the class. Before it is fitted, all centres are 0.

    The distances of B images take memory for B·K·m numbers.

    Args:
        num_classes: number K of classes, at least 2.
        representation_dim: number m of features.

    Attributes:
        centers: (K, m) buffer, the whitened means of the classes; their mean over all images is 0.

    Raises:
        ConfigurationError: there are too few classes or features.

    Reference:
        Lee et al., "A simple unified framework for detecting out-of-distribution samples and adversarial attacks"
        (2018), section 2.1. There the label is that of the classifier; here it is the class at the smallest distance.

    Example:
        >>> head = FeatureGaussians(num_classes=2, representation_dim=3)
        >>> head.centers = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0]])
        >>> head.distances(torch.tensor([[3.0, 4.0, 0.0]]))
        tensor([[4.0000, 7.2111]])
    """

    centers: Tensor

    def __init__(self, num_classes: int, representation_dim: int) -> None:
        super().__init__(num_classes, representation_dim)
        self.register_buffer("centers", torch.zeros(num_classes, representation_dim))

    def extra_repr(self) -> str:
        """The values of K and m, which are shown when the module is printed."""
        return f"num_classes={self.num_classes}, representation_dim={self.representation_dim}"

    def distances(self, representations: Tensor) -> Tensor:
        """The Euclidean distance to every centre: (B, m) -> (B, K). Its gradient is finite at the centre too."""
        squared = self.energies(representations)
        return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()

    def energies(self, representations: Tensor) -> Tensor:
        """The squared distance to every centre: (B, m) -> (B, K)."""
        return reduce((self._wide(representations)[:, None] - self.centers).square(), "b k m -> b k", "sum")

    def adversarial_energy(self, representations: Tensor) -> Tensor:
        """The squared distance to the origin, where the mean of all features is: (B, m) -> (B,)."""
        return reduce(self._wide(representations).square(), "b m -> b", "sum")

    @property
    def packing_radius(self) -> Tensor:
        """Half the distance of each centre to the nearest other one, (K,)."""
        gaps = (self.centers[:, None] - self.centers).norm(dim=2)
        itself = torch.eye(len(gaps), dtype=torch.bool, device=gaps.device)
        nearest: Tensor = gaps.masked_fill(itself, torch.inf).amin(dim=1)
        return nearest / 2

    def describe(self) -> str:
        """The head in words, for model cards."""
        return f"Gaussians with one covariance, fitted to {self.representation_dim} features"

    def bound_distances(self, box: RepresentationBox, labels: Tensor) -> Bounds:
        """Bounds on distances, computed or exact; leads follow the network's last layer.

        Args:
            box: box of B representations.
            labels: (B,) class labels.
        """
        error = torch.zeros_like(box.lower) if box.error is None else box.error
        lower, upper = (box.lower - error)[:, None], (box.upper + error)[:, None]
        centers = self.centers.to(lower)
        label_centers = centers[labels.long()]
        # Squared distances to z differ by 2⟨z, label's centre − other centre⟩ and by the squared norms of the centres.
        directions = label_centers[:, None] - centers
        squares = centers.square().sum(dim=1)
        leads = 2 * (box.lowest(directions) - box.slack(directions)) + squares - squares[labels.long()][:, None]
        nearest = torch.maximum(lower - centers, centers - upper).clamp_min(0).square().sum(dim=2)
        reach = (
            torch.maximum(upper - centers, centers - lower).square().sum(dim=2)
        )  # at least 0, as the box is not empty
        farthest = reach.gather(1, labels[:, None].long())
        if box.arithmetic is not None:  # all terms of a computed distance are at least 0, so its errors are relative
            share = box.arithmetic.gamma(self.representation_dim + 12)
            smallest = self.representation_dim * box.arithmetic.smallest
            nearest, farthest = nearest * (1 - share) - smallest, farthest * (1 + share) + smallest
            farthest = torch.where(farthest < box.arithmetic.largest, farthest, torch.inf)
            leads = leads - share * (reach + reach.gather(1, labels[:, None].long())) - 2 * smallest
            leads = leads.masked_fill(reach >= box.arithmetic.largest, -torch.inf)
        is_label = torch.nn.functional.one_hot(labels.long(), self.num_classes).bool()
        low, high = (part.clamp_min(torch.finfo(part.dtype).tiny).sqrt() for part in (nearest, farthest))
        unit = 0.0 if box.arithmetic is None else 4 * box.arithmetic.unit
        return Bounds(low * (1 - unit), leads.masked_fill(is_label, 0), high.squeeze(1) * (1 + unit))

    def _wide(self, representations: Tensor) -> Tensor:
        check_tensor(representations, "representations", "B", self.representation_dim)
        return representations.to(torch.promote_types(representations.dtype, torch.float32))

    def options(self) -> dict[str, Any]:
        """The number m of features."""
        return {"representation_dim": self.representation_dim}
