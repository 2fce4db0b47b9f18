"""What no attack can do: proofs, image by image, that hold for every perturbation of a radius."""

import copy
import math
from typing import NamedTuple

import torch
from clusterguard.checks import check_calibrated, check_images, check_labels
from clusterguard.detector import Loader
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.guard import ClusterGuard
from clusterguard.intervals import Interval
from clusterguard.loaders import Pairs, Unpack
from clusterguard.metrics import Rate, is_eligible
from einops import reduce
from torch import Tensor
from torch.nn.functional import one_hot

_ROUNDING = 1e-4  # relative: what float32 may cost the guard in service; bounds are computed in float64


class Bounds(NamedTuple):
    """What a guard can make of every image within a radius of an image.

    Attributes:
        nearest: (B, K) the smallest distance to each centre.
        leads: (B, K) the smallest lead of the label's squared distance over each other centre's; 0 for the label.
        farthest: (B,) the largest distance to the label's centre.
    """

    nearest: Tensor
    leads: Tensor
    farthest: Tensor


class Certificate(NamedTuple):
    """What is proved of each image; where nothing is, an attack may or may not exist.

    Attributes:
        is_secure: (B,) bool, nothing within the radius is accepted under another label than the image's own.
        is_kept: (B,) bool, everything within the radius is accepted under the image's own label.
    """

    is_secure: Tensor
    is_kept: Tensor


def bound(guard: ClusterGuard, images: Tensor, labels: Tensor, *, eps: float | Tensor) -> Bounds:
    """Bounds on all distances over the l∞ ball, by interval bound propagation; differentiable in the guard's weights.

    Args:
        guard: with a network of linear layers, convolutions, batch normalisation, pooling and usual activations, in
            eval mode.
        images: (B, C, H, W) in [0, 1].
        labels: (B,).
        eps: radius in l∞, one number or (B,).

    Returns:
        Bounds on distances and leads; not finite where they overflow.

    Raises:
        ConfigurationError: the network has a layer without known bounds.

    Reference:
        Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust models" (2018);
        the distances' bounds are ours.
    """
    box = Interval.around(images, eps)
    box = Interval(guard.normalize(box.lower), guard.normalize(box.upper))
    try:
        found = guard.encoder(box)
    except (AttributeError, TypeError) as error:
        raise ConfigurationError(f"no bounds are known for this network: {error}") from error
    centers = guard.clusters.centers.to(found.lower)
    own = centers[labels]
    # In the direction from another centre to the own one, differences of outputs are bounded as one.
    directions = own[:, None] - centers
    along = found.lowest(directions)
    leads = 2 * along  # squared distances differ by 2⟨z, own − other⟩, for all centres are equally far from 0
    gaps = torch.maximum(found.lower[:, None] - centers, centers - found.upper[:, None]).clamp_min(0)
    to_box = reduce(gaps.square(), "b k m -> b k", "sum").clamp_min(torch.finfo(gaps.dtype).tiny).sqrt()
    lengths = directions.norm(dim=2).clamp_min(torch.finfo(gaps.dtype).tiny)
    to_half_space = (along - reduce(directions * centers, "b k m -> b k", "sum")) / lengths
    reach = torch.maximum((found.lower - own).abs(), (found.upper - own).abs())
    return Bounds(torch.maximum(to_box, to_half_space), leads, reach.norm(dim=1))


@torch.no_grad()
def certify(guard: ClusterGuard, images: Tensor, labels: Tensor, *, eps: float | Tensor) -> Certificate:
    """Prove what no perturbation within a radius can do to the guard's decisions.

    An image is secure if, for every other class, each perturbed image is too far from that class's centre to be
    accepted, or closer to the label's own. So the attack success rate of any attack, known or not, is at most the share
    of images that are not secure. Bounds are computed in float64; a margin of 1e-4 covers the guard's own rounding in
    float32, not that of a guard that runs in half precision.

    Args:
        guard: calibrated; see `bound` for its network.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true labels, or those that the guard gives.
        eps: radius in l∞, one number or (B,), at least 0.

    Returns:
        Which images are proved secure, and which are proved to be kept, each (B,).

    Raises:
        InputError: images, labels or radii of a wrong shape, dtype or range.
        NotCalibratedError: the guard has no thresholds.
        ConfigurationError: the network has a layer without known bounds.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([3.0, 3.0])
        >>> images = torch.rand(4, 1, 1, 2)
        >>> certify(guard, images, guard.detect(images).labels, eps=0.0).is_secure.all()
        tensor(True)
    """
    _check(guard, images, labels)
    radii = torch.as_tensor(eps, dtype=torch.float64, device=images.device)
    if radii.shape not in (torch.Size([]), images.shape[:1]) or not bool((radii >= 0).all()):
        raise InputError(f"expected a radius eps of at least 0, one number or ({len(images)},), got {eps}")
    exact = _exactly(guard)
    return _judge(exact, images.double(), labels, radii)


@torch.no_grad()
def certified_radius(
    guard: ClusterGuard, images: Tensor, labels: Tensor, *, largest: float = 1.0, precision: float = 1e-3
) -> Tensor:
    """How far each image is proved secure, by bisection.

    Args:
        guard: as in `certify`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true labels, or those that the guard gives.
        largest: radius at which to stop looking, positive.
        precision: of the radius, positive.

    Returns:
        (B,) radii in l∞ at which `certify` says that the image is secure; 0 where it says so at none.

    Raises:
        ConfigurationError: a `largest` or precision that is not positive; and whatever `certify` raises.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([3.0, 3.0])
        >>> certified_radius(guard, torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1])).shape
        torch.Size([4])
    """
    if not (0 < precision < torch.inf and 0 < largest < torch.inf):
        raise ConfigurationError(f"expected a positive largest radius and precision, got {largest} and {precision}")
    _check(guard, images, labels)
    exact, images = _exactly(guard), images.double()
    proved, open_end = images.new_zeros(len(images)), images.new_full((len(images),), largest)
    tried = open_end
    for _ in range(1 + max(0, math.ceil(math.log2(largest) - math.log2(precision)))):
        secure = _judge(exact, images, labels, tried).is_secure
        proved, open_end = torch.where(secure, tried, proved), torch.where(secure, open_end, tried)
        tried = (proved + open_end) / 2
    return proved


@torch.no_grad()
def certified_success_rate(guard: ClusterGuard, loader: Loader, *, eps: float, unpack: Unpack | None = None) -> Rate:
    """The most that any attack within a radius can succeed, known or not: an upper bound on the ASR.

    Args:
        guard: as in `certify`.
        loader: batches of images (B, C, H, W) in [0, 1] and their true labels (B,).
        eps: radius in l∞.
        unpack: finds images and labels in batches of another form.

    Returns:
        The share of images that are not proved secure, among those labelled correctly and accepted before an attack.

    Raises:
        ConfigurationError: and whatever else `certify` raises.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([30.0, 30.0])
        >>> images = torch.rand(4, 1, 1, 2)
        >>> certified_success_rate(guard, [(images, guard.detect(images).labels)], eps=0.0).value
        0.0
    """
    counted, broken, is_empty = 0, 0, True
    for images, labels in Pairs(loader, unpack):
        images, labels = images.to(guard.thresholds.device), labels.to(guard.thresholds.device)
        eligible = is_eligible(guard.detect(images), labels)
        counted += int(eligible.sum())
        broken += int((eligible & ~certify(guard, images, labels, eps=eps).is_secure).sum())
        is_empty = False
    if is_empty:
        raise InputError("expected a loader with at least one batch, got an empty one")
    return Rate(broken, counted)


def _check(guard: ClusterGuard, images: Tensor, labels: Tensor) -> None:
    check_images(images)
    check_labels(labels, images, guard.num_classes)
    guard.check_image_shape(images)
    check_calibrated(guard.thresholds)


def _exactly(guard: ClusterGuard) -> ClusterGuard:
    """The guard in float64 and eval mode; the thresholds stay as they are."""
    return copy.deepcopy(guard).double().eval()


def _judge(exact: ClusterGuard, images: Tensor, labels: Tensor, radii: Tensor) -> Certificate:
    """What the bounds prove, with room for rounding; where they are not finite, nothing."""
    nearest, leads, farthest = bound(exact, images, labels, eps=radii)
    thresholds = exact.thresholds.double()
    is_own = one_hot(labels.long(), exact.num_classes).bool()
    leads = (leads > _ROUNDING * exact.clusters.centers[0].square().sum()) | is_own
    is_secure = (leads | (nearest * (1 - _ROUNDING) > thresholds)).all(dim=1)
    is_kept = leads.all(dim=1) & (farthest * (1 + _ROUNDING) <= thresholds[labels])
    return Certificate(is_secure, is_kept)
