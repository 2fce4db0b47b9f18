"""How far each coordinate moves in a projection onto an l2 or l1 ball cut by the box: one multiplier an image.

A coordinate moves by y, at most its reach r within the box, towards a candidate at the distance d = r + e. On a CPU the
multiplier of large images is searched for, in some ten looks, which `torch.compile` takes into its graph. To stop a
search one looks at values, for which one would have to wait on other devices; so there, and for small images, where it
is faster, the multipliers at which coordinates come to their limits are sorted. Both ways are exact to rounding, and no
image sees the others of its batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional

_SEARCHED_FROM = 256  # coordinates an image
_MOST_LOOKS = 300  # a hundred for float64 candidates 1e14 away, where coordinates come to their limits one by one


class _End(NamedTuple):
    """Where a search begins: a level (B, 1), and the size (B, 1) of y there."""

    level: Tensor
    size: Tensor


def l2_lengths(reach: Tensor, beyond: Tensor, radius: Tensor) -> Tensor:
    """Solve y = min(s·d, r) for the s in [0, 1] that gives y the Euclidean length `radius`.

    Args:
        reach: (B, n), r, at least 0.
        beyond: (B, n), e, at least 0.
        radius: (B, 1), at least 0.

    Returns:
        (B, n), y, longer than the radius by rounding at most. Where r is shorter there is no such y, and this is any.

    Example:
        >>> l2_lengths(torch.tensor([[0.5, 0.1]]), torch.tensor([[3.5, 3.9]]), torch.tensor([[0.5]]))
        tensor([[0.4899, 0.1000]])
    """
    return (_search_l2 if _is_searched(reach) else _sort_l2)(reach, reach + beyond, radius)


def l1_lengths(reach: Tensor, beyond: Tensor, radius: Tensor) -> Tensor:
    """Solve y = clamp(d - λ, 0, r) for the λ >= 0 that gives y the sum `radius`; arguments as of `l2_lengths`.

    Example:
        >>> l1_lengths(torch.tensor([[0.1, 0.4, 0.1]]), torch.tensor([[0.9, 0.0, 0.0]]), torch.tensor([[0.3]]))
        tensor([[0.1000, 0.2000, 0.0000]])
    """
    beyond = torch.where(reach > 0, beyond, 0)
    # Far from the image d is coarse. Where λ is near the farthest e, count distances from there instead.
    top = beyond.amax(dim=1, keepdim=True)
    below_top = (top - 2).clamp_min(0)
    there = _sum(_clamped((beyond - below_top).add_(reach), reach))
    is_near_top = there > radius
    origin = torch.where(is_near_top, top, 0)
    if not _is_searched(reach):
        return _sort_l1(reach, beyond - origin, radius)
    highest = reach.amax(dim=1, keepdim=True)
    over = _End(torch.where(is_near_top, below_top - origin, 0), torch.where(is_near_top, there, _sum(reach)))
    under = _End(torch.where(is_near_top, highest, below_top), torch.where(is_near_top, 0, there))
    return _search_l1(reach, (beyond - origin).add_(reach), radius, over, under)


def _is_searched(reach: Tensor) -> bool:
    return reach.device.type == "cpu" and reach.shape[1] >= _SEARCHED_FROM


def _search_l2(reach: Tensor, distance: Tensor, radius: Tensor) -> Tensor:
    memory = None if torch.compiler.is_compiling() else torch.empty_like(distance)

    def stretched(s: Tensor) -> Tensor:
        return torch.minimum(torch.mul(distance, s, out=memory), reach, out=memory)

    def length(s: Tensor) -> Tensor:
        return _sum(stretched(s).square_()).sqrt_()

    over = _End(torch.ones_like(radius), _sum(reach.square()).sqrt_())
    under = _End(torch.zeros_like(radius), torch.zeros_like(radius))
    return stretched(_search(length, radius, over, under)[0])


def _search_l1(reach: Tensor, distance: Tensor, radius: Tensor, over: _End, under: _End) -> Tensor:
    memory = None if torch.compiler.is_compiling() else torch.empty_like(distance)

    def grown(level: Tensor) -> Tensor:
        return _clamped(torch.sub(distance, level, out=memory), reach)

    # Towards the farthest coordinates ever fewer grow: the root of the sum is closer to a line in λ than the sum is.
    def root(level: Tensor) -> Tensor:
        return _sum(grown(level)).sqrt_()

    low, high = _search(root, radius.sqrt(), *(_End(end.level, end.size.sqrt()) for end in (over, under)))
    if not torch.compiler.is_compiling() and torch.equal(low, high):
        return grown(low)
    # Between neighbouring λ, where they are coarse, the sum is a line.
    excess, lack = ((_sum(grown(level)) - radius).abs() for level in (low, high))
    return grown(low).clone().lerp_(grown(high), _share(excess, lack))


def _sum(lengths: Tensor) -> Tensor:
    """(B, n) -> (B, 1)."""
    return lengths.sum(dim=1, keepdim=True)


def _clamped(lengths: Tensor, reach: Tensor) -> Tensor:
    """In place: memory that is new to the process costs more than any operator here."""
    return lengths.clamp_(lengths.new_zeros(()), reach)


def _share(excess: Tensor, lack: Tensor) -> Tensor:
    """The way from an end with this excess to one with this lack, in [0, 1], after which a line has neither."""
    return excess / (excess + lack).clamp_min(torch.finfo(excess.dtype).tiny)


def _search(measure: Callable[[Tensor], Tensor], wanted: Tensor, over: _End, under: _End) -> tuple[Tensor, Tensor]:
    """Neighbouring levels (B, 1) between which a monotone measure is as wanted; the same level twice where it is met.

    False position with the Illinois correction: an end that stays counts half. What is met or has neighbouring ends
    stays as it is while others of the batch go on.
    """
    tolerance = 2 * torch.finfo(wanted.dtype).eps * wanted

    def look(looks: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
        over, under, excess, lack, was_over, _ = found
        level = over.lerp(under, _share(excess, lack))
        gap = measure(level) - wanted
        is_over, is_done = gap > 0, ~(gap.abs() > tolerance)  # done, too, where it is NaN
        excess = torch.where(is_over, gap, torch.where(was_over, excess, excess / 2))
        lack = torch.where(is_over, torch.where(was_over, lack / 2, lack), -gap)
        over, under = torch.where(is_over | is_done, level, over), torch.where(is_over & ~is_done, under, level)
        is_settled = is_done | (torch.nextafter(over, under) == under)
        return looks + 1, over, under, excess, lack, is_over, is_settled

    def goes_on(looks: Tensor, *found: Tensor) -> Tensor:
        return (looks < _MOST_LOOKS) & ~found[-1].all()

    excess, lack = (over.size - wanted).clamp_min(0), (wanted - under.size).clamp_min(0)
    nowhere = torch.zeros_like(wanted, dtype=torch.bool)
    found: tuple[Tensor, ...]
    found = torch.zeros((), dtype=torch.int64), over.level, under.level, excess, lack, nowhere, nowhere.clone()
    if torch.compiler.is_compiling():  # a loop inside the graph; leaving it to ask costs a good part of a look
        found = while_loop(goes_on, lambda *found: look(*look(*found)), found)
    else:
        while goes_on(*found):
            found = look(*found)
    return found[1], found[2]


def _sort_l2(reach: Tensor, distance: Tensor, radius: Tensor) -> Tensor:
    # Coordinates hit the box in the order of r / d. Between two hits ‖y‖² = Σ_hit r² + s² Σ_free d²: solve that for s.
    hits, order = torch.where(reach > 0, reach / distance, 0).sort(dim=1)
    hit = functional.pad(reach.gather(1, order).square().cumsum(dim=1), (1, -1))
    free = distance.gather(1, order).square().flip(1).cumsum(dim=1).flip(1)
    passed = ((hit + hits.square() * free) <= radius.square()).sum(dim=1, keepdim=True)
    passed = passed.clamp_max(distance.shape[1] - 1)
    s = ((radius.square() - hit.gather(1, passed)).clamp_min(0) / free.gather(1, passed)).sqrt()
    return torch.minimum(s * distance, reach)


def _sort_l1(reach: Tensor, beyond: Tensor, radius: Tensor) -> Tensor:
    # As λ falls, y starts to grow at d and stops at e; between two such knots Σy rises by (fall of λ)·(growing y).
    d = beyond + reach
    knots, order = torch.cat([d, beyond], dim=1).sort(dim=1, descending=True, stable=True)
    growing = torch.where(order < d.shape[1], 1, -1).cumsum(dim=1)
    rise = functional.pad(growing[:, :-1] * -knots.diff(dim=1), (1, 0))
    rounding = functional.pad(reach - (d - beyond), (d.shape[1], 0)).gather(1, order)  # y grows by r in all
    total = (rise + rounding).cumsum(dim=1)
    last = (total[:, 1:] <= radius).sum(dim=1, keepdim=True)
    below = (radius - total.gather(1, last)) / growing.gather(1, last).clamp_min(1)
    return _clamped(d - knots.gather(1, last) + below, reach)
