"""Proofs of images that intervals do not prove: by linear bounds, and then by branch and bound."""

from collections.abc import Callable

import torch
from clusterguard.attacks import APGD, LInf
from clusterguard.certification._bounds import Proofs, ball_in_service, bound_representations, is_excluded, prove
from clusterguard.certification._intervals import Interval
from clusterguard.certification._linear_bounds import Branches, LinearBounds
from clusterguard.detection import Arithmetic, Verdicts, is_broken
from clusterguard.detectors import Bounds, ClusterGuard
from clusterguard.errors import ConfigurationError
from torch import Tensor

_AT_ONCE = 32  # branches that are split together
_ITERATIONS, _LEARNING_RATE = 10, 0.03  # of the gradient steps in a branch, which begin where its parent's ended
_ATTACK_STEPS = 20
_ADVICE = "Take method='intervals'"


def tighten(
    guard: ClusterGuard, images: Tensor, labels: Tensor, radii: Tensor, proofs: Proofs, branches: int = 0
) -> Proofs:
    """The proofs of intervals, with linear bounds for those images that intervals do not prove secure.

    Args:
        guard: guard as in `certify`.
        images: (B, C, H, W) in [0, 1].
        labels: class labels (B,).
        radii: radii in l∞, () or (B,).
        proofs: proofs of intervals.
        branches: how many branches of its ball to try for an image that linear bounds do not prove either.

    Raises:
        ConfigurationError: the network has a step without linear bounds.
    """
    rows = (~proofs.certificate.is_secure).nonzero().squeeze(1)
    if not len(rows):
        return proofs
    radii = radii.expand(len(images))
    try:
        with torch.inference_mode(False):  # tensors made in inference mode have no gradients
            search = _Search(guard, images[rows].clone(), labels[rows].clone(), radii[rows].clone())
            tight = search.branch(branches) if branches else search.bounds()
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}. {_ADVICE}" if _ADVICE not in str(error) else str(error)) from error
    bounds = Bounds(*(whole.index_put((rows,), part) for whole, part in zip(proofs.bounds, tight, strict=True)))
    return prove(guard, proofs.representations, bounds, labels)


class _Search:
    """Bounds along the directions that a guard's head asks for.

    Args:
        guard: guard whose network has linear bounds.
        images: (B, C, H, W) in [0, 1].
        labels: class labels (B,).
        radii: radii (B,) in l∞.
    """

    def __init__(self, guard: ClusterGuard, images: Tensor, labels: Tensor, radii: Tensor) -> None:
        self._guard, self._images, self._labels, self._radii = guard, images, labels, radii
        ball = ball_in_service(guard, images, radii)
        self._intervals, self._lines = bound_representations(guard, ball), LinearBounds(guard, ball)
        self._known: list[tuple[Tensor, Tensor]] = []  # directions, and the lowest value along each

    def bounds(self) -> Bounds:
        """The head's bounds on distances."""
        return self._guard.head.bound_distances(_KnownBox(self._intervals, self._find), self._labels)

    def _find(self, directions: Tensor) -> Tensor:
        """The smallest ⟨direction, z⟩ over representations z that the guard computes: (B, S, m) -> (B, S)."""
        for known, lowest in self._known:
            if torch.equal(known, directions):
                return lowest
        by_intervals = self._intervals.lowest(directions) - self._intervals.slack(directions)
        self._known.append((directions, torch.maximum(by_intervals, self._lines.lowest(directions))))
        return self._known[-1][1]

    def branch(self, most: int) -> Bounds:
        """The head's bounds, better where branches prove an image that has no proof; at most so many for each image.

        Images that a short attack breaks are left out, because no proof of them exists. So are images that are not
        finite, which `detect` refuses. A head that does not ask for one direction for each class gets linear bounds.
        """
        bounds = self.bounds()
        if [lowest.shape[1] for _, lowest in self._known] != [self._guard.num_classes]:
            return bounds
        is_proved = is_excluded(self._guard, bounds, self._labels)
        is_tried = ~is_proved.all(dim=1) & self._images.flatten(1).isfinite().all(dim=1)
        for row in is_tried.nonzero().flatten().tolist():
            self._branch_image(row, (~is_proved[row]).nonzero().squeeze(1), most)
        return self.bounds()

    def _branch_image(self, row: int, classes: Tensor, most: int) -> None:
        """Rule out each of the classes, the hardest first, or leave the image without a proof."""
        (directions, lowest), rows = self._known[0], torch.full_like(classes, row)
        whole = self._lines.improve(self._lines.whole(rows), directions[row, classes])
        if self._is_broken(row, classes, self._lines.corners(whole, directions[row, classes])):
            return
        for position in whole.bounds.argsort().tolist():
            label = int(classes[position])
            proved, used = self._branch_class(row, label, whole[torch.tensor([position], device=rows.device)], most)
            if proved is None:
                return
            lowest[row, label], most = proved, most - used

    def _is_broken(self, row: int, classes: Tensor, corners: Tensor) -> bool:
        """Whether a short attack gets the image accepted under one of the classes, from these corners of its ball."""
        image, label = (part[row].expand(len(classes), *part[row].shape) for part in (self._images, self._labels))
        start = (image + self._radii[row] * corners).clamp(0, 1).to(image.dtype)
        attack = APGD(norm=LInf.name, eps=float(self._radii[row]), steps=_ATTACK_STEPS, start=lambda _: start)
        attacked = attack(self._guard, image, label, targets=classes)
        return bool(is_broken(Verdicts(self._guard.detect(attacked), label)).any())

    def _branch_class(self, row: int, label: int, left: Branches, most: int) -> tuple[Tensor | None, int]:
        """A lowest value that rules the class out, or None, and how many branches that took."""
        direction, used = self._known[0][0][row, label], 0
        lowest = torch.full_like(direction[0], torch.inf)
        while len(left.rows):
            order, count = left.bounds.argsort(), min(_AT_ONCE, (most - used) // 2)
            if not count:
                return None, used
            chosen, rest = left[order[:count]], left[order[count:]]
            can_split = chosen.choices >= 0
            parts = Branches.join([chosen[can_split].split(), chosen[~can_split]])
            used += len(parts.rows)
            along = direction.expand(len(parts.rows), -1)
            parts = self._lines.improve(parts, along, iterations=_ITERATIONS, rate=_LEARNING_RATE)
            is_done = self._rules_out(row, label, parts.bounds)
            lowest = torch.minimum(lowest, parts.bounds[is_done].amin()) if is_done.any() else lowest
            left = Branches.join([rest, parts[~is_done]])
        return lowest, used

    def _rules_out(self, row: int, label: int, values: Tensor) -> Tensor:
        """Whether the image could not be accepted under a class whose lowest value were each of these (R,)."""
        box, labels = self._intervals, self._labels[row].expand(len(values))
        lower, upper, error = (
            None if part is None else part[row].expand(len(values), -1) for part in (box.lower, box.upper, box.error)
        )
        lowest = self._known[0][1][row].repeat(len(values), 1)
        lowest[:, label] = values
        repeated = Interval(lower, upper, error=error, arithmetic=box.arithmetic)  # type: ignore[arg-type]
        bounds = self._guard.head.bound_distances(_KnownBox(repeated, lambda _: lowest), labels)
        return is_excluded(self._guard, bounds, labels)[:, label]


class _KnownBox:
    """The box of intervals, with a better bound along directions; see `RepresentationBox`."""

    def __init__(self, intervals: Interval, lowest: Callable[[Tensor], Tensor]) -> None:
        self._intervals, self.lowest, self.lowest_above = intervals, lowest, intervals.lowest_above

    @property
    def lower(self) -> Tensor:
        return self._intervals.lower

    @property
    def upper(self) -> Tensor:
        return self._intervals.upper

    @property
    def error(self) -> Tensor | None:
        return self._intervals.error

    @property
    def arithmetic(self) -> Arithmetic | None:
        return self._intervals.arithmetic

    def slack(self, directions: Tensor) -> Tensor:
        """Zeros (B, S), because `lowest` holds for what the guard computes."""
        return torch.zeros_like(directions[..., 0])
