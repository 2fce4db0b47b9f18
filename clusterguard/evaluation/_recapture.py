"""How many images could be broken, estimated from two independent runs of one attack."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from clusterguard._support import check_tensor
from clusterguard.detection import Verdicts, is_broken
from clusterguard.evaluation._results import AttackResult
from torch import Tensor

_Z = 1.96  # of a normal distribution, for 95 %


class Breakable(NamedTuple):
    """An estimate of how many images an attack could break in the end, rather too low.

    Attributes:
        either: number of images that at least one of two runs broke.
        both: number of images that both runs broke.
        total: estimated number of images that further runs would break, those of `either` included.
        interval: approximate 95 % interval of `total`, which supposes that all breakable images are equally hard.
    """

    either: int
    both: int
    total: float
    interval: tuple[float, float]


def estimate_breakable(first: Tensor, second: Tensor) -> Breakable:
    """Estimate from two runs with different seeds how many images an attack could break.

    This is capture–recapture: if the second run broke few of the images that the first one broke, both miss many. The
    estimate is exact on average if every breakable image is as likely to be broken as any other, and the runs are
    independent. In truth some images are harder than others, so the estimate is too low, sometimes by a tenth or more,
    and its interval may lie below the truth. Read it as "at least about so many". An image that no run can break is not
    part of it.

    Args:
        first: (B,) boolean, whether the first run broke each image.
        second: (B,) boolean, the same for the second run.

    Returns:
        The estimate, at most B and at least the number of images that either run broke.

    Raises:
        InputError: the masks are not boolean or not of one length.

    Reference:
        Chapman, "Some properties of the hypergeometric distribution with applications to zoological sample censuses"
        (1951).

    Example:
        >>> import torch
        >>> first, second = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
        >>> first[:20] = second[4:24] = True  # 16 of 20 images again
        >>> estimate_breakable(first, second).either, round(estimate_breakable(first, second).total, 1)
        (24, 24.9)
    """
    check_tensor(first, "first", "B", kind="bool")
    check_tensor(second, "second", len(first), kind="bool", like=first)
    one, two, both = int(first.sum()), int(second.sum()), int((first & second).sum())
    either, count = one + two - both, len(first)
    total = (one + 1) * (two + 1) / (both + 1) - 1
    variance = (one + 1) * (two + 1) * (one - both) * (two - both) / ((both + 1) ** 2 * (both + 2))
    low, middle, high = (total + sign * _Z * math.sqrt(variance) for sign in (-1, 0, 1))
    return Breakable(
        either, both, min(max(middle, either), count), (min(max(low, either), count), min(max(high, either), count))
    )


def repeats_that_differ(results: Sequence[AttackResult], labels: Tensor) -> Iterator[str]:
    """What follows from runs of one attack that broke different images, in a sentence for each pair of runs.

    Args:
        results: results of the evaluated attacks.
        labels: (n,) true labels of the evaluated images.
    """
    for one, two in combinations(results, 2):
        if one.attack == two.attack:
            first, second = (is_broken(Verdicts(result.verdict, labels)) for result in (one, two))
            estimate = estimate_breakable(first, second)
            if estimate.total >= estimate.either + 0.5:
                low, high = estimate.interval
                yield (
                    f"{one.name} and {two.name} are the same attack, and broke {int(first.sum())} and "
                    f"{int(second.sum())} images, {estimate.both} of them both: at least about {estimate.total:.0f} "
                    f"[{low:.0f}, {high:.0f}] can be broken, so take a larger budget"
                )
