"""ClusterGuard: a backbone and the Gaussian mixture behind it, the module that users hold."""

from collections.abc import Sequence

from clusterguard.backbones import find_normalization, find_num_classes, make_encoder
from clusterguard.clusters import GaussianClusters
from clusterguard.decision import Evidence
from clusterguard.detector import DetectorModule, Normalize, refuse_non_finite
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn


class ClusterGuard(DetectorModule):
    """An image classifier that notices adversarial examples: a drop-in for the classifier it wraps.

    The backbone's classifier is replaced by one with m outputs, the representation. An image is labelled by the
    closest of K Gaussian clusters and refused if it lies further from that cluster's centre than the threshold.
    Untrained it knows nothing: fine-tune it with `AdversarialClusterTrainer`, then fit thresholds with
    `Calibrator`.

    Args:
        backbone: any timm model, any torchvision classification model, or any module that maps images to (B, D).
            It is copied, with its weights; the original stays as it is.
        num_classes: K; None takes the backbone's own number of classes.
        representation_dim: m, a multiple of K; None means K.
        center_scale: M, how far the class centres lie from the origin, along each of their m/K coordinates.
        mean: per channel, subtracted from images in [0, 1]; None takes what the backbone was trained with
            (timm: its configuration; torchvision: ImageNet's; other modules: nothing).
        std: per channel, the divisor after that.
        example: (B, C, H, W) images for a module whose output width cannot be found without running it.

    Raises:
        ConfigurationError: an option that cannot work, or num_classes neither given nor found.
        UnsupportedBackboneError: the backbone has no classifier to replace and no (B, D) output.

    Reference:
        arXiv 2012.03483, section 3.2 and figure 4.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU()), num_classes=10)
        >>> guard(torch.rand(4, 1, 28, 28)).shape  # logits, as any classifier
        torch.Size([4, 10])
        >>> guard.distances(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int | None = None,
        *,
        representation_dim: int | None = None,
        center_scale: float = 10.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        example: Tensor | None = None,
    ) -> None:
        classes = find_num_classes(backbone) if num_classes is None else num_classes
        if classes is None:
            raise ConfigurationError("this backbone does not tell its number of classes; pass num_classes")
        super().__init__(classes)
        found_mean, found_std = find_normalization(backbone)
        self.clusters = GaussianClusters(classes, representation_dim, center_scale=center_scale)
        self.normalize = Normalize(found_mean if mean is None else mean, found_std if std is None else std)
        self.encoder = make_encoder(backbone, self.clusters.representation_dim, example=example)
        # A backbone in eval mode makes a guard in eval mode; in a training one, frozen modules stay frozen.
        self.training = backbone.training

    def represent(self, images: Tensor) -> Tensor:
        """The representation z: images (B, C, H, W) in [0, 1] -> (B, m)."""
        representations: Tensor = self.encoder(self.normalize(images))
        return representations

    def forward(self, images: Tensor) -> Tensor:
        """Logits: images (B, C, H, W) in [0, 1] -> (B, K). Their softmax is the mixture's posterior."""
        return self.clusters.logits(self.represent(images))

    def distances(self, images: Tensor) -> Tensor:
        """Distance to every class centre: images (B, C, H, W) in [0, 1] -> (B, K), +inf for non-finite images."""
        return refuse_non_finite(images, self.clusters.distances(self.represent(images)))

    def evidence(self, images: Tensor) -> Evidence:
        """Class scores −d and suspicion d of images (B, C, H, W) in [0, 1], d (B, K) the distances."""
        distances = self.distances(images)
        return Evidence(-distances, distances)
