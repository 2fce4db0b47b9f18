"""Checks of bounds on actual outputs of the guard, before a certificate relies on the bounds."""

import itertools

import torch
from clusterguard._support import draws_random_numbers
from clusterguard.attacks import Norm
from clusterguard.certification._bounds import (
    DEVICE_ERRORS,
    Proofs,
    arithmetic_of,
    as_in_service,
    bound_in_service,
    errors_of_network,
    run_encoder,
)
from clusterguard.certification._intervals import Interval
from clusterguard.certification._steps import IMAGE, compare_steps, recorded_steps
from clusterguard.detectors import Bounds, ClusterGuard
from clusterguard.errors import ConfigurationError
from torch import Tensor
from torch.nn.functional import one_hot

_SAMPLED_IMAGES = 4  # bounds are checked on up to this many proved images, and on as many of all images
_SAMPLED_POINTS = 8  # inner points of the ball around each image, and as many of its corners
_AT_ONCE = 128  # proved images that are checked in one batch, at three points each
_NEIGHBOURS = 3  # between two images whose bounds must not depend on them, and as many around both
_ATTACK_STEPS = 2  # gradient steps from corner to corner, towards the point where a proof would fail first


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
    with torch.no_grad(), as_in_service(guard) as guard:
        try_out(guard, images, labels, torch.as_tensor(eps, dtype=torch.float64), torch.zeros_like(labels).bool())


def try_out(
    guard: ClusterGuard,
    images: Tensor,
    labels: Tensor,
    radii: Tensor,
    is_proved: Tensor,
    proofs: Proofs | None = None,
) -> None:
    """Check that the bounds contain the guard's outputs at three points of the ball around each proved image.

    A few images are checked at more points, and also in a ball of radius 0. A network may treat an interval differently
    from a tensor without any rule noticing, for instance if it asks for the type of its input, and do so only for some
    images. So the steps that it takes for both are compared, too. It must not draw random numbers, nor mix images.
    """
    chosen = _choose(is_proved)
    if not len(chosen):
        return
    _check_repeatable(guard, images[chosen[:1]])
    if proofs is not None and is_proved.any():  # a split of nothing is one empty batch, which not every network takes
        for rows in is_proved.nonzero().squeeze(1).split(_AT_ONCE):
            ends = _ends(images[rows].double(), radii.expand(len(images))[rows]).to(arithmetic_of(guard).dtype)
            _check_outputs(guard, _take(proofs, rows), labels[rows], *_run(guard, ends))
    images, labels, radii = images[chosen], labels[chosen], radii.expand(len(images))[chosen]
    points, dtype = _sample(images.double(), radii), arithmetic_of(guard).dtype
    points = torch.cat([points, _attack(guard, points, labels, radii, dtype)], dim=1).to(dtype)
    wide = bound_in_service(guard, images, labels, radii) if proofs is None else _take(proofs, chosen)
    narrow = bound_in_service(guard, images, labels, torch.zeros_like(radii))
    _check_independent(guard, images[:2], radii[:2], wide.representations)
    outputs = _run(guard, points)
    _check_outputs(guard, narrow, labels, *(part[:, :1] for part in outputs))
    _check_outputs(guard, wide, labels, *outputs)
    first = _take(narrow, chosen.new_zeros(1, dtype=torch.long))
    for count in (1, 2, 3):  # a network may treat small batches differently
        outputs = _run(guard, points[:1, :1].expand(1, count, *points.shape[2:]), alone=True)
        _check_outputs(guard, first, labels[:1], *outputs)
    _check_steps(guard, images.to(dtype))


def try_out_in_norm(
    guard: ClusterGuard, images: Tensor, labels: Tensor, norm: Norm, radii: Tensor, proofs: Proofs
) -> None:
    """Check that the bounds contain the guard's outputs at random points of a few balls, and at their centres.

    The network itself is checked as for l∞, in balls of radius 0.
    """
    try_out(guard, images, labels, torch.zeros(len(images), dtype=torch.float64), torch.zeros_like(labels).bool())
    certificate = proofs.certificate
    chosen = _choose(certificate.is_secure | certificate.is_kept)
    generator = torch.Generator(images.device).manual_seed(0)
    points = [
        images[chosen],
        *(norm.random_start(images[chosen], radii[chosen], generator) for _ in range(_SAMPLED_POINTS)),
    ]
    outputs = _run(guard, torch.stack(points, dim=1))
    _check_outputs(guard, _take(proofs, chosen), labels[chosen], *outputs)


def _check_repeatable(guard: ClusterGuard, images: Tensor) -> None:
    """Check that the guard draws no random numbers, which might change few of its answers."""
    with errors_of_network():
        is_random = draws_random_numbers(lambda: guard.evidence(images), guard.thresholds.device)
    if is_random:
        raise ConfigurationError(
            "no bounds are known for this network: it is random in eval mode, because a call moves a global random "
            "state; let it draw numbers only while self.training is True"
        )


def _check_independent(guard: ClusterGuard, images: Tensor, radii: Tensor, box: Interval) -> None:
    """Check that the box of an image's representation does not depend on the other images of its batch.

    No image can then change what the network computes for another one in such a batch. Only rounding may differ.
    """
    count = _NEIGHBOURS + len(images) * (1 + _NEIGHBOURS)
    # The ball of radius 0.5 around 0.5 holds every image.
    rows, reach = images.new_full((count, *images.shape[1:]), 0.5), radii.new_full((count,), 0.5)
    here = slice(_NEIGHBOURS, None, 1 + _NEIGHBOURS)
    rows[here], reach[here] = images, radii
    beside = bound_in_service(guard, rows, torch.zeros(count, dtype=torch.long, device=rows.device), reach)
    for end in ("lower", "upper", "error"):
        one, other = getattr(box, end)[: len(images)], getattr(beside.representations, end)[here]
        if (one.isfinite() & ~((one - other).abs() <= 0.1 * box.error[: len(images)])).any():  # type: ignore[index]
            raise ConfigurationError(
                "no bounds are known for this network: it mixes the images of a batch, because the bounds of an image "
                "depend on the others; take BatchNorm with running statistics, or GroupNorm"
            )


def _check_steps(guard: ClusterGuard, images: Tensor) -> None:
    """Check that the network does the same with a tensor as with an interval: the same functions of the same numbers.

    Neither a type that it asks for nor an error that it catches can make a difference then.
    """
    normalized = guard.normalize(images.clamp(0, 1))
    with recorded_steps() as steps:
        maker = run_encoder(guard, Interval(normalized, normalized).made_by(IMAGE)).maker
    with errors_of_network(), compare_steps(steps, normalized) as following:
        following.finish(guard.encoder(normalized), maker)
    if following.difference is not None:
        raise ConfigurationError(
            "no bounds are known for this network: it takes other steps for a tensor than for the interval that bounds "
            f"it, first at {following.difference}. It may ask for the type of its input, or catch an error that an "
            "interval raises; let it compute the same for both"
        )


def _take(proofs: Proofs, rows: Tensor) -> Proofs:
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
    with errors_of_network():
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


def _ends(images: Tensor, radii: Tensor) -> Tensor:
    """Each image, and its ball's corners with all pixels brighter and all darker: (B, C, H, W) -> (B, 3, C, H, W)."""
    moves = radii.view(-1, 1, 1, 1, 1) * torch.tensor([0.0, 1.0, -1.0]).to(images).view(1, 3, 1, 1, 1)
    return (images[:, None] + moves).clamp(0, 1)


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
                    squared = guard.head.distances(guard.encoder(guard.normalize(start))).square()
                    distances = squared.gather(1, label_column).squeeze(1)
                    others = squared.scatter(1, label_column, torch.inf)
                    goal = others.amin(dim=1) - distances if is_of_lead else distances
                    slope = torch.autograd.grad(goal.sum(), start)[0].double().nan_to_num()
                except DEVICE_ERRORS:
                    raise
                except Exception:  # a network without gradients may raise anything
                    return corners
            point = (points[:, 0] - sign * reach * slope.sign()).clamp(0, 1)
            corners = torch.cat([corners, point[:, None]], dim=1)
    return corners


def _check_outputs(
    guard: ClusterGuard, proofs: Proofs, labels: Tensor, representations: Tensor, distances: Tensor
) -> None:
    """Check representations (B, P, m) and distances (B, P, K), at P points of each of B balls, against the bounds."""
    box, bounds = proofs.representations, proofs.bounds
    error = torch.zeros_like(box.lower) if box.error is None else box.error
    lower, upper = (box.lower - error)[:, None], (box.upper + error)[:, None]
    label_column = labels.long().view(-1, 1, 1).expand(-1, distances.shape[1], 1)
    label_distances = distances.gather(2, label_column)
    squared = guard.head.distances(representations.flatten(0, 1)).square().unflatten(0, representations.shape[:2])
    leads = squared - squared.gather(2, label_column)  # in float64, without the rounding of the guard's own distances
    is_label = one_hot(labels.long(), guard.num_classes).bool()
    is_outside = (
        ((representations < lower) | (representations > upper)).any()
        | (representations.isnan() & lower.isfinite()).any()
        | ((leads < bounds.leads[:, None]) & ~is_label[:, None]).any()
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
