"""Certificates: a proof for each image that holds for every perturbation within a radius."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from clusterguard._support import (
    IN_GREY_LEVELS,
    CompiledCall,
    check_calibrated,
    check_images,
    check_labels,
    check_linf_radius,
    check_numbers,
    is_changed,
)
from clusterguard.attacks import LInf, Norm, get_norm
from clusterguard.certification._bounds import (
    Certificate,
    Proofs,
    as_in_service,
    bound_in_service,
    check_methods,
)
from clusterguard.certification._pixel_balls import bound_in_norm
from clusterguard.certification._tightening import tighten
from clusterguard.certification._trial import try_out, try_out_in_norm
from clusterguard.detection import Loader, Pairs, Rate, Unpack, Verdicts, is_eligible
from clusterguard.detectors import ClusterGuard, UnanimousDetector
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor

MOST_BRANCHES = 500
Certifiable: TypeAlias = ClusterGuard | UnanimousDetector
"""What certificates can be about."""
ProofMethod = Literal["intervals", "linear", "branching"]
_Proof = TypeVar("_Proof")


@torch.no_grad()
def certify(
    guard: Certifiable,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    method: ProofMethod = "intervals",
    branches: int = MOST_BRANCHES,
) -> Certificate:
    """Prove that no perturbation within a radius changes the guard's decision to a wrong one.

    An image is secure if, for every other class, each perturbed image is either too far from that class to be accepted
    or closer to the class of its label. So the success rate of any attack, known or not, is at most the share
    of images that are not secure.

    A proof is about the guard as `detect` runs it, uncompiled, in float32 or float64. It includes a bound on the
    rounding errors of each operation, down to the comparison with the threshold. This bound holds for IEEE arithmetic
    with sums in any order, fused or not, and for convolutions that are computed as direct products, as oneDNN and
    cuBLAS do. It does not hold for convolutions by Winograd's algorithm or by Fourier transforms, which cuDNN may
    choose at stride 1.

    Bounds are checked before they are used. The guard's outputs on every proved image, and with all its pixels brighter
    and all darker, must lie within the bounds; so must those at more points around a few of the images. Some of these
    points are random, and others follow the gradient towards the point where a proof would fail first. A network may do
    something else with a tensor than with the interval that bounds it. So the functions that it applies to both are
    compared, with their arguments: which earlier results they are, and what changes in place. A compiled guard is
    refused, because a network may tell that it is being compiled, and compilers err. The bounds of an image must be the
    same beside neighbours that may be any images, so a network that mixes the images of a batch is refused, unless it
    begins to do so in larger batches than those that are tried. A call must not move the global random states of torch,
    NumPy or Python.

    Args:
        guard: calibrated guard with a network as in `bound`, or a `UnanimousDetector`, for which a proof about one
            member is enough. Members without bounds in this norm, or of another kind, prove nothing.
        images: (B, C, H, W) in [0, 1], in the guard's data type.
        labels: (B,) true labels, or the guard's labels.
        eps: radius in `norm`. In l∞ it is in [0, 1], one number or (B,); in l0 it is the number of pixels, for patches
            the side in pixels.
        norm: name of the norm, a key of `clusterguard.attacks.NORMS`. Norms other than l∞ need a network that is one
            linear layer of the pixels, as `make_template_guard` makes it, whose bounds are exact for each linear
            function in l1, l0 and for patches. In l0 and for patches there are also bounds for `make_local_guard`.
        method: "intervals", "linear" or "branching", each of which also tries what the one before it does not prove
            secure. "linear" takes linear bounds. These are tighter, and take about half a second an image for a small
            network. They need a network of ReLUs, linear layers, convolutions, batch normalisation, average pooling and
            sums. "branching" also splits the ball of an image into branches in which some ReLUs are known to be on or
            off (branch and bound). It first attacks the image, and leaves out those that a short APGD breaks. Under a
            head that does not ask for one direction for each class, it proves what "linear" proves; `GaussianClusters`
            and `FeatureGaussians` ask for them.
        branches: how many branches to try for an image at most, from 2 on; for method "branching" only. A hundred take
            about two seconds for a small network.

    Returns:
        Whether each image is proved secure and whether it is proved to be kept, each (B,).

    Raises:
        InputError: images, labels or radii have a wrong shape, dtype or range.
        NotCalibratedError: the guard has no thresholds.
        ConfigurationError: the network has a layer without known bounds, or treats intervals differently from tensors;
            the guard runs in half precision or under autocast, or is compiled; one of its methods is not that of
            `ClusterGuard`; the method is unknown. For a `UnanimousDetector`: none of its members has bounds, or its
            own thresholds are larger than 0.

    Reference:
        Zhang et al., "Efficient neural network robustness certification with general activation functions" (2018), for
        linear bounds. Wang et al., "Beta-CROWN: efficient bound propagation with per-neuron split constraints for
        complete and incomplete neural network robustness verification" (2021), for branches.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([3.0, 3.0])
        >>> images = torch.rand(4, 1, 1, 2)
        >>> certify(guard, images, guard.detect(images).labels, eps=0.0).is_secure.all()
        tensor(True)
    """
    if isinstance(guard, UnanimousDetector):
        options: dict[str, Any] = {"eps": eps, "norm": norm, "method": method, "branches": branches}
        known = _about_members(guard, lambda member: certify(member, images, labels, **options))
        is_kept = torch.stack([proof.is_kept for proof in known]).all(dim=0) & (len(known) == len(guard.members))
        is_kept &= guard.thresholds[labels.long()] >= 0
        return Certificate(torch.stack([proof.is_secure for proof in known]).any(dim=0), is_kept)
    _check(guard, images, labels, method, branches)
    ball = _find_norm(norm, method)
    radii = _check_radii(ball, eps, images).to(images.device).expand(len(images))
    if not len(images):
        return Certificate(labels.bool(), labels.bool())
    images = _as_seen(images)
    with as_in_service(guard) as guard:
        proofs = _prove(guard, images, labels, ball, radii, method, branches)
        _try_out(guard, images, labels, ball, radii, proofs)
    return proofs.certificate


@torch.no_grad()
def certified_radius(
    guard: Certifiable,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    largest: float | None = None,
    tolerance: float = 1e-3,
    method: ProofMethod = "intervals",
    branches: int = MOST_BRANCHES,
) -> Tensor:
    """The largest radius at which each image is proved secure, by bisection.

    Args:
        guard: guard as in `certify`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true labels, or the guard's labels.
        norm: name of the norm, as in `certify`.
        largest: largest radius to try, positive, and at least 1 where radii are whole numbers; None takes the size of
            the largest change that an image can have, 1 in l∞ and the number of pixels in l0.
        tolerance: largest error of the radius, positive. Where radii are whole numbers, they are exact.
        method: method as in `certify`.
        branches: number as in `certify`.

    Returns:
        (B,) radii at which `certify` proves the image secure; 0 where it proves it at none of the tried radii.

    Raises:
        ConfigurationError: `largest` or `tolerance` is out of its range.
        ClusterGuardError: any error of `certify`.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([3.0, 3.0])
        >>> certified_radius(guard, torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1])).shape
        torch.Size([4])
    """
    if isinstance(guard, UnanimousDetector):
        options: dict[str, Any] = {"norm": norm, "largest": largest, "tolerance": tolerance}
        options |= {"method": method, "branches": branches}
        found = _about_members(guard, lambda member: certified_radius(member, images, labels, **options))
        return torch.stack(found).amax(dim=0)
    _check(guard, images, labels, method, branches)
    ball = _find_norm(norm, method)
    most = ball.largest(images.shape[1:])
    largest = most if largest is None else largest
    check_numbers(largest=largest, tolerance=tolerance)
    if not (0 < tolerance < torch.inf and 0 < largest <= most and ball.grain <= largest):
        least = f"[{ball.grain:g}" if ball.grain else "(0"
        raise ConfigurationError(
            f"expected a positive tolerance and a largest radius in {least}, {most:g}], got {tolerance} and {largest}"
            f"{'' if ball.grain else f'; {IN_GREY_LEVELS}'}"
        )
    radii = images.new_full((len(images),), ball.round_radius(largest), dtype=torch.float64)
    if not len(images):
        return radii
    images = _as_seen(images)
    proved, open_end, tried = torch.zeros_like(radii), radii, radii
    with as_in_service(guard) as guard:
        for _ in range(1 + max(0, math.ceil(math.log2(largest) - math.log2(ball.grain or tolerance)))):
            secure = _prove(guard, images, labels, ball, tried, method, branches).certificate.is_secure
            proved, open_end = torch.where(secure, tried, proved), torch.where(secure, open_end, tried)
            tried = (proved + open_end) / 2
            tried = tried // ball.grain * ball.grain if ball.grain else tried
        proofs = _prove(guard, images, labels, ball, proved, method, branches)
        _try_out(guard, images, labels, ball, proved, proofs)
    return proved


@torch.no_grad()
def certified_success_rate(
    guard: Certifiable,
    loader: Loader,
    *,
    eps: float,
    norm: str = "linf",
    method: ProofMethod = "intervals",
    branches: int = MOST_BRANCHES,
    unpack: Unpack | None = None,
) -> Rate:
    """An upper bound on the success rate of every attack within a radius, known or not.

    Args:
        guard: guard as in `certify`.
        loader: batches of images (B, C, H, W) in [0, 1] and their true labels (B,).
        eps: radius in `norm`.
        norm: name of the norm, as in `certify`.
        method: method as in `certify`. Only images that are accepted before an attack are tried.
        branches: number as in `certify`.
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
    if isinstance(_find_norm(norm, method), LInf):  # other norms have a limit that depends on the images
        check_linf_radius(eps)
    counted, broken, is_empty = 0, 0, True
    for images, labels in Pairs(loader, unpack):
        images, labels = images.to(guard.thresholds.device), labels.to(guard.thresholds.device)
        eligible = is_eligible(Verdicts(guard.detect(images), labels))
        counted += int(eligible.sum())
        secure = certify(
            guard, images[eligible], labels[eligible], eps=eps, norm=norm, method=method, branches=branches
        ).is_secure
        broken += int((~secure).sum())
        is_empty = False
    if is_empty:
        raise InputError("expected a loader with at least one batch, got an empty one")
    return Rate(broken, counted)


def _about_members(detector: UnanimousDetector, prove: Callable[[Any], _Proof]) -> list[_Proof]:
    """What is proved about each member that has bounds.

    Raises:
        NotCalibratedError: the detector has no thresholds.
        ConfigurationError: none has, or the detector accepts images that a member refuses.
    """
    check_calibrated(detector.thresholds)
    if is_changed(detector) or type(detector) is not UnanimousDetector:
        raise ConfigurationError("no bounds are known for a UnanimousDetector with hooks or methods of its own")
    if not bool((detector.thresholds <= 0).all()):
        raise ConfigurationError(
            f"expected thresholds of at most 0, got {detector.thresholds.tolist()}; with larger ones this detector "
            "accepts images that a member refuses, so that proofs about members are not about it"
        )
    proofs, reasons = [], []
    for member in detector.detectors:
        try:
            proofs.append(prove(member))
        except ConfigurationError as error:
            reasons.append(error)
    if not proofs:
        raise reasons[0]
    return proofs


def _prove(
    guard: ClusterGuard,
    images: Tensor,
    labels: Tensor,
    norm: Norm,
    radii: Tensor,
    method: ProofMethod,
    branches: int,
) -> Proofs:
    if not isinstance(norm, LInf):
        return bound_in_norm(guard, images, labels, norm, radii)
    proofs = bound_in_service(guard, images, labels, radii)
    if method == "intervals":
        return proofs
    return tighten(guard, images, labels, radii, proofs, branches if method == "branching" else 0)


def _try_out(guard: ClusterGuard, images: Tensor, labels: Tensor, norm: Norm, radii: Tensor, proofs: Proofs) -> None:
    if not isinstance(norm, LInf):
        try_out_in_norm(guard, images, labels, norm, radii, proofs)
        return
    is_proved = proofs.certificate.is_secure | proofs.certificate.is_kept
    try_out(guard, images, labels, radii, is_proved, proofs)


def _as_seen(images: Tensor) -> Tensor:
    """The images that a network sees of images that `detect` takes: pixels that rounding moved out of [0, 1] move back.

    No norm of a change grows by that, so a ball around these images holds what the network sees of the other ball.
    """
    return torch.where(images.isfinite(), images.clamp(0, 1), images)


def _find_norm(name: str, method: ProofMethod) -> Norm:
    """The norm with this name.

    Raises:
        ConfigurationError: the norm is unknown, or the method is not for it.
    """
    norm = get_norm(name)
    if method != "intervals" and not isinstance(norm, LInf):
        raise ConfigurationError(f"expected method='intervals' in {name}, got {method!r}, which is for linf")
    return norm


def _check_radii(norm: Norm, eps: float | Tensor, images: Tensor) -> Tensor:
    """The radii in float64, () or (B,).

    Raises:
        InputError: a radius is out of range, or there are not as many as images.
    """
    if isinstance(norm, LInf):
        return check_linf_radius(eps, images.shape[:1])
    most = norm.largest(images.shape[1:])
    if not isinstance(eps, Tensor):
        check_numbers(eps=eps)
    radii = torch.as_tensor(eps, dtype=torch.float64)
    if radii.shape not in (torch.Size([]), images.shape[:1]) or not bool(((radii >= 0) & (radii <= most)).all()):
        raise InputError(
            f"expected a radius eps from 0 to {most:g} in {norm.name}, one number or a tensor of shape "
            f"({len(images)},), got {eps}"
        )
    return radii


def _check(guard: ClusterGuard, images: Tensor, labels: Tensor, method: ProofMethod, branches: int) -> None:
    if method not in get_args(ProofMethod):
        raise ConfigurationError(f"expected method 'intervals', 'linear' or 'branching', got {method!r}")
    check_numbers(whole=True, branches=branches)
    if branches < 2:
        raise ConfigurationError(f"expected at least 2 branches, because a ball splits into two, got {branches}")
    check_methods(guard)
    if isinstance(guard._encode, CompiledCall):
        raise ConfigurationError(
            "expected a guard that is not compiled, because torch.compile may run another network than that which is "
            "written; certify copy.deepcopy(guard), which is not compiled"
        )
    check_images(images)
    if images.dtype not in (torch.float32, torch.float64):
        raise InputError(f"expected images in float32 or float64, like the guard, got {images.dtype}")
    dtypes = {weight.dtype for weight in guard.parameters()}
    if dtypes in ({torch.float32}, {torch.float64}) and images.dtype not in dtypes:
        # Pixels would be rounded otherwise than the verdict, by more than proofs allow for, or could not be judged.
        raise InputError(
            f"expected images in {dtypes.pop()}, like the guard, got {images.dtype}; convert them by .to()"
        )
    check_labels(labels, images, guard.num_classes)
    guard.check_image_shape(images)
    check_calibrated(guard.thresholds)
