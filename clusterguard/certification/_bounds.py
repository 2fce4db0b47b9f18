"""Bounds on the outputs of a guard for all images in a ball, including its rounding errors."""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from clusterguard._support import CompiledCall, call_uncompiled, changed_in_place, evaluation_mode, reachable
from clusterguard.certification._intervals import Interval, final_refusals
from clusterguard.detection import Arithmetic, full_precision
from clusterguard.detectors import Bounds, ClusterGuard, Head, Normalize
from clusterguard.errors import ClusterGuardError, ConfigurationError, in_one_line
from torch import Tensor, nn
from torch.nn.functional import one_hot

# Errors of memory or of the device, which are no faults of a network. Older torch has no AcceleratorError.
DEVICE_ERRORS = (
    MemoryError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)


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
        ConfigurationError: the network has a layer without known bounds, or the head has no bounds.

    Reference:
        Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust models" (2018);
        the bounds on distances are the head's.
    """
    return guard.head.bound_distances(bound_representations(guard, Interval.around(images, eps)), labels)


def bound_representations(guard: ClusterGuard, box: Interval) -> Interval:
    """The interval (B, m) of the guard's representations of a box of images (B, C, H, W) in [0, 1]."""
    return run_encoder(guard, normalize_box(guard, box))


def normalize_box(guard: ClusterGuard, box: Interval) -> Interval:
    """The box of the normalised images, of a box of images (B, C, H, W) in [0, 1]."""
    lower, upper = guard.normalize(box.lower), guard.normalize(box.upper)
    error = None
    if box.error is not None and box.arithmetic is not None:
        size = torch.maximum(lower.abs(), upper.abs())
        error = box.error / guard.normalize.std.to(lower) + box.arithmetic.gamma(3) * size + box.arithmetic.smallest
    return Interval(lower, upper, error=error, arithmetic=box.arithmetic)


def run_encoder(guard: ClusterGuard, box: Interval) -> Interval:
    """The interval (B, m) of representations that the encoder returns for one of normalised images (B, C, H, W)."""
    with errors_of_network(), final_refusals(), _forgetting(guard.encoder):
        representations = guard.encoder(box)
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
def errors_of_network() -> Iterator[None]:
    """Turn whatever a network raises, except for errors of memory or of the device, into an error of clusterguard."""
    try:
        yield
    except (ClusterGuardError, *DEVICE_ERRORS):
        raise
    except Exception as error:
        raise ConfigurationError(f"no bounds are known for this network: {in_one_line(error)}") from error


@contextmanager
def _forgetting(network: nn.Module) -> Iterator[None]:
    """Undo changes that a network makes to itself within the block, such as storing its last activations.

    That covers its attributes, its buffers, and the lists and dicts that are among or within them.
    """
    containers: dict[int, Any] = {}
    for part in network.modules():
        _collect_containers(vars(part), containers)
    before = [(container, copy.copy(container)) for container in containers.values()]
    try:
        yield
    finally:
        for container, content in before:
            _restore(container, content)


def _collect_containers(value: Any, containers: dict[int, Any]) -> None:
    """Add a list or dict, and the lists and dicts within it, to the dict `containers`."""
    if id(value) in containers or not isinstance(value, dict | list | deque | tuple):
        return
    if not isinstance(value, tuple):
        containers[id(value)] = value
    for part in value.values() if isinstance(value, dict) else value:
        _collect_containers(part, containers)


def _restore(container: Any, content: Any) -> None:
    """Give a container its former content, so that no other thread finds an attribute missing in between."""
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


class Proofs(NamedTuple):
    """Bounds on the outputs of a guard, rounding errors included, and the certificate that follows from them."""

    representations: Interval
    bounds: Bounds
    certificate: Certificate


@contextmanager
def as_in_service(guard: ClusterGuard) -> Iterator[ClusterGuard]:
    """Give the guard in the mode and arithmetic in which `detect` runs it.

    Raises:
        ConfigurationError: the guard's methods are not those that have bounds, a part of its network is compiled, or
            autocast is switched on.
    """
    check_methods(guard)
    _check_not_compiled(guard.encoder)
    if torch.is_autocast_enabled(guard.thresholds.device.type):
        raise ConfigurationError("expected certificates of a guard in float32 or float64, got autocast; leave it first")
    with full_precision(), evaluation_mode(guard) as seen:
        yield seen


_METHODS = ("represent", "distances", "evidence", "detect", "forward", "__call__", "__getattribute__", "__getattr__")


def check_methods(guard: ClusterGuard) -> None:
    """Refuse a guard that computes more than the bounds cover: `Normalize`, an encoder and a head with bounds."""
    if not isinstance(guard, ClusterGuard):
        raise ConfigurationError(f"expected a ClusterGuard, got {type(guard).__name__}; nothing else has bounds")
    changed = [name for name in _METHODS if getattr(type(guard), name, None) is not getattr(ClusterGuard, name, None)]
    changed += changed_in_place(guard)
    if not (guard._encode is call_uncompiled or type(guard._encode) is CompiledCall):
        changed.append("_encode")
    is_known = {"head": _has_own_bounds(type(guard.head)), "normalize": type(guard.normalize) is Normalize}
    for name in is_known:
        part = getattr(guard, name)
        if not is_known[name] or changed_in_place(part) or part._forward_hooks or part._forward_pre_hooks:
            changed.append(name)
    if not is_known["head"] and changed == ["head"]:
        raise ConfigurationError(
            f"no bounds are known for the head {type(guard.head).__name__}; certificates need a head whose class "
            "defines bound_distances itself, as GaussianClusters does"
        )
    if changed:
        raise ConfigurationError(
            f"no bounds are known for a guard that has {', '.join(changed)} of its own; certificates need "
            "ClusterGuard's own methods, around any network"
        )


def _check_not_compiled(network: nn.Module) -> None:
    """Refuse a network that holds compiled code, which may compute something else than its steps.

    The search looks at what the network's objects and functions refer to. Compiled code that it misses is a difference
    when steps are compared.
    """
    for path, part in reachable(network, "encoder"):
        if isinstance(part, FunctionType) and hasattr(part, "get_compiler_config"):  # torch.compile adds it
            raise ConfigurationError(
                f"no bounds are known for this network: a part of it is compiled ({path}), and torch.compile may run "
                "another one than that which is written; certify the guard with the part as it was before torch.compile"
            )


class _EmptyHead(Head):
    """Has no attribute but those that Python gives to every class."""


def _has_own_bounds(kind: type[Head]) -> bool:
    """Whether no attribute of a class is newer than its bounds, which could be of other distances then."""
    newest = next(parent for parent in kind.__mro__ if vars(parent).keys() - vars(_EmptyHead).keys())
    return "bound_distances" in vars(newest)


def arithmetic_of(guard: ClusterGuard) -> Arithmetic:
    """The arithmetic of the guard, whose weights must all have the same data type.

    Buffers of the encoder may have another one. Where they are used, the rules of intervals look at it.
    """
    parts = (guard.normalize, guard.head)
    tensors = (*guard.encoder.parameters(), *(x for part in parts for x in (*part.parameters(), *part.buffers())))
    dtypes = sorted({tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}, key=str)
    if dtypes not in ([torch.float32], [torch.float64]):
        raise ConfigurationError(
            f"expected a guard in float32 or float64, got {', '.join(map(str, dtypes))}; convert it with .float(), "
            "calibrate it again, and certify that"
        )
    return Arithmetic.of(dtypes[0])


def bound_in_service(guard: ClusterGuard, images: Tensor, labels: Tensor, radii: Tensor) -> Proofs:
    """Bounds on the guard's outputs for every image in a ball, rounding errors included, and what they prove."""
    representations = bound_representations(guard, ball_in_service(guard, images, radii))
    if representations.arithmetic is None or representations.error is None:
        raise ConfigurationError("expected an interval that follows rounding, got one that does not")
    return prove(guard, representations, guard.head.bound_distances(representations, labels), labels)


def ball_in_service(guard: ClusterGuard, images: Tensor, radii: Tensor) -> Interval:
    """The ball of radius (B,) around each image (B, C, H, W), with the rounding of images in the guard's arithmetic."""
    arithmetic = arithmetic_of(guard)
    # An infinite pixel becomes NaN, of which nothing is proved: detect refuses the image, whatever its ball holds.
    ball = Interval.around(images.double().masked_fill(~images.isfinite(), torch.nan), radii)
    # Perturbing an image rounds it. The error covers each image whose distance, computed in its dtype, is within radii.
    error = torch.full_like(ball.lower, 2 * arithmetic.unit)
    return Interval(ball.lower, ball.upper, error=error, arithmetic=arithmetic)


def prove(guard: ClusterGuard, representations: Interval, bounds: Bounds, labels: Tensor) -> Proofs:
    """What bounds on the guard's distances prove, given its thresholds."""
    is_kept = _leads(bounds, labels).all(dim=1) & (bounds.farthest <= guard.thresholds.double()[labels.long()])
    return Proofs(representations, bounds, Certificate(is_excluded(guard, bounds, labels).all(dim=1), is_kept))


def is_excluded(guard: ClusterGuard, bounds: Bounds, labels: Tensor) -> Tensor:
    """Whether bounds prove that no image of the ball is accepted under each wrong label, (B, K); true of the label."""
    return _leads(bounds, labels) | (bounds.nearest > guard.thresholds.double())


def _leads(bounds: Bounds, labels: Tensor) -> Tensor:
    """Whether the label is proved to be nearer than each class, (B, K); true of the label itself."""
    return (bounds.leads > 0) | one_hot(labels.long(), bounds.leads.shape[1]).bool()
