"""Certificates: a proof for each image that holds for every perturbation within a radius."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from clusterguard._support import (
    IN_GREY_LEVELS,
    CompiledCall,
    call,
    check_calibrated,
    check_images,
    check_labels,
    check_linf_radius,
    evaluation_mode,
)
from clusterguard.certification._intervals import Interval, final_refusals
from clusterguard.detection import Arithmetic, Loader, Pairs, Rate, Unpack, full_precision, is_eligible
from clusterguard.detectors import ClusterGuard, GaussianClusters, Normalize
from clusterguard.errors import ClusterGuardError, ConfigurationError, InputError
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import one_hot

_SAMPLED_IMAGES = 4  # bounds are checked on up to this many proved images, and on as many of all images
_SAMPLED_POINTS = 8  # inner points of the ball around each image, and as many of its corners
_ATTACK_STEPS = 2  # gradient steps from corner to corner, towards the point where a proof would fail first


class Bounds(NamedTuple):
    """Bounds on a guard's distances for all images within a radius of an image.

    Attributes:
        nearest: (B, K) lower bound of the distance to each centre.
        leads: (B, K) lower bound of each centre's squared distance less that of the label's centre; 0 for the label.
        farthest: (B,) upper bound of the distance to the label's centre.
    """

    nearest: Tensor
    leads: Tensor
    farthest: Tensor


class Certificate(NamedTuple):
    """What is proved for each image; without a proof, an attack may or may not exist.

    Attributes:
        is_secure: (B,) bool, whether no image within the radius is accepted under a label other than the given one.
        is_kept: (B,) bool, whether every image within the radius is accepted under the given label.
    """

    is_secure: Tensor
    is_kept: Tensor


def bound(guard: ClusterGuard, images: Tensor, labels: Tensor, *, eps: float | Tensor) -> Bounds:
    """Bounds on all distances over the l∞ ball, by interval bound propagation; differentiable in the guard's weights.

    Args:
        guard: guard in eval mode, whose network has linear layers, convolutions, batch normalisation, pooling and
            usual activations.
        images: (B, C, H, W) in [0, 1].
        labels: class labels (B,).
        eps: radius in l∞, one number or (B,).

    Returns:
        Bounds on distances and leads; not finite where they overflow.

    Raises:
        ConfigurationError: the network has a layer without known bounds.

    Reference:
        Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust models" (2018);
        the bounds on distances are our own.
    """
    return _bound_distances(_clusters_of(guard), _bound_representations(guard, Interval.around(images, eps)), labels)


def _bound_representations(guard: ClusterGuard, box: Interval) -> Interval:
    """The interval (B, m) of the guard's representations of a box of images (B, C, H, W) in [0, 1]."""
    lower, upper = guard.normalize(box.lower), guard.normalize(box.upper)
    error = None
    if box.error is not None and box.arithmetic is not None:
        size = torch.maximum(lower.abs(), upper.abs())
        error = box.error / guard.normalize.std.to(lower) + box.arithmetic.gamma(3) * size + box.arithmetic.smallest
    try:
        with final_refusals():
            representations = guard.encoder(Interval(lower, upper, error=error, arithmetic=box.arithmetic))
    except ClusterGuardError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError):
            raise  # an error of memory or of the device says nothing about the network
        raise ConfigurationError(f"no bounds are known for this network: {error}") from error
    shape = (len(box.lower), guard.head.representation_dim)
    if (
        not isinstance(representations, Interval)
        or representations.shape != shape
        or (representations.error is None) != (box.error is None)
    ):
        is_interval = isinstance(representations, Interval)
        raise ConfigurationError(
            f"no bounds are known for this network: expected bounds of representations {shape}, got "
            f"{tuple(representations.shape) if is_interval else type(representations).__name__}; does the network "
            "treat inputs that are not tensors differently?"
        )
    return representations


def _bound_distances(clusters: GaussianClusters, box: Interval, labels: Tensor) -> Bounds:
    """Bounds on the exact distances of computed representations, or of exact ones if the box has no arithmetic."""
    lower, upper = (box.lower, box.upper) if box.error is None else (box.lower - box.error, box.upper + box.error)
    centers = clusters.centers.to(lower)
    label_centers = centers[labels.long()]
    # One bound along the direction between two centres is tighter than the difference of two bounds.
    directions = label_centers[:, None] - centers
    along = box.lowest(directions) - box.slack(directions)
    # All centres are equally far from 0, so their squared distances to z differ by 2⟨z, label's centre − other centre⟩.
    leads = 2 * along
    gaps = torch.maximum(lower[:, None] - centers, centers - upper[:, None]).clamp_min(0)
    to_box = reduce(gaps.square(), "b k m -> b k", "sum").clamp_min(torch.finfo(gaps.dtype).tiny).sqrt()
    lengths = directions.norm(dim=2).clamp_min(torch.finfo(gaps.dtype).tiny)
    to_half_space = (along - reduce(directions * centers, "b k m -> b k", "sum")) / lengths
    reach = torch.maximum((lower - label_centers).abs(), (upper - label_centers).abs())
    return Bounds(torch.maximum(to_box, to_half_space), leads, reach.norm(dim=1))


@torch.no_grad()
def certify(guard: ClusterGuard, images: Tensor, labels: Tensor, *, eps: float | Tensor) -> Certificate:
    """Prove that no perturbation within a radius changes the guard's decision to a wrong one.

    An image is secure if, for every other class, each perturbed image is either too far from that class's centre to be
    accepted or closer to the centre of its label. So the success rate of any attack, known or not, is at most the share
    of images that are not secure.

    A proof is about the guard as `detect` runs it, in float32 or float64. It includes a bound on the rounding errors of
    each operation, down to the comparison with the threshold. This bound holds for IEEE arithmetic with sums in any
    order, fused or not, and for convolutions that are computed as direct products, as oneDNN and cuBLAS do. It does not
    hold for convolutions by Winograd's algorithm or by Fourier transforms, which cuDNN may choose at stride 1.

    Bounds are checked before they are used. The guard's outputs on a few of the images, and at points in the ball
    around each, must lie within the bounds. Some of the points are random, and others follow the gradient towards the
    point where a proof would fail first.

    Args:
        guard: calibrated guard with a network as in `bound`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true labels, or the guard's labels.
        eps: radius in l∞, one number or (B,), in [0, 1].

    Returns:
        Whether each image is proved secure and whether it is proved to be kept, each (B,).

    Raises:
        InputError: images, labels or radii have a wrong shape, dtype or range.
        NotCalibratedError: the guard has no thresholds.
        ConfigurationError: the network has a layer without known bounds, or treats intervals differently from tensors;
            the guard runs in half precision or under autocast; one of its methods is not that of `ClusterGuard`.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([3.0, 3.0])
        >>> images = torch.rand(4, 1, 1, 2)
        >>> certify(guard, images, guard.detect(images).labels, eps=0.0).is_secure.all()
        tensor(True)
    """
    _check(guard, images, labels)
    radii = check_linf_radius(eps, images.shape[:1]).to(images.device)
    with _as_in_service(guard):
        proofs = _bound_in_service(guard, images, labels, radii)
        is_proved = proofs.certificate.is_secure | proofs.certificate.is_kept
        _try_out(guard, images, labels, radii, is_proved, proofs)
    return proofs.certificate


@torch.no_grad()
def certified_radius(
    guard: ClusterGuard, images: Tensor, labels: Tensor, *, largest: float = 1.0, precision: float = 1e-3
) -> Tensor:
    """The largest radius at which each image is proved secure, by bisection.

    Args:
        guard: guard as in `certify`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true labels, or the guard's labels.
        largest: largest radius to try, in (0, 1].
        precision: precision of the radius, positive.

    Returns:
        (B,) radii in l∞ at which `certify` proves the image secure; 0 where it proves it at none of the tried radii.

    Raises:
        ConfigurationError: `largest` or `precision` is out of its range.
        ClusterGuardError: any error of `certify`.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([3.0, 3.0])
        >>> certified_radius(guard, torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1])).shape
        torch.Size([4])
    """
    if not (0 < precision < torch.inf and 0 < largest <= 1):
        raise ConfigurationError(
            f"expected a positive precision and a largest radius in (0, 1], got {precision} and {largest}; "
            f"{IN_GREY_LEVELS}"
        )
    _check(guard, images, labels)
    radii = images.new_full((len(images),), largest, dtype=torch.float64)
    proved, open_end, tried = torch.zeros_like(radii), radii, radii
    with _as_in_service(guard):
        for _ in range(1 + max(0, math.ceil(math.log2(largest) - math.log2(precision)))):
            secure = _bound_in_service(guard, images, labels, tried).certificate.is_secure
            proved, open_end = torch.where(secure, tried, proved), torch.where(secure, open_end, tried)
            tried = (proved + open_end) / 2
        _try_out(guard, images, labels, proved, proved > 0)
    return proved


@torch.no_grad()
def certified_success_rate(guard: ClusterGuard, loader: Loader, *, eps: float, unpack: Unpack | None = None) -> Rate:
    """An upper bound on the success rate of every attack within a radius, known or not.

    Args:
        guard: guard as in `certify`.
        loader: batches of images (B, C, H, W) in [0, 1] and their true labels (B,).
        eps: radius in l∞, in [0, 1].
        unpack: function that takes images and labels from batches of another form.

    Returns:
        The share of images without a proof among those that are labelled correctly and accepted before an attack.

    Raises:
        InputError: the loader is empty.
        ClusterGuardError: any error of `certify`.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([30.0, 30.0])
        >>> images = torch.rand(4, 1, 1, 2)
        >>> certified_success_rate(guard, [(images, guard.detect(images).labels)], eps=0.0).value
        0.0
    """
    check_linf_radius(eps)
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
    _check_methods(guard)
    check_images(images)
    if images.dtype not in (torch.float32, torch.float64):
        raise InputError(f"expected images in float32 or float64, like the guard, got {images.dtype}")
    check_labels(labels, images, guard.num_classes)
    guard.check_image_shape(images)
    check_calibrated(guard.thresholds)


class _Proofs(NamedTuple):
    """Bounds on what a guard computes in its own arithmetic, and the certificate that follows from them."""

    representations: Interval
    bounds: Bounds
    certificate: Certificate


@contextmanager
def _as_in_service(guard: ClusterGuard) -> Iterator[None]:
    """Put the guard into the mode and arithmetic in which `detect` runs it.

    Raises:
        ConfigurationError: the bounds would not be those of `detect`.
    """
    _check_methods(guard)
    if torch.is_autocast_enabled(guard.thresholds.device.type):
        raise ConfigurationError("expected certificates of a guard in float32 or float64, got autocast; leave it first")
    with full_precision(), evaluation_mode(guard):
        yield


_METHODS = ("represent", "distances", "evidence", "detect", "forward", "__call__", "__getattribute__", "__getattr__")


def _check_methods(guard: ClusterGuard) -> None:
    """Refuse a guard that computes more than the bounds cover: `Normalize`, an encoder and `GaussianClusters`."""
    if not isinstance(guard, ClusterGuard):
        raise ConfigurationError(f"expected a ClusterGuard, got {type(guard).__name__}; nothing else has bounds")
    changed = [name for name in _METHODS if getattr(type(guard), name, None) is not getattr(ClusterGuard, name, None)]
    changed += _changed_in_place(guard)
    if not (guard._encode is call or type(guard._encode) is CompiledCall):
        changed.append("_encode")
    for name, kind in (("head", GaussianClusters), ("normalize", Normalize)):
        part = getattr(guard, name)
        hooks = (part._forward_hooks, part._forward_pre_hooks)
        if type(part) is not kind or _changed_in_place(part) or any(hooks):
            changed.append(name)
    if changed:
        raise ConfigurationError(
            f"no bounds are known for a guard that has {', '.join(changed)} of its own; certificates need "
            "ClusterGuard's own methods, around any network"
        )


def _clusters_of(guard: ClusterGuard) -> GaussianClusters:
    if not isinstance(guard.head, GaussianClusters):
        raise ConfigurationError(f"bounds are known for GaussianClusters, got the head {type(guard.head).__name__}")
    return guard.head


def _changed_in_place(module: nn.Module) -> list[str]:
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]


def _arithmetic_of(guard: ClusterGuard) -> Arithmetic:
    """The arithmetic of the guard, whose weights and buffers must all have the same data type."""
    parts = (guard.encoder, guard.normalize, guard.head)
    tensors = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
    dtypes = sorted({tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}, key=str)
    if dtypes not in ([torch.float32], [torch.float64]):
        raise ConfigurationError(
            f"expected a guard in float32 or float64, got {', '.join(map(str, dtypes))}; convert it with .float(), "
            "calibrate it again, and certify that"
        )
    return Arithmetic.of(dtypes[0])


def _bound_in_service(guard: ClusterGuard, images: Tensor, labels: Tensor, radii: Tensor) -> _Proofs:
    """Bounds on what the guard computes for every image in a ball, rounding included, and what they prove."""
    arithmetic = _arithmetic_of(guard)
    ball = Interval.around(images.double(), radii)
    # Perturbing an image rounds it. The error covers each image whose distance, computed in its dtype, is within radii.
    error = torch.full_like(ball.lower, 2 * arithmetic.unit)
    ball = Interval(ball.lower, ball.upper, error=error, arithmetic=arithmetic)
    representations = _bound_representations(guard, ball)
    clusters = _clusters_of(guard)
    exact = _bound_distances(clusters, representations, labels)
    bounds = _with_rounding(clusters, representations, labels, exact)
    thresholds = guard.thresholds.double()
    leads = (bounds.leads > 0) | one_hot(labels.long(), guard.num_classes).bool()
    is_secure = (leads | (bounds.nearest > thresholds)).all(dim=1)
    is_kept = leads.all(dim=1) & (bounds.farthest <= thresholds[labels.long()])
    return _Proofs(representations, bounds, Certificate(is_secure, is_kept))


def _with_rounding(clusters: GaussianClusters, box: Interval, labels: Tensor, exact: Bounds) -> Bounds:
    """Bounds on computed distances, from bounds on exact ones; where they are not finite, nothing is proved.

    A lead above 0 then means that the computed distance of the other class is larger than that of the label. This also
    holds after the square root.
    """
    arithmetic, error = box.arithmetic, box.error
    if arithmetic is None or error is None:
        raise ConfigurationError("expected an interval that follows rounding, got one that does not")
    size = torch.maximum(box.lower.abs(), box.upper.abs()) + error
    energy = reduce(size.square(), "b m -> b 1", "sum")
    # A squared distance is computed as that within the class's block, plus the energy of all blocks, less the energy
    # of this block. Before rounding, the sum of these terms is at most `squares`.
    blocks = rearrange(size + clusters.center_scale.to(size), "b (k l) -> b k l", k=clusters.num_classes)
    squares = 2 * energy + reduce(blocks.square(), "b k l -> b k", "sum")
    # A term is a sum over a block and over blocks. Differences, squares and roots of both sides round a few times more.
    block = clusters.representation_dim // clusters.num_classes
    rounding = arithmetic.gamma(clusters.num_classes + block + 12) * squares + arithmetic.smallest
    rounding = torch.where(squares < arithmetic.largest, rounding, torch.inf)
    label_rounding = rounding.gather(1, labels[:, None].long())
    room = 16 * arithmetic.unit * (size.norm(dim=1, keepdim=True) + blocks.flatten(1).norm(dim=1, keepdim=True))
    nearest = ((exact.nearest - room).clamp_min(0).square() - rounding).clamp_min(0).sqrt() * (1 - 4 * arithmetic.unit)
    farthest = (exact.farthest.square() + label_rounding.squeeze(1)).sqrt() * (1 + 4 * arithmetic.unit)
    return Bounds(nearest, exact.leads - rounding - label_rounding, farthest)


def check_bounds(guard: ClusterGuard, images: Tensor, labels: Tensor, *, eps: float) -> None:
    """Check that bounds are known for the guard, and that they hold on a few of these images.

    Args:
        guard: guard in train or eval mode.
        images: (B, C, H, W) in [0, 1].
        labels: class labels (B,).
        eps: radius in l∞ of the ball in which the bounds are checked.

    Raises:
        ConfigurationError: no bounds are known for the guard, as in `certify`.
    """
    with torch.no_grad(), _as_in_service(guard):
        _try_out(guard, images, labels, torch.as_tensor(eps, dtype=torch.float64), torch.zeros_like(labels).bool())


def _try_out(
    guard: ClusterGuard,
    images: Tensor,
    labels: Tensor,
    radii: Tensor,
    is_proved: Tensor,
    proofs: _Proofs | None = None,
) -> None:
    """Check on a few images that the bounds of the ball, and of a ball of radius 0, contain the guard's outputs.

    A network may treat an interval differently from a tensor without any rule noticing.
    """
    chosen = _choose(is_proved)
    if not len(chosen):
        return
    images, labels, radii = images[chosen], labels[chosen], radii.expand(len(images))[chosen]
    points, dtype = _sample(images.double(), radii), _arithmetic_of(guard).dtype
    points = torch.cat([points, _attack(guard, points, labels, radii, dtype)], dim=1).to(dtype)
    wide = _bound_in_service(guard, images, labels, radii) if proofs is None else _take(proofs, chosen)
    narrow = _bound_in_service(guard, images, labels, torch.zeros_like(radii))
    outputs = _run(guard, points)
    _check_outputs(guard, narrow, labels, *(part[:, :1] for part in outputs))
    _check_outputs(guard, wide, labels, *outputs)
    first = _take(narrow, chosen.new_zeros(1, dtype=torch.long))
    for count in (1, 2, 3):  # a network may treat small batches differently
        outputs = _run(guard, points[:1, :1].expand(1, count, *points.shape[2:]), alone=True)
        _check_outputs(guard, first, labels[:1], *outputs)


def _take(proofs: _Proofs, rows: Tensor) -> _Proofs:
    """Proofs of the images at these positions."""
    box = proofs.representations
    lower, upper, error = (None if end is None else end[rows] for end in (box.lower, box.upper, box.error))
    return proofs._replace(
        representations=Interval(lower, upper, error=error, arithmetic=box.arithmetic),  # type: ignore[arg-type]
        bounds=Bounds(*(part[rows] for part in proofs.bounds)),
    )


def _run(guard: ClusterGuard, points: Tensor, *, alone: bool = False) -> tuple[Tensor, Tensor]:
    """Representations and distances of points (B, P, C, H, W), each (B, P, …).

    Unless `alone`, the batch gets a blank image too. Then a network that mixes the images of a batch returns outputs
    for another batch than the bounds are for.
    """
    flat = points.flatten(0, 1)
    batch = flat if alone else torch.cat([flat, torch.ones_like(flat[:1])])
    outputs = guard.represent(batch), guard.evidence(batch).suspicion
    representations, distances = (output[: len(flat)].double().unflatten(0, points.shape[:2]) for output in outputs)
    return representations, distances


def _choose(is_proved: Tensor) -> Tensor:
    """Evenly spaced positions of a few images among those that are proved, and of a few among all."""
    chosen = [
        candidates[torch.linspace(0, len(candidates) - 1, min(len(candidates), _SAMPLED_IMAGES)).long()]
        for candidates in (is_proved.nonzero().squeeze(1).cpu(), torch.arange(len(is_proved)))
    ]
    positions: Tensor = torch.cat(chosen).unique()
    return positions.to(is_proved.device)


def _sample(images: Tensor, radii: Tensor) -> Tensor:
    """Each image with inner points and corners of its ball: (B, C, H, W) -> (B, 1 + points, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(images), 2 * _SAMPLED_POINTS, *images.shape[1:])
    noise = 2 * torch.rand(shape, generator=generator, dtype=images.dtype).to(images.device) - 1
    noise[:, _SAMPLED_POINTS:] = noise[:, _SAMPLED_POINTS:].sign()
    noise[:, -1], noise[:, -2] = 1, -1  # the two corners with all pixels brighter and all darker
    moved = (images[:, None] + radii.view(-1, 1, 1, 1, 1) * noise).clamp(0, 1)
    return torch.cat([images[:, None].clamp(0, 1), moved], dim=1)


def _attack(guard: ClusterGuard, points: Tensor, labels: Tensor, radii: Tensor, dtype: torch.dtype) -> Tensor:
    """Corners of each ball along the signs of gradients at the first of points (B, P, C, H, W): (B, 8, C, H, W).

    The gradients lead to the smallest and largest lead of the label, and to its smallest and largest distance. A
    network without gradients gets no corners. The encoder runs uncompiled, because compiling its gradients would take
    minutes.
    """
    label_column, reach = labels.long()[:, None], radii.view(-1, 1, 1, 1)
    corners = points[:, :0]
    for sign, is_of_lead in itertools.product((1, -1), (True, False)):
        point = points[:, 0]
        for _ in range(_ATTACK_STEPS):
            with torch.inference_mode(False), torch.enable_grad():
                start = point.to(dtype, copy=True).requires_grad_()
                try:
                    squared = _clusters_of(guard).squared_distances(guard.encoder(guard.normalize(start)))
                    distances = squared.gather(1, label_column).squeeze(1)
                    others = squared.scatter(1, label_column, torch.inf)
                    goal = others.amin(dim=1) - distances if is_of_lead else distances
                    slope = torch.autograd.grad(goal.sum(), start)[0].double().nan_to_num()
                except Exception as error:  # a network without gradients may raise anything
                    if isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError):
                        raise  # an error of memory or of the device says nothing about the network
                    return corners
            point = (points[:, 0] - sign * reach * slope.sign()).clamp(0, 1)
            corners = torch.cat([corners, point[:, None]], dim=1)
    return corners


def _check_outputs(
    guard: ClusterGuard, proofs: _Proofs, labels: Tensor, representations: Tensor, distances: Tensor
) -> None:
    """Check representations (B, P, m) and distances (B, P, K), at P points of each of B balls, against the bounds."""
    box, bounds = proofs.representations, proofs.bounds
    error = torch.zeros_like(box.lower) if box.error is None else box.error
    lower, upper = (box.lower - error)[:, None], (box.upper + error)[:, None]
    centers = _clusters_of(guard).centers.to(representations)
    along = torch.einsum("bkm,bpm->bpk", centers[labels.long()][:, None] - centers, representations)
    label_distances = distances.gather(2, labels.long().view(-1, 1, 1).expand(-1, distances.shape[1], 1))
    is_label = one_hot(labels.long(), guard.num_classes).bool()
    is_outside = (
        ((representations < lower) | (representations > upper)).any()
        | (representations.isnan() & lower.isfinite()).any()
        | ((2 * along < bounds.leads[:, None]) & ~is_label[:, None]).any()
        | (distances < bounds.nearest[:, None]).any()
        | (label_distances > bounds.farthest[:, None, None]).any()
        | ((distances <= label_distances) & (bounds.leads > 0)[:, None] & ~is_label[:, None]).any()
    )
    if is_outside:
        raise ConfigurationError(
            "no bounds are known for this network: its outputs on some images lie outside the bounds computed for "
            "them. It treats intervals differently from tensors (for example, asks for their type), mixes the images "
            "of a batch, or is random in eval mode"
        )
