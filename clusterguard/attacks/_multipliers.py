"""How far each coordinate moves in a projection onto an l2 or l1 ball cut by the box.

A projection onto an l2 or l1 ball cut by the box needs one multiplier for each image. A coordinate moves by y towards a
candidate at distance d = r + e, where r is its reach within the box and y is at most r. There are two algorithms for
the multiplier. For large images on a CPU it is searched for iteratively, in about ten evaluations, and `torch.compile`
takes the search into its graph. To stop a search, its values must be known, and on other devices this would mean to
wait for the device. There, and for small images, where it is faster, the multipliers at which coordinates reach their
limits are sorted. Both algorithms are exact up to rounding, and images of a batch do not affect each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from clusterguard._support import is_traced
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional

_SEARCHED_FROM = 256  # number of coordinates from which the search is faster than sorting
_MOST_LOOKS = 300  # float64 candidates 1e14 away take 100 looks, as coordinates reach their limits one by one


class _End(NamedTuple):
    """One end of the interval in which a search begins, as its level (B, 1) and the size (B, 1) of y there."""

    level: Tensor
    size: Tensor


def l2_lengths(reach: Tensor, beyond: Tensor, radius: Tensor) -> Tensor:
    """Solve y = min(s·d, r) for the s in [0, 1] that gives y the Euclidean length `radius`.

    Args:
        reach: reach r within the box, (B, n), at least 0.
        beyond: distance e of the candidate beyond the box, (B, n), at least 0.
        radius: length that y must have, (B, 1), at least 0.

    Returns:
        The vector y, (B, n), which can exceed the radius only by rounding. Where r is shorter than the radius, there is
        no solution, and the result is arbitrary.

    Example:
        >>> l2_lengths(torch.tensor([[0.5, 0.1]]), torch.tensor([[3.5, 3.9]]), torch.tensor([[0.5]]))
        tensor([[0.4899, 0.1000]])
    """
    return (_search_l2 if _is_searched(reach) else _sort_l2)(reach, reach + beyond, radius)


def l1_lengths(reach: Tensor, beyond: Tensor, radius: Tensor) -> Tensor:
    """Solve y = clamp(d - λ, 0, r) for the λ >= 0 that gives y the sum `radius`; the arguments are as in `l2_lengths`.

    Example:
        >>> l1_lengths(torch.tensor([[0.1, 0.4, 0.1]]), torch.tensor([[0.9, 0.0, 0.0]]), torch.tensor([[0.3]]))
        tensor([[0.1000, 0.2000, 0.0000]])
    """
    beyond = torch.where(reach > 0, beyond, 0)
    # Far from the image, d is rounded coarsely. Where λ is near the largest e, distances are counted from that e.
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
    memory = None if is_traced() else torch.empty_like(distance)

    def stretched(s: Tensor) -> Tensor:
        return torch.minimum(torch.mul(distance, s, out=memory), reach, out=memory)

    def length(s: Tensor) -> Tensor:
        return _sum(stretched(s).square_()).sqrt_()

    over = _End(torch.ones_like(radius), _sum(reach.square()).sqrt_())
    under = _End(torch.zeros_like(radius), torch.zeros_like(radius))
    return stretched(_search(length, radius, over, under)[0])


def _search_l1(reach: Tensor, distance: Tensor, radius: Tensor, over: _End, under: _End) -> Tensor:
    memory = None if is_traced() else torch.empty_like(distance)

    def grown(level: Tensor) -> Tensor:
        return _clamped(torch.sub(distance, level, out=memory), reach)

    # The larger λ, the fewer coordinates grow, so the root of the sum is closer to a line in λ than the sum itself.
    def root(level: Tensor) -> Tensor:
        return _sum(grown(level)).sqrt_()

    low, high = _search(root, radius.sqrt(), *(_End(end.level, end.size.sqrt()) for end in (over, under)))
    if not is_traced() and torch.equal(low, high):
        return grown(low)
    # Neighbouring λ can lie far apart by rounding, and the sum is a line between them.
    excess, lack = ((_sum(grown(level)) - radius).abs() for level in (low, high))
    return grown(low).clone().lerp_(grown(high), _share(excess, lack))


def _sum(lengths: Tensor) -> Tensor:
    """The sum of each row, (B, n) -> (B, 1)."""
    return lengths.sum(dim=1, keepdim=True)


def _clamped(lengths: Tensor, reach: Tensor) -> Tensor:
    """Clamp lengths to [0, reach] in place, because allocating memory costs more than any operator here."""
    return lengths.clamp_(lengths.new_zeros(()), reach)


def _share(excess: Tensor, lack: Tensor) -> Tensor:
    """The position, in [0, 1], of a line's zero between an end with this excess and an end with this lack."""
    return excess / (excess + lack).clamp_min(torch.finfo(excess.dtype).tiny)


def _search(measure: Callable[[Tensor], Tensor], wanted: Tensor, over: _End, under: _End) -> tuple[Tensor, Tensor]:
    """Two adjacent levels (B, 1) with the solution between them, or the exact solution twice.

    The algorithm is false position with the Illinois correction, by which an end that stays counts half. A row stays as
    it is when it has the wanted value or its ends are neighbouring numbers, while other rows of the batch go on.
    """
    tolerance = 2 * torch.finfo(wanted.dtype).eps * wanted

    def look(looks: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        over, under, excess, lack, was_over, _ = state
        level = over.lerp(under, _share(excess, lack))
        gap = measure(level) - wanted
        is_over, is_done = gap > 0, ~(gap.abs() > tolerance)  # NaN counts as done
        excess = torch.where(is_over, gap, torch.where(was_over, excess, excess / 2))
        lack = torch.where(is_over, torch.where(was_over, lack / 2, lack), -gap)
        over, under = torch.where(is_over | is_done, level, over), torch.where(is_over & ~is_done, under, level)
        is_settled = is_done | (torch.nextafter(over, under) == under)
        return looks + 1, over, under, excess, lack, is_over, is_settled

    def goes_on(looks: Tensor, *state: Tensor) -> Tensor:
        return (looks < _MOST_LOOKS) & ~state[-1].all()

    excess, lack = (over.size - wanted).clamp_min(0), (wanted - under.size).clamp_min(0)
    nowhere = torch.zeros_like(wanted, dtype=torch.bool)
    state: tuple[Tensor, ...]
    state = torch.zeros((), dtype=torch.int64), over.level, under.level, excess, lack, nowhere, nowhere.clone()
    if is_traced():  # keeps the loop in the graph; two looks a round, as the check costs much
        state = while_loop(goes_on, lambda *state: look(*look(*state)), state)
    else:
        while goes_on(*state):
            state = look(*state)
    return state[1], state[2]


def _sort_l2(reach: Tensor, distance: Tensor, radius: Tensor) -> Tensor:
    # Coordinates hit the box in the order of r / d. Between two hits, ‖y‖² = Σ_hit r² + s² Σ_free d² is solved for s.
    hits, order = torch.where(reach > 0, reach / distance, 0).sort(dim=1)
    hit = functional.pad(reach.gather(1, order).square().cumsum(dim=1), (1, -1))
    free = distance.gather(1, order).square().flip(1).cumsum(dim=1).flip(1)
    passed = ((hit + hits.square() * free) <= radius.square()).sum(dim=1, keepdim=True)
    passed = passed.clamp_max(distance.shape[1] - 1)
    s = ((radius.square() - hit.gather(1, passed)).clamp_min(0) / free.gather(1, passed)).sqrt()
    return torch.minimum(s * distance, reach)


def _sort_l1(reach: Tensor, beyond: Tensor, radius: Tensor) -> Tensor:
    # As λ falls, a y starts to grow at d and stops at e. Between two of these knots, Σy rises by the fall of λ times
    # the number of y that grow.
    d = beyond + reach
    knots, order = torch.cat([d, beyond], dim=1).sort(dim=1, descending=True, stable=True)
    growing = torch.where(order < d.shape[1], 1, -1).cumsum(dim=1)
    rise = functional.pad(growing[:, :-1] * -knots.diff(dim=1), (1, 0))
    rounding = functional.pad(reach - (d - beyond), (d.shape[1], 0)).gather(1, order)  # a y grows by r in total
    total = (rise + rounding).cumsum(dim=1)
    last = (total[:, 1:] <= radius).sum(dim=1, keepdim=True)
    below = (radius - total.gather(1, last)) / growing.gather(1, last).clamp_min(1)
    return _clamped(d - knots.gather(1, last) + below, reach)
