"""Gives a guard a Gaussian per class in the space of its features, without training anything."""

import warnings
from dataclasses import dataclass
from typing import final

import torch
from clusterguard._support import copy_module, evaluation_mode, sole_use
from clusterguard.detection import Loader, Unpack, full_precision
from clusterguard.detection._internal import guessing_advice
from clusterguard.detectors._alignment import FeatureSums, LastLayers, find_last_layers, read_features
from clusterguard.detectors._backbones import make_encoder
from clusterguard.detectors._dense_layers import make_layer_like
from clusterguard.detectors._feature_gaussians import FeatureGaussians
from clusterguard.detectors._guard import ClusterGuard
from clusterguard.detectors._hugging_face import MainLogits
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn

_SHRINKAGES = tuple(10.0**power for power in range(-6, 2))  # as multiples of the mean variance of a feature
_CONSTANT = 1e-10  # as a share of the mean variance, a variance that is 0 but for rounding
_TOLERATED_LOSS = 0.02  # of accuracy, some of which is only that the classifier knows the images


@final
@dataclass(frozen=True)
class FeatureFit:
    """What `fit_feature_gaussians` did.

    Attributes:
        accuracy_before: accuracy on the held-out images with the old last layer.
        accuracy_after: accuracy on the same images with Gaussians that were fitted to the other images.
        images: number of all images.
        held_out: number of held-out images.
        features: number m of features.
        shrinkage: what was added to the variance of each feature, as a multiple of their mean variance.
    """

    accuracy_before: float
    accuracy_after: float
    images: int
    held_out: int
    features: int
    shrinkage: float

    def __str__(self) -> str:
        return (
            f"Gaussians of {self.features} features fitted to {self.images} images; on {self.held_out} held-out ones: "
            f"accuracy {self.accuracy_before:.3f} before, {self.accuracy_after:.3f} after"
        )


def fit_feature_gaussians(
    guard: ClusterGuard, loader: Loader, *, unpack: Unpack | None = None, progress: str = ""
) -> FeatureFit:
    """Replace the head of a guard by `FeatureGaussians`, fitted to the features that its last layer gets.

    The features of a class have their mean, and all classes share one covariance. Both come from one pass over the
    images, in float64. An image gets the label of the nearest mean, in the Mahalanobis distance of the covariance. So
    labels can change, whereas `clusterguard.align` keeps nearly all of them. Nothing before the last layer changes, and
    the new one only whitens the features.

    A multiple of the identity is added to the covariance, which few images determine badly. It is the one under which a
    fifth of the images, 5,000 at most, is most likely. They are held out for that, and used in the end like all
    others. Calibrate the guard on other images after that.

    This helps against noise and corruptions. It does not help against an attacker who knows the guard; for that, train
    it.

    If the backbone is a module of your own whose last layer makes the logits, this layer has as many outputs as inputs
    afterwards. To load the saved guard, pass a module with such a last layer as the backbone.

    Args:
        guard: guard whose representation is the output of one linear layer. It is changed: it gets a new head and a new
            last layer, and its thresholds are forgotten.
        loader: batches of images (B, C, H, W) in [0, 1] and labels (B,), at least five images and one of every class.
        unpack: function that finds images and labels in batches of another form.
        progress: title of the progress bar; an empty title shows no bar.

    Returns:
        Accuracy before and after, and what was fitted.

    Raises:
        ConfigurationError: the representation is not the output of one linear layer.
        InputError: images or labels have a wrong shape, dtype or range, there are too few, or a class is missing.

    Warns:
        UserWarning: the accuracy falls by more than 0.02; or no more held-out images are labelled correctly before
            than by guessing, which is as it should be only for a classifier that is new.

    Reference:
        Lee et al., "A simple unified framework for detecting out-of-distribution samples and adversarial attacks"
        (2018), section 2.1.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), num_classes=2)
        >>> labels = torch.arange(100) % 2
        >>> images = (labels[:, None, None, None] * 0.5 + torch.rand(100, 1, 4, 4) / 2)
        >>> fit = fit_feature_gaussians(guard, [(images, labels)])
        >>> fit.accuracy_after, guard.distances(images).shape
        (1.0, torch.Size([100, 2]))
    """
    with sole_use(guard), evaluation_mode(guard), full_precision(), torch.no_grad():
        layers, sums, features, labels = read_features(guard, loader, unpack=unpack, progress=progress)
        right = int((_classify(guard, layers, features) == labels).sum())
        shrinkage, accuracy = _choose_shrinkage(sums, features, labels)
        sums.add(features, labels)
        centers, weight, bias = _Whitening(sums).layer(shrinkage)
    _replace(guard, layers, centers, weight, bias)
    before = right / len(labels)
    if doubt := guessing_advice(right, len(labels), guard.num_classes):
        warnings.warn(f"before the Gaussians were fitted {doubt}", stacklevel=2)
    if accuracy < before - _TOLERATED_LOSS:
        warnings.warn(
            f"labels by the nearest Gaussian are right for {accuracy:.3f} of {len(labels)} held-out images, those of "
            f"the classifier for {before:.3f}; pass more images, or use align, which keeps the labels",
            stacklevel=2,
        )
    return FeatureFit(before, accuracy, int(sums.counts.sum()), len(labels), features.shape[1], shrinkage)


def _classify(guard: ClusterGuard, layers: LastLayers, features: Tensor) -> Tensor:
    """The labels (B,) that the guard gives images with these features (B, D)."""
    bias = layers.fitted.bias
    outputs = features @ layers.fitted.weight.flatten(1).T + (0 if bias is None else bias)
    if layers.repeater is not None:
        outputs = layers.repeater(outputs)
    return guard.head.distances(outputs).argmin(dim=1)


class _Whitening:
    """Computes the layer that whitens features, for any amount of shrinkage.

    Args:
        sums: image counts and feature sums for each class, and the second moments of the features.
    """

    def __init__(self, sums: FeatureSums) -> None:
        number, self.means = sums.counts.sum(), sums.by_class / sums.counts[:, None]
        self.overall = sums.by_class.sum(dim=0) / number
        variances, self.directions = torch.linalg.eigh((sums.squares - self.means.T @ sums.by_class) / number)
        self.variances: Tensor = variances.clamp_min(0)

    def shrunk(self, shrinkage: float) -> Tensor:
        """The variance (D,) along each direction, with a multiple of the mean variance added."""
        added = (shrinkage * self.variances.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        return self.variances + added

    def layer(self, shrinkage: float) -> tuple[Tensor, Tensor, Tensor]:
        """The whitened class means (K, D), and the weight (D, D) and the bias (D,) of a layer that whitens features."""
        weight = self.shrunk(shrinkage).rsqrt()[:, None] * self.directions.T
        return (self.means - self.overall) @ weight.T, weight, -weight @ self.overall


def _choose_shrinkage(sums: FeatureSums, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """The shrinkage under which held-out images are most likely, and the accuracy on them."""
    whitening, features = _Whitening(sums), features.double()
    spread = ((features - whitening.means[labels]) @ whitening.directions).square().mean(dim=0)
    # A feature that never changes, such as that of a dead unit, would be the more likely the smaller its variance.
    changes = torch.maximum(spread, whitening.variances) > _CONSTANT * whitening.variances.mean()

    def surprise(shrinkage: float) -> float:
        shrunk = whitening.shrunk(shrinkage)
        return float((shrunk.log() + spread / shrunk)[changes].sum())

    best = min(_SHRINKAGES, key=surprise)
    centers, weight, bias = whitening.layer(best)
    predicted = torch.cdist(features @ weight.T + bias, centers).argmin(dim=1)
    return best, float((predicted == labels).double().mean())


def _replace(guard: ClusterGuard, layers: LastLayers, centers: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Give a guard the head of these centres (K, D), and a last layer of this weight (D, D) and bias (D,)."""
    head = FeatureGaussians(*centers.shape).to(centers.device)
    head.centers.copy_(centers)
    before = guard.encoder, guard.head
    guard.encoder, guard.head = _widen(guard.encoder, layers, len(bias)), head
    try:
        with sole_use(guard), evaluation_mode(guard), torch.no_grad():
            find_last_layers(guard, layers.example).put(weight, bias)
    except BaseException:
        guard.encoder, guard.head = before
        raise
    guard.reset_calibration()


def _widen(encoder: nn.Module, layers: LastLayers, width: int) -> nn.Module:
    """A copy of an encoder with a new last layer of as many outputs as the layer has inputs."""
    if type(encoder) is not nn.Sequential:  # a model of a family
        wide = make_encoder(encoder.model if isinstance(encoder, MainLogits) else encoder, width)
        wide.training = encoder.training
        return wide
    *before, last = encoder
    wide = copy_module(encoder)
    if layers.repeater is not None:  # the classifier inside passes its inputs on
        paths = [name for name, module in encoder.named_modules() if module is layers.fitted]
        passing = make_layer_like(layers.fitted, width)
        with torch.no_grad():
            passing.weight.copy_(torch.eye(width).reshape(passing.weight.shape))
            if passing.bias is not None:
                passing.bias.zero_()
        for path in paths:
            wide.set_submodule(path, passing)
    if not isinstance(last, nn.Linear):
        raise ConfigurationError(f"expected an encoder whose last layer is nn.Linear, got {type(last).__name__}")
    wide[len(before)] = nn.Linear(width, width, device=last.weight.device, dtype=last.weight.dtype)
    wide[len(before)].training = last.training
    return wide
