"""Fits the last layer of a guard to its class centres in closed form, without training anything else."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from clusterguard._support import bar, check_images, check_labels, evaluation_mode, sole_use
from clusterguard.detection import Loader, Pairs, Unpack, full_precision
from clusterguard.detection._internal import guessing_advice, learn_class_names, name_class, number_of_batches
from clusterguard.detectors._dense_layers import Dense, dense_layers
from clusterguard.detectors._guard import ClusterGuard
from clusterguard.detectors._heads import GaussianClusters
from clusterguard.errors import ConfigurationError, InputError
from einops import repeat
from torch import Tensor, nn
from torch.nn.functional import one_hot

_HELD_OUT_EVERY = 5
_MOST_HELD_OUT = 5000
_RIDGES = tuple(10.0**power for power in range(-8, 3))  # penalties, in multiples of the mean variance of a feature
_GOLDEN = (5**0.5 - 1) / 2
_SHARES = tuple(step / 10 for step in range(11))
_TOLERATED_LOSS = 0.005  # by which the accuracy may fall


@final
@dataclass(frozen=True)
class Alignment:
    """The result of `align`.

    Attributes:
        accuracy_before: accuracy on the held-out images with the old layer.
        accuracy_after: accuracy on the same images with the new layer, fitted to the other images.
        distance_before: mean distance of held-out images to the centre of their class, with the old layer.
        distance_after: mean distance of the same images to the centre of their class, with the new layer.
        images: number of all images.
        held_out: number of held-out images.
        share: share of the regression in the new layer, from 0 to 1. The rest of it is the scaled old layer.
        is_changed: whether the guard has got the new layer.
    """

    accuracy_before: float
    accuracy_after: float
    distance_before: float
    distance_after: float
    images: int
    held_out: int
    share: float
    is_changed: bool

    def __str__(self) -> str:
        return (
            f"aligned on {self.images} images; on {self.held_out} held-out ones: accuracy {self.accuracy_before:.3f} "
            f"before, {self.accuracy_after:.3f} after; distance to the class {self.distance_before:.2f} before, "
            f"{self.distance_after:.2f} after"
        )


def align(guard: ClusterGuard, loader: Loader, *, unpack: Unpack | None = None, progress: str = "") -> Alignment:
    """Fit the last layer of a guard to its class centres by ridge regression. Nothing else is trained.

    A guard that wraps a classifier labels images as the classifier did, but its representations are far from the class
    centres. The alignment brings representations closer to the centres of their classes. The new layer is a mixture of
    two layers: the scaled old one, and the linear layer that maps the frozen features of all images as close to their
    centres as possible. The alignment takes one pass over the images and one decomposition of a (D, D) matrix in
    float64. A fifth of the images, but at most 5,000, is held out to choose the penalty of the regression and the
    mixture. Among all choices for which the accuracy falls by at most 0.005, that with the smallest distances is taken.
    The regression is then fitted to all images. Calibrate the guard on other images afterwards.

    Alignment helps against noise and corruptions. It does not help against an attacker who knows the guard. Train the
    guard for that.

    Args:
        guard: guard with `GaussianClusters`, whose representation is the output of one linear layer. It loses its
            thresholds.
        loader: batches of images (B, C, H, W) in [0, 1] and labels (B,), at least five images and one of every class.
        unpack: function that finds images and labels in batches of another form.
        progress: title of the progress bar; an empty title shows no bar.

    Returns:
        Accuracy and distances before and after.

    Raises:
        ConfigurationError: the guard has another head, or its representation is not the output of one linear layer.
        InputError: images or labels have a wrong shape, dtype or range, there are too few, or a class is missing.

    Warns:
        UserWarning: the accuracy would fall by more than 0.005 with every choice, so the guard stays as it is; or the
            guard labelled no more held-out images correctly than guessing would, which is normal only for a new
            classifier.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), num_classes=2)
        >>> labels = torch.arange(100) % 2
        >>> images = (labels[:, None, None, None] * 0.5 + torch.rand(100, 1, 4, 4) / 2)
        >>> alignment = align(guard, [(images, labels)])
        >>> alignment.accuracy_after, alignment.distance_after < alignment.distance_before
        (1.0, True)
    """
    head = guard.head
    if not isinstance(head, GaussianClusters):
        raise ConfigurationError(f"expected a guard with GaussianClusters as its head, got {type(head).__name__}")
    with sole_use(guard), evaluation_mode(guard), full_precision(), torch.no_grad():
        return _fit(guard, head, *read_features(guard, loader, unpack=unpack, progress=progress))


def read_features(
    guard: ClusterGuard, loader: Loader, *, unpack: Unpack | None, progress: str
) -> tuple["LastLayers", "FeatureSums", Tensor, Tensor]:
    """Pass over all images once, for what is fitted to the features that a guard's last layer gets.

    Args:
        guard: guard in eval mode.
        loader: batches as in `align`.
        unpack: function as in `align`.
        progress: title of the progress bar.

    Returns:
        The last layer; sums over the images that are not held out; features and labels of the others.

    Raises:
        ConfigurationError: the representation is not the output of one linear layer.
        InputError: as in `align`.
    """
    learn_class_names(guard, loader)
    layers: LastLayers | None = None
    sums: FeatureSums | None = None
    kept: list[tuple[Tensor, Tensor]] = []
    seen = 0
    pairs, batches = Pairs(loader, unpack), number_of_batches(loader)
    for images, labels in bar(pairs, progress, total=batches):
        check_images(images)
        if not images.isfinite().all():
            raise InputError("expected images whose pixels are finite, got NaN or infinity; leave such images out")
        check_labels(labels, images, guard.num_classes)
        images, labels = images.to(guard.thresholds.device), labels.to(guard.thresholds.device).long()
        layers = layers or find_last_layers(guard, images)
        features = layers.read(guard, images)
        sums = sums or FeatureSums(features, guard.num_classes)
        # Multiples of the golden ratio spread evenly, whatever the order of the classes.
        spread = torch.arange(seen, seen + len(labels), device=labels.device, dtype=torch.float64) * _GOLDEN
        is_kept = spread % 1 < 1 / _HELD_OUT_EVERY
        is_kept &= sum(len(part) for _, part in kept) < _MOST_HELD_OUT
        kept.append((features[is_kept], labels[is_kept]))
        sums.add(features[~is_kept], labels[~is_kept])
        seen += len(labels)
    if layers is None or sums is None or seen < _HELD_OUT_EVERY:
        raise InputError(f"expected at least {_HELD_OUT_EVERY} images, got {seen}")
    if not sums.counts.all():
        missing = [name_class(index, guard.class_names) for index in (sums.counts == 0).nonzero().flatten().tolist()]
        raise InputError(
            f"expected images of every class, got none of {', '.join(missing)} beside those that are held out"
        )
    features, labels = map(torch.cat, zip(*kept, strict=True))
    return layers, sums, features, labels


@dataclass
class LastLayers:
    """The linear layer that makes the logits or the representation, and one that only repeats them, if any.

    Attributes:
        fitted: layer whose inputs are the features.
        repeater: layer that repeats its outputs, or None.
        example: (B, C, H, W) images by which the layers were found.
    """

    fitted: Dense
    repeater: nn.Linear | None
    example: Tensor

    def read(self, guard: ClusterGuard, images: Tensor) -> Tensor:
        """The inputs (B, D) of the layer to fit, for images (B, C, H, W)."""
        with _recording([self.fitted]) as calls:
            guard.represent(images)
        return calls[-1][1].flatten(1)

    def targets(self, head: GaussianClusters) -> Tensor:
        """The outputs (K, outputs) that the layer to fit should have for each class."""
        if self.repeater is None:
            return head.centers.double()
        return torch.eye(head.num_classes, device=head.center_scale.device).double() * head.center_scale

    def represent(self, outputs: Tensor) -> Tensor:
        """The representation (B, m) that follows from outputs (B, outputs) of the layer to fit."""
        copies = 1 if self.repeater is None else self.repeater.out_features // self.repeater.in_features
        return repeat(outputs, "b k -> b (k l)", l=copies)

    def put(self, weight: Tensor, bias: Tensor) -> None:
        """Set the weight (outputs, D) and the bias (outputs,) of the layer to fit."""
        if self.fitted.bias is None:
            self.fitted.bias = nn.Parameter(_bias_of(self.fitted))
        self.fitted.weight.copy_(weight.reshape(self.fitted.weight.shape))
        self.fitted.bias.copy_(bias)
        if self.repeater is not None:
            identity = torch.eye(self.repeater.in_features, device=weight.device)
            copies = self.repeater.out_features // self.repeater.in_features
            self.repeater.weight.copy_(repeat(identity, "k j -> (k l) j", l=copies))
            self.repeater.bias.zero_()


class FeatureSums:
    """Sums over images from which a linear regression follows, in float64.

    Args:
        features: (B, D) example of features, from which D and the device are taken.
        num_classes: number K of classes.
    """

    def __init__(self, features: Tensor, num_classes: int) -> None:
        width = features.shape[1]
        self.squares = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        self.by_class = torch.zeros(num_classes, width, dtype=torch.float64, device=features.device)
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=features.device)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add images with features (B, D) and labels (B,) to the sums."""
        wide, members = features.double(), one_hot(labels, len(self.counts)).double()
        self.squares += wide.T @ wide
        self.by_class += members.T @ wide
        self.counts += members.sum(dim=0)

    def solve(self, targets: Tensor, ridges: tuple[float, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each penalty, the weight (outputs, D) and bias (outputs,) whose outputs are nearest to the targets.

        Args:
            targets: (K, outputs) wanted outputs for each class.
            ridges: penalties of the squared weight, as multiples of the mean variance of a feature.
        """
        number = self.counts.sum()
        mean, mean_target = self.by_class.sum(dim=0) / number, self.counts @ targets / number
        covariance = self.squares / number - mean.outer(mean)
        shared = targets.T @ self.by_class / number - mean_target.outer(mean)
        variances, directions = torch.linalg.eigh(covariance)
        rotated, usual = shared @ directions, variances.clamp_min(0).mean()
        for ridge in ridges:
            penalised = (variances.clamp_min(0) + ridge * usual).clamp_min(torch.finfo(torch.float64).tiny)
            weight = (rotated / penalised) @ directions.T
            yield weight, mean_target - weight @ mean


def _fit(
    guard: ClusterGuard, head: GaussianClusters, layers: LastLayers, sums: FeatureSums, features: Tensor, labels: Tensor
) -> Alignment:
    """Choose the penalty by the distance of held-out images to their centres, and give the guard the layer."""
    targets = layers.targets(head)
    old = layers.fitted.weight.flatten(1).double(), _bias_of(layers.fitted).double()
    now = features.double() @ old[0].T + old[1]
    before = now if layers.repeater is None else now @ layers.repeater.weight.double().T + layers.repeater.bias
    # This factor brings the old outputs nearest to the targets. A negative one would change labels.
    factor = ((now * targets[labels]).sum() / now.square().sum().clamp_min(1e-30)).clamp_min(1e-3)

    def judge_layer(outputs: Tensor) -> tuple[float, float]:
        """The accuracy, and the mean distance to the centre of the class."""
        distances = head.distances(outputs)
        is_right = distances.argmin(dim=1) == labels
        return float(is_right.double().mean()), float(distances.gather(1, labels[:, None]).mean())

    accuracy, distance = judge_layer(before)
    best = (0.0, distance, 0.0, 0.0)  # accuracy, distance, penalty and share
    for ridge, (weight, bias) in zip(_RIDGES, sums.solve(targets, _RIDGES), strict=True):
        new = features.double() @ weight.T + bias
        for share in _SHARES:
            result = judge_layer(layers.represent(torch.lerp(factor * now, new, share)))
            if result[0] >= accuracy - _TOLERATED_LOSS and (not best[0] or result[1] < best[1]):
                best = (*result, ridge, share)
    images = int(sums.counts.sum()) + len(labels)
    if doubt := guessing_advice(round(accuracy * len(labels)), len(labels), head.num_classes):
        warnings.warn(f"before the alignment {doubt}", stacklevel=3)
    if not best[0]:
        warnings.warn(
            f"expected a layer that keeps the accuracy of {accuracy:.3f} ({len(labels)} held-out images), found none, "
            "so the guard stays as it is; pass more images",
            stacklevel=3,
        )
        return Alignment(accuracy, accuracy, distance, distance, images, len(labels), 0.0, is_changed=False)
    sums.add(features, labels)
    (fitted,) = sums.solve(targets, best[2:3])
    layers.put(*(torch.lerp(factor * part, other, best[3]) for part, other in zip(old, fitted, strict=True)))
    guard.reset_calibration()
    return Alignment(accuracy, best[0], distance, best[1], images, len(labels), best[3], is_changed=True)


def _bias_of(layer: Dense) -> Tensor:
    return torch.zeros_like(layer.weight[:, 0]).flatten() if layer.bias is None else layer.bias


def find_last_layers(guard: ClusterGuard, images: Tensor) -> LastLayers:
    """Find the last layers of an encoder, by comparing the inputs and outputs of its layers in one forward pass."""
    with _recording(dense_layers(guard.encoder)) as calls:
        representation = guard.represent(images[:2])
    after = representation
    chain: list[Dense] = []
    for layer, inputs, outputs in reversed(calls):
        flat = inputs.flatten(1)
        is_linear = (
            flat.shape[1] == layer.weight[0].numel()
        )  # True for a convolution only if it is applied at a single position
        is_linear &= sum(layer is called for called, *_ in calls) == 1 and _can_be_fitted(layer)
        if is_linear and outputs.flatten(1).shape == after.shape and torch.equal(outputs.flatten(1), after):
            chain.append(layer)
            after = flat
    if not chain:
        raise ConfigurationError(
            f"expected a representation that one linear layer makes, got that of {type(guard.encoder).__name__}, which "
            "is made otherwise; train the guard instead"
        )
    last, *earlier = chain
    is_repeater = bool(earlier) and last.weight.shape[1] == guard.num_classes < earlier[0].weight[0].numel()
    if is_repeater and isinstance(last, nn.Linear):  # the last layer repeats the logits of a classifier
        return LastLayers(earlier[0], last, images[:2])
    return LastLayers(last, None, images[:2])


def _can_be_fitted(layer: Dense) -> bool:
    """Whether the outputs of a layer are determined by a weight that is a plain parameter."""
    hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks)  # one of these hooks is that of `_recording`
    return type(layer) in (nn.Linear, nn.Conv2d) and hooks <= 1 and "weight" in layer._parameters


@contextmanager
def _recording(layers: list[Dense]) -> Iterator[list[tuple[Dense, Tensor, Tensor]]]:
    """Context in which each call of a layer is recorded in a list, with its inputs and outputs."""
    calls: list[tuple[Dense, Tensor, Tensor]] = []

    def record(layer: Dense, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        calls.append((layer, inputs[0], outputs))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
