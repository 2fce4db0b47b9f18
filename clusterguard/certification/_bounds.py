"""Bounds on what a guard computes of every image in a ball, with the rounding of its own arithmetic."""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from clusterguard._support import (
    CompiledCall,
    call,
    evaluation_mode,
)
from clusterguard.certification._intervals import Interval, final_refusals
from clusterguard.detection import Arithmetic, full_precision
from clusterguard.detectors import ClusterGuard, GaussianClusters, Normalize
from clusterguard.errors import ClusterGuardError, ConfigurationError, in_one_line
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import one_hot

# Errors of memory or of the device, which say nothing about a network. Older torch has no AcceleratorError.
DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


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
    return _bound_distances(clusters_of(guard), _bound_representations(guard, Interval.around(images, eps)), labels)


def _bound_representations(guard: ClusterGuard, box: Interval) -> Interval:
    """The interval (B, m) of the guard's representations of a box of images (B, C, H, W) in [0, 1]."""
    lower, upper = guard.normalize(box.lower), guard.normalize(box.upper)
    error = None
    if box.error is not None and box.arithmetic is not None:
        size = torch.maximum(lower.abs(), upper.abs())
        error = box.error / guard.normalize.std.to(lower) + box.arithmetic.gamma(3) * size + box.arithmetic.smallest
    try:
        with final_refusals(), _forgetting(guard.encoder):
            representations = guard.encoder(Interval(lower, upper, error=error, arithmetic=box.arithmetic))
    except ClusterGuardError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, DEVICE_ERRORS):
            raise
        raise ConfigurationError(f"no bounds are known for this network: {in_one_line(error)}") from error
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


@contextmanager
def _forgetting(network: nn.Module) -> Iterator[None]:
    """Undo what a network stores meanwhile, such as its last activations, which are intervals here.

    That covers its attributes, its buffers, and the lists and dicts that are among or within them.
    """
    found: dict[int, Any] = {}
    for part in network.modules():
        _collect_containers(vars(part), found)
    before = [(container, copy.copy(container)) for container in found.values()]
    try:
        yield
    finally:
        for container, content in before:
            _restore(container, content)


def _collect_containers(value: Any, found: dict[int, Any]) -> None:
    """Add a list or dict, and those within it, to those that were found before."""
    if id(value) in found or not isinstance(value, dict | list | deque | tuple):
        return
    if not isinstance(value, tuple):
        found[id(value)] = value
    for part in value.values() if isinstance(value, dict) else value:
        _collect_containers(part, found)


def _restore(container: Any, content: Any) -> None:
    """Give a container its former content. Another thread never misses an attribute meanwhile."""
    if isinstance(container, dict):
        for name in [name for name in container if name not in content]:
            del container[name]
        container.update({name: value for name, value in content.items() if container.get(name) is not value})
    elif [*map(id, container)] != [*map(id, content)]:
        if isinstance(container, list):
            container[:] = content
        else:
            container.clear()
            container.extend(content)


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


class Proofs(NamedTuple):
    """Bounds on what a guard computes in its own arithmetic, and the certificate that follows from them."""

    representations: Interval
    bounds: Bounds
    certificate: Certificate


@contextmanager
def as_in_service(guard: ClusterGuard) -> Iterator[None]:
    """Put the guard into the mode and arithmetic in which `detect` runs it.

    Raises:
        ConfigurationError: the bounds would not be those of `detect`.
    """
    check_methods(guard)
    if torch.is_autocast_enabled(guard.thresholds.device.type):
        raise ConfigurationError("expected certificates of a guard in float32 or float64, got autocast; leave it first")
    with full_precision(), evaluation_mode(guard):
        yield


_METHODS = ("represent", "distances", "evidence", "detect", "forward", "__call__", "__getattribute__", "__getattr__")


def check_methods(guard: ClusterGuard) -> None:
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


def clusters_of(guard: ClusterGuard) -> GaussianClusters:
    if not isinstance(guard.head, GaussianClusters):
        raise ConfigurationError(f"bounds are known for GaussianClusters, got the head {type(guard.head).__name__}")
    return guard.head


def _changed_in_place(module: nn.Module) -> list[str]:
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]


def arithmetic_of(guard: ClusterGuard) -> Arithmetic:
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


def bound_in_service(guard: ClusterGuard, images: Tensor, labels: Tensor, radii: Tensor) -> Proofs:
    """Bounds on what the guard computes for every image in a ball, rounding included, and what they prove."""
    arithmetic = arithmetic_of(guard)
    ball = Interval.around(images.double(), radii)
    # Perturbing an image rounds it. The error covers each image whose distance, computed in its dtype, is within radii.
    error = torch.full_like(ball.lower, 2 * arithmetic.unit)
    ball = Interval(ball.lower, ball.upper, error=error, arithmetic=arithmetic)
    representations = _bound_representations(guard, ball)
    clusters = clusters_of(guard)
    exact = _bound_distances(clusters, representations, labels)
    bounds = _with_rounding(clusters, representations, labels, exact)
    thresholds = guard.thresholds.double()
    leads = (bounds.leads > 0) | one_hot(labels.long(), guard.num_classes).bool()
    is_secure = (leads | (bounds.nearest > thresholds)).all(dim=1)
    is_kept = leads.all(dim=1) & (bounds.farthest <= thresholds[labels.long()])
    return Proofs(representations, bounds, Certificate(is_secure, is_kept))


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
