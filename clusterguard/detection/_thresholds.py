"""Thresholds from the suspicion of benign images: the arithmetic of ranks and quantiles."""

import math
from fractions import Fraction
from numbers import Real
from typing import Literal

import torch
from clusterguard._support import check_tensor
from clusterguard.detection._calibration_batches import (
    check_finite,
)
from clusterguard.errors import ConfigurationError, TooFewCalibrationExamplesError
from torch import Tensor

Method = Literal["conformal", "quantile"]
Scarce = Literal["error", "pool"]


def minimum_examples(false_positive_rate: float) -> int:
    """The smallest number of examples from which a threshold for a `false_positive_rate` of α exists: ⌈1/α⌉ − 1.

    Example:
        >>> minimum_examples(0.01)
        99
    """
    check_calibration_options(false_positive_rate)
    return math.ceil(1 / _exact(false_positive_rate)) - 1


def allowed_refusals(count: int, false_positive_rate: float) -> int:
    """How many may be refused among n examples and one new image: ⌊(n + 1)α⌋, in exact arithmetic.

    Args:
        count: number n of examples, at least 0.
        false_positive_rate: rate α in (0, 1), read as the decimal number that it prints as.

    Example:
        >>> allowed_refusals(99, 0.07), int((99 + 1) * 0.07), allowed_refusals(99, 0.29), int((99 + 1) * 0.29)
        (7, 7, 29, 28)
    """
    return math.floor((count + 1) * _exact(false_positive_rate))


def fit_shared_threshold(suspicion: Tensor, false_positive_rate: float, *, method: Method = "conformal") -> float:
    """The threshold that a new benign example exceeds with a probability of at most `false_positive_rate`.

    Args:
        suspicion: (n,) suspicion of benign examples, where n is at least `minimum_examples(false_positive_rate)`.
        false_positive_rate: rate α in (0, 1).
        method: name of the rule. "conformal" takes the ⌈(n+1)(1−α)⌉-th smallest suspicion. Its bound holds at every n
            if the examples and the new one are exchangeable. "quantile" takes the plain (1−α)-quantile of the sample,
            as the paper does, which is a little too low on small samples.

    Returns:
        The threshold in units of the suspicion, without the slack for rounding that `fit_thresholds` adds.

    Raises:
        TooFewCalibrationExamplesError: n is too small.
        InputError: so many suspicions are not finite that the threshold would not be finite either.
        ConfigurationError: the rate is outside (0, 1), or the method is unknown.

    Reference:
        arXiv 2012.03483, section 3.2; Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World" (2005).

    Example:
        >>> fit_shared_threshold(torch.arange(1.0, 100.0), false_positive_rate=0.1)
        90.0
    """
    check_calibration_options(false_positive_rate, method)
    check_tensor(suspicion, "suspicion", "n")
    count, needed = len(suspicion), minimum_examples(false_positive_rate)
    if count < needed:
        raise TooFewCalibrationExamplesError(
            f"expected at least {needed} examples for a false-positive rate of {false_positive_rate}, got {count}"
        )
    threshold = _threshold_of(refused_last(suspicion).sort().values, false_positive_rate, method)
    check_finite(threshold)
    return float(threshold)


def _exact(rate: float) -> Fraction:
    """The rate as the decimal number that the user wrote, because 1/0.01 must be exactly 100."""
    return Fraction(str(rate))


def check_calibration_options(false_positive_rate: object, method: str = "conformal", scarce: str = "error") -> None:
    if not isinstance(false_positive_rate, Real) or not 0 < float(false_positive_rate) < 1:
        raise ConfigurationError(f"expected a false-positive rate in (0, 1), such as 0.01, got {false_positive_rate!r}")
    if method not in ("conformal", "quantile"):
        raise ConfigurationError(f"expected method 'conformal' or 'quantile', got {method!r}")
    if scarce not in ("error", "pool"):
        raise ConfigurationError(f"expected scarce 'error' or 'pool', got {scarce!r}")


def refused_last(suspicion: Tensor) -> Tensor:
    """Suspicion (n,) in float64, +inf where it is not finite, because such images are refused at every threshold."""
    return suspicion.double().masked_fill(~suspicion.isfinite(), math.inf)


def _positions(counts: Tensor, false_positive_rate: float, method: str) -> tuple[Tensor, Tensor]:
    """Where each class's threshold (K,) lies among its sorted examples: an index, and a fraction towards the next."""
    alpha = _exact(false_positive_rate)
    sizes, index = counts.unique(return_inverse=True)
    exact = [
        Fraction(size - allowed_refusals(size, false_positive_rate))
        if method == "conformal"
        else (size - 1) * (1 - alpha)
        for size in sizes.tolist()
    ]
    whole = torch.tensor([math.floor(position) for position in exact], device=counts.device)
    fractions = torch.tensor([float(position % 1) for position in exact], dtype=torch.float64, device=counts.device)
    return whole[index], fractions[index]


def _read(ordered: Tensor, positions: Tensor, fractions: Tensor) -> Tensor:
    """The values at these positions, interpolated towards the next ones by the fractions."""
    between = fractions > 0
    return torch.where(
        between, torch.lerp(ordered[positions], ordered[positions + between], fractions), ordered[positions]
    )


def _threshold_of(ordered: Tensor, false_positive_rate: float, method: str) -> Tensor:
    count = torch.tensor([len(ordered)], device=ordered.device)
    return _read(ordered, *_positions(count, false_positive_rate, method)).squeeze()


def class_thresholds(
    ordered: Tensor, classes: Tensor, counts: Tensor, false_positive_rate: float, method: str, scarce: str
) -> Tensor:
    """Thresholds (K,) from suspicion (n,), sorted within each class, and its classes; see `fit_thresholds`.

    The bounds come from counting refusals among the calibration images and the new one, which are treated alike. So the
    threshold of each class is chosen as if the new image belonged to that class.
    """
    needed, is_scarce = minimum_examples(false_positive_rate), counts < minimum_examples(false_positive_rate)
    positions, fractions = _positions(counts, false_positive_rate, method)
    last = counts.cumsum(0) - 1
    first = last + 1 - counts
    # These classes would be scarce without one image, and any image may be the new one.
    in_pool = (counts <= needed) & (scarce == "pool")
    pool, thresholds = ordered[in_pool[classes]].sort().values, ordered.new_empty(len(counts))
    pays = joins = lends = torch.zeros_like(in_pool)
    if method == "conformal" and in_pool.any():
        allowed = counts - positions
        used = 1 + allowed[~in_pool].sum() + allowed * in_pool
        lacks_room = (used > allowed_refusals(len(ordered), false_positive_rate)) & (counts + 1 >= counts.max())
        rest = len(pool) - counts * in_pool
        gives = lacks_room & (rest > 0) & (rest <= needed)
        pays, joins = gives & (allowed >= 2), gives & (allowed < 2)
        lends = lacks_room & ~in_pool & (counts - 1 - _positions(counts - 1, false_positive_rate, method)[0] < 2)
    thresholds[~is_scarce] = _read(ordered, (first + positions + pays)[~is_scarce], fractions[~is_scarce])
    thresholds[joins & ~is_scarce] = torch.maximum(thresholds[joins & ~is_scarce], pool[-1:])
    if is_scarce.any() and len(pool) >= needed:
        thresholds[is_scarce] = _threshold_of(pool, false_positive_rate, method)
    elif is_scarce.any():
        everybody = _threshold_of(ordered.sort().values, false_positive_rate, method)
        thresholds[is_scarce] = torch.cat([everybody[None], pool, ordered[last[lends]]]).amax()
    return thresholds


def round_up_to_float32(values: Tensor) -> Tensor:
    """Round up, because thresholds are compared in float32 and must not fall below the example that they rest on."""
    rounded = values.float()
    up = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.double() < values, up, rounded).double()
