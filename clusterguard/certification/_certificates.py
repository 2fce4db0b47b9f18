"""What no attack can do: proofs, image by image, that hold for every perturbation of a radius."""

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

_SAMPLED_IMAGES = 4  # of those that are proved, and of all: on so many bounds are tried out before they are believed
_SAMPLED_POINTS = 8  # inner points of the ball around each, and as many of its corners
_ATTACK_STEPS = 2  # from corner to corner, towards where proofs would fail first


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
    return _bound_distances(_clusters_of(guard), _bound_representations(guard, Interval.around(images, eps)), labels)


def _bound_representations(guard: ClusterGuard, box: Interval) -> Interval:
    """What the guard's network makes of a box of images (B, C, H, W) in [0, 1]: an interval (B, m)."""
    lower, upper = guard.normalize(box.lower), guard.normalize(box.upper)
    error = None
    if box.error is not None and box.arithmetic is not None:
        size = torch.maximum(lower.abs(), upper.abs())
        error = box.error / guard.normalize.std.to(lower) + box.arithmetic.gamma(3) * size + box.arithmetic.smallest
    try:
        with final_refusals():
            found = guard.encoder(Interval(lower, upper, error=error, arithmetic=box.arithmetic))
    except ClusterGuardError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError):
            raise  # of memory or the device, which is not the network's fault
        raise ConfigurationError(f"no bounds are known for this network: {error}") from error
    shape = (len(box.lower), guard.head.representation_dim)
    if not isinstance(found, Interval) or found.shape != shape or (found.error is None) != (box.error is None):
        raise ConfigurationError(
            f"no bounds are known for this network: expected bounds of representations {shape}, got "
            f"{tuple(found.shape) if isinstance(found, Interval) else type(found).__name__}; does it do something else "
            "where it is not given a tensor?"
        )
    return found


def _bound_distances(clusters: GaussianClusters, box: Interval, labels: Tensor) -> Bounds:
    """Bounds on the exact distances of what a network computes; in exact numbers, if the box has no arithmetic."""
    lower, upper = (box.lower, box.upper) if box.error is None else (box.lower - box.error, box.upper + box.error)
    centers = clusters.centers.to(lower)
    own = centers[labels.long()]
    # In the direction from another centre to the own one, differences of outputs are bounded as one.
    directions = own[:, None] - centers
    along = box.lowest(directions) - box.slack(directions)
    leads = 2 * along  # squared distances differ by 2⟨z, own − other⟩, for all centres are equally far from 0
    gaps = torch.maximum(lower[:, None] - centers, centers - upper[:, None]).clamp_min(0)
    to_box = reduce(gaps.square(), "b k m -> b k", "sum").clamp_min(torch.finfo(gaps.dtype).tiny).sqrt()
    lengths = directions.norm(dim=2).clamp_min(torch.finfo(gaps.dtype).tiny)
    to_half_space = (along - reduce(directions * centers, "b k m -> b k", "sum")) / lengths
    reach = torch.maximum((lower - own).abs(), (upper - own).abs())
    return Bounds(torch.maximum(to_box, to_half_space), leads, reach.norm(dim=1))


@torch.no_grad()
def certify(guard: ClusterGuard, images: Tensor, labels: Tensor, *, eps: float | Tensor) -> Certificate:
    """Prove what no perturbation within a radius can do to the guard's decisions.

    An image is secure if, for every other class, each perturbed image is too far from that class's centre to be
    accepted, or closer to the label's own. So the attack success rate of any attack, known or not, is at most the share
    of images that are not secure.

    Proofs are of the guard as `detect` runs it, in float32 or float64: with the bounds goes a bound on how far the
    guard's own arithmetic may be off, operation by operation, down to the comparison with the threshold. It holds for
    IEEE arithmetic with sums in any order, fused or not, and for products of convolutions taken directly, as oneDNN and
    cuBLAS do; not for Winograd's and Fourier's ways to a convolution, which cuDNN may take for one of stride 1.

    Before bounds are believed they are tried out: the guard's own outputs on a few of the images, and on points of the
    ball around them, must lie within. Some of those points are random, others follow the gradient to where a proof
    would fail first.

    Args:
        guard: calibrated; see `bound` for its network.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true labels, or those that the guard gives.
        eps: radius in l∞, one number or (B,), in [0, 1].

    Returns:
        Which images are proved secure, and which are proved to be kept, each (B,).

    Raises:
        InputError: images, labels or radii of a wrong shape, dtype or range.
        NotCalibratedError: the guard has no thresholds.
        ConfigurationError: the network has a layer without known bounds, or does something else with them than with
            tensors; the guard runs in half precision, or under autocast; one of its methods is not `ClusterGuard`'s.

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
    """How far each image is proved secure, by bisection.

    Args:
        guard: as in `certify`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true labels, or those that the guard gives.
        largest: radius at which to stop looking, in (0, 1].
        precision: of the radius, positive.

    Returns:
        (B,) radii in l∞ at which `certify` says that the image is secure; 0 where it says so at none.

    Raises:
        ConfigurationError: a `largest` or precision out of its range; and whatever `certify` raises.

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
    """The most that any attack within a radius can succeed, known or not: an upper bound on the ASR.

    Args:
        guard: as in `certify`.
        loader: batches of images (B, C, H, W) in [0, 1] and their true labels (B,).
        eps: radius in l∞, in [0, 1].
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
        raise InputError(f"expected images in float32 or float64, as the guard is, got {images.dtype}")
    check_labels(labels, images, guard.num_classes)
    guard.check_image_shape(images)
    check_calibrated(guard.thresholds)


class _Proofs(NamedTuple):
    """Bounds on what a guard computes in its own arithmetic, and what they prove."""

    representations: Interval
    bounds: Bounds
    certificate: Certificate


@contextmanager
def _as_in_service(guard: ClusterGuard) -> Iterator[None]:
    """The guard in the mode and arithmetic in which `detect` runs it.

    Raises:
        ConfigurationError: `detect` is not what would be bounded.
    """
    _check_methods(guard)
    if torch.is_autocast_enabled(guard.thresholds.device.type):
        raise ConfigurationError("expected certificates of a guard in float32 or float64, got autocast; leave it first")
    with full_precision(), evaluation_mode(guard):
        yield


_METHODS = ("represent", "distances", "evidence", "detect", "forward", "__call__", "__getattribute__", "__getattr__")


def _check_methods(guard: ClusterGuard) -> None:
    """What is bounded is what is used: the encoder, between a `Normalize` and `GaussianClusters`, and nothing else."""
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
            f"no bounds are known for a guard that has {', '.join(changed)} of its own; certificates are of "
            "ClusterGuard's methods around a network of any kind"
        )


def _clusters_of(guard: ClusterGuard) -> GaussianClusters:
    if not isinstance(guard.head, GaussianClusters):
        raise ConfigurationError(f"bounds are known for GaussianClusters, got the head {type(guard.head).__name__}")
    return guard.head


def _changed_in_place(module: nn.Module) -> list[str]:
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]


def _arithmetic_of(guard: ClusterGuard) -> Arithmetic:
    """The one data type of all that goes into a distance."""
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
    """What the guard can compute of every image in a ball, its rounding included, and what that proves."""
    arithmetic = _arithmetic_of(guard)
    ball = Interval.around(images.double(), radii)
    # An image is rounded when it is perturbed; what arithmetic in its dtype finds inside the ball is inside.
    error = torch.full_like(ball.lower, 2 * arithmetic.unit)
    ball = Interval(ball.lower, ball.upper, error=error, arithmetic=arithmetic)
    found = _bound_representations(guard, ball)
    clusters = _clusters_of(guard)
    bounds = _with_rounding(clusters, found, labels, _bound_distances(clusters, found, labels))
    thresholds = guard.thresholds.double()
    leads = (bounds.leads > 0) | one_hot(labels.long(), guard.num_classes).bool()
    is_secure = (leads | (bounds.nearest > thresholds)).all(dim=1)
    is_kept = leads.all(dim=1) & (bounds.farthest <= thresholds[labels.long()])
    return _Proofs(found, bounds, Certificate(is_secure, is_kept))


def _with_rounding(clusters: GaussianClusters, box: Interval, labels: Tensor, exact: Bounds) -> Bounds:
    """Bounds on the distances that are computed, not on exact ones; where they are not finite, nothing is proved.

    A lead above 0 then means that the other class's computed distance is larger than the label's, after the root too.
    """
    arithmetic, error = box.arithmetic, box.error
    if arithmetic is None or error is None:
        raise ConfigurationError("expected an interval that follows rounding, got one that does not")
    size = torch.maximum(box.lower.abs(), box.upper.abs()) + error
    energy = reduce(size.square(), "b m -> b 1", "sum")
    # The own block's distance, plus the energy of all blocks less the own one's, is at most this before it rounds.
    blocks = rearrange(size + clusters.center_scale.to(size), "b (k l) -> b k l", k=clusters.num_classes)
    squares = 2 * energy + reduce(blocks.square(), "b k l -> b k", "sum")
    # Sums over a block and over blocks; differences, squares and roots of either side round a few times more.
    block = clusters.representation_dim // clusters.num_classes
    off = arithmetic.gamma(clusters.num_classes + block + 12) * squares + arithmetic.smallest
    off = torch.where(squares < arithmetic.largest, off, torch.inf)
    own_off = off.gather(1, labels[:, None].long())
    room = 16 * arithmetic.unit * (size.norm(dim=1, keepdim=True) + blocks.flatten(1).norm(dim=1, keepdim=True))
    nearest = ((exact.nearest - room).clamp_min(0).square() - off).clamp_min(0).sqrt() * (1 - 4 * arithmetic.unit)
    farthest = (exact.farthest.square() + own_off.squeeze(1)).sqrt() * (1 + 4 * arithmetic.unit)
    return Bounds(nearest, exact.leads - off - own_off, farthest)


def check_bounds(guard: ClusterGuard, images: Tensor, labels: Tensor, *, eps: float) -> None:
    """Make sure that the guard has bounds, and that they hold on a few of these images.

    Args:
        guard: in any mode.
        images: (B, C, H, W) in [0, 1].
        labels: (B,).
        eps: radius in l∞ of the ball on which bounds are tried out.

    Raises:
        ConfigurationError: as `certify`.
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
    """Bounds of a few balls, and of those of radius 0, must hold the guard's own outputs at points in them.

    A network may do something else with an interval than with a tensor, in a way that no rule sees.
    """
    chosen = _choose(is_proved)
    if not len(chosen):
        return
    some, some_labels, reach = images[chosen], labels[chosen], radii.expand(len(images))[chosen]
    points, dtype = _sample(some.double(), reach), _arithmetic_of(guard).dtype
    points = torch.cat([points, _attack(guard, points, some_labels, reach, dtype)], dim=1).to(dtype)
    wide = _bound_in_service(guard, some, some_labels, reach) if proofs is None else _take(proofs, chosen)
    narrow = _bound_in_service(guard, some, some_labels, torch.zeros_like(reach))
    outputs = _run(guard, points)
    _check_outputs(guard, narrow, some_labels, *(part[:, :1] for part in outputs))
    _check_outputs(guard, wide, some_labels, *outputs)
    first = _take(narrow, chosen.new_zeros(1, dtype=torch.long))
    for count in (1, 2, 3):  # a network may do something else with small batches
        outputs = _run(guard, points[:1, :1].expand(1, count, *points.shape[2:]), alone=True)
        _check_outputs(guard, first, some_labels[:1], *outputs)


def _take(proofs: _Proofs, rows: Tensor) -> _Proofs:
    """Proofs of the images at these positions."""
    box = proofs.representations
    lower, upper, error = (None if end is None else end[rows] for end in (box.lower, box.upper, box.error))
    return proofs._replace(
        representations=Interval(lower, upper, error=error, arithmetic=box.arithmetic),  # type: ignore[arg-type]
        bounds=Bounds(*(part[rows] for part in proofs.bounds)),
    )


def _run(guard: ClusterGuard, points: Tensor, *, alone: bool = False) -> tuple[Tensor, Tensor]:
    """Representations and distances of points (B, P, C, H, W), each (B, P, …); unless alone, beside a blank image."""
    flat = points.flatten(0, 1)
    batch = flat if alone else torch.cat([flat, torch.ones_like(flat[:1])])  # another company than bounds had
    outputs = guard.represent(batch), guard.evidence(batch).suspicion
    representations, distances = (output[: len(flat)].double().unflatten(0, points.shape[:2]) for output in outputs)
    return representations, distances


def _choose(is_proved: Tensor) -> Tensor:
    """Positions of a few images, evenly spaced, among those that are proved and among all."""
    chosen = [
        candidates[torch.linspace(0, len(candidates) - 1, min(len(candidates), _SAMPLED_IMAGES)).long()]
        for candidates in (is_proved.nonzero().squeeze(1).cpu(), torch.arange(len(is_proved)))
    ]
    positions: Tensor = torch.cat(chosen).unique()
    return positions.to(is_proved.device)


def _sample(images: Tensor, radii: Tensor) -> Tensor:
    """Each image, inner points of its ball and corners of it: (B, C, H, W) -> (B, 1 + points, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(images), 2 * _SAMPLED_POINTS, *images.shape[1:])
    noise = 2 * torch.rand(shape, generator=generator, dtype=images.dtype).to(images.device) - 1
    noise[:, _SAMPLED_POINTS:] = noise[:, _SAMPLED_POINTS:].sign()
    noise[:, -1], noise[:, -2] = 1, -1  # all pixels brighter, all darker
    moved = (images[:, None] + radii.view(-1, 1, 1, 1, 1) * noise).clamp(0, 1)
    return torch.cat([images[:, None].clamp(0, 1), moved], dim=1)


def _attack(guard: ClusterGuard, points: Tensor, labels: Tensor, radii: Tensor, dtype: torch.dtype) -> Tensor:
    """Corners of each ball along the signs of gradients, around the first of points (B, P, C, H, W): (B, 8, C, H, W).

    They lie where the label's lead and its distance are smallest and largest. A network without gradients has none. The
    encoder is taken as it was written, for to compile its gradients would take minutes.
    """
    own, reach = labels.long()[:, None], radii.view(-1, 1, 1, 1)
    found = points[:, :0]
    for sign, is_of_lead in itertools.product((1, -1), (True, False)):
        at = points[:, 0]
        for _ in range(_ATTACK_STEPS):
            with torch.inference_mode(False), torch.enable_grad():
                start = at.to(dtype, copy=True).requires_grad_()
                try:
                    squared = _clusters_of(guard).squared_distances(guard.encoder(guard.normalize(start)))
                    distances = squared.gather(1, own).squeeze(1)
                    goal = squared.scatter(1, own, torch.inf).amin(dim=1) - distances if is_of_lead else distances
                    slope = torch.autograd.grad(goal.sum(), start)[0].double().nan_to_num()
                except Exception as error:  # whatever a network without gradients raises
                    if isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError):
                        raise  # of memory or the device
                    return found
            at = (points[:, 0] - sign * reach * slope.sign()).clamp(0, 1)
            found = torch.cat([found, at[:, None]], dim=1)
    return found


def _check_outputs(guard: ClusterGuard, proofs: _Proofs, labels: Tensor, found: Tensor, distances: Tensor) -> None:
    """Representations (B, P, m) and distances (B, P, K) at P points of each of B balls lie within the balls' bounds."""
    box, bounds = proofs.representations, proofs.bounds
    error = torch.zeros_like(box.lower) if box.error is None else box.error
    centers = _clusters_of(guard).centers.to(found)
    along = torch.einsum("bkm,bpm->bpk", centers[labels.long()][:, None] - centers, found)
    own = distances.gather(2, labels.long().view(-1, 1, 1).expand(-1, distances.shape[1], 1))
    is_own = one_hot(labels.long(), guard.num_classes).bool()
    is_outside = (
        ((found < (box.lower - error)[:, None]) | (found > (box.upper + error)[:, None])).any()
        | (found.isnan() & (box.lower - error).isfinite()[:, None]).any()
        | ((2 * along < bounds.leads[:, None]) & ~is_own[:, None]).any()
        | (distances < bounds.nearest[:, None]).any()
        | (own > bounds.farthest[:, None, None]).any()
        | ((distances <= own) & (bounds.leads > 0)[:, None] & ~is_own[:, None]).any()
    )
    if is_outside:
        raise ConfigurationError(
            "no bounds are known for this network: its outputs on some images lie outside the bounds computed for "
            "them. It does something else with intervals than with tensors (such as asking for their type), mixes the "
            "images of a batch, or is random in eval mode"
        )
