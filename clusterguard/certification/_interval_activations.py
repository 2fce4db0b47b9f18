"""Interval bounds of activations: functions that rise, or that have a single minimum."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from clusterguard.certification._boxes import Box
from clusterguard.certification._interval_arithmetic import (
    check_options,
    ordered,
    result,
)
from clusterguard.errors import ConfigurationError
from torch import Tensor
from torch.nn import functional

_ULPS = 64  # error, in units of rounding, allowed for exponentials, error functions and functions built from them


def _rising(
    function: Callable[[Tensor], Tensor],
    box: Box,
    *,
    steepest: float = 1.0,
    scaled: float = 0.0,
    fixed: float = 0.0,
    leap: float = 0.0,
    bottom: float | None = None,
) -> Box:
    """A function that never decreases, or that decreases down to a single minimum at `bottom` and increases after it.

    Errors grow at most by the largest slope, `steepest`. The computed function itself may be off by `scaled` units of
    rounding times the argument's magnitude, plus `fixed` units of rounding. `leap` is the height by which the function
    drops where its formula changes.
    """
    lower, upper = function(box.lower), function(box.upper)
    if bottom is not None:
        lowest = torch.full_like(box.lower, bottom).clamp(box.lower, box.upper)
        lower, upper = function(lowest), torch.maximum(lower, upper)
    error = None
    if box.error is not None and box.arithmetic is not None:
        error = steepest * box.error
        if bottom is None:  # where the function is flat, the error vanishes
            flat = torch.minimum(error, function(box.upper + box.error) - function(box.lower - box.error))
            error = torch.where(error.isfinite(), flat, error)  # after an overflow the computed number may be NaN
        if scaled or fixed:
            error = error + box.arithmetic.unit * (scaled * box.magnitude + fixed) + 2 * leap + box.arithmetic.smallest
    return result(box, lower - leap, upper + leap, error) if leap else result(box, lower, upper, error)


def _check_factor(name: str, value: float, smallest: float) -> None:
    if not smallest <= value < 1e30:  # float32 has to represent the factor
        raise ConfigurationError(f"no bounds are known for {name} below {smallest:g} or of at least 1e30, got {value}")


def clamp(box: Box, min: float | None = None, max: float | None = None) -> Box:
    ends = [end for end in (min, max) if end is not None]
    check_options(ends, {})
    if not ends or any(math.isnan(end) for end in ends) or ends != sorted(ends):
        raise TypeError(f"limits {min} and {max} are out of order")
    rounded = [end for end in ends if torch.tensor(end, dtype=box.dtype).item() != end]  # such as 0.1 in float32
    size = sum(map(abs, rounded))
    return _rising(partial(torch.clamp, min=min, max=max), box, fixed=size)


def hardtanh(box: Box, min_val: float = -1.0, max_val: float = 1.0) -> Box:
    return clamp(box, min_val, max_val)


def softplus(box: Box, beta: float = 1.0, threshold: float = 20.0) -> Box:
    """Softplus; at the threshold it changes from a logarithm to its argument, which is slightly smaller."""
    _check_factor("softplus with a threshold", threshold, 20.0)
    _check_factor("softplus with beta", beta, 1e-6)
    function = partial(functional.softplus, beta=beta, threshold=threshold)
    leap = math.log1p(math.exp(-threshold)) / beta
    return _rising(function, box, scaled=_ULPS, fixed=_ULPS / beta, leap=leap)


def leaky_relu(box: Box, negative_slope: float = 0.01) -> Box:
    _check_factor("leaky_relu with negative_slope", negative_slope, 0.0)
    function = partial(functional.leaky_relu, negative_slope=negative_slope)
    return _rising(function, box, steepest=max(1.0, negative_slope), scaled=2 * negative_slope)


def elu(box: Box, alpha: float = 1.0) -> Box:
    _check_factor("elu with alpha", alpha, 0.0)
    function = partial(functional.elu, alpha=alpha)
    return _rising(function, box, steepest=max(1.0, alpha), fixed=_ULPS * alpha)


def celu(box: Box, alpha: float = 1.0) -> Box:
    _check_factor("celu with alpha", alpha, 1e-6)
    return _rising(partial(functional.celu, alpha=alpha), box, fixed=_ULPS * alpha)


def prelu(box: Any, weight: Any) -> Box:
    """Two straight lines that meet at 0, so that the extremes lie at 0 or at an end of the box.

    The slope below 0 may have either sign.
    """
    if not isinstance(box, Box) or isinstance(weight, Box):
        raise ConfigurationError("no bounds are known for weights that depend on the image")
    if weight.dtype != box.dtype:
        raise TypeError(f"weights of {weight.dtype} meet a tensor of {box.dtype}")
    slope = weight.to(box.lower)
    kink = torch.zeros_like(box.lower).clamp(box.lower, box.upper)
    lower, upper = ordered(*(torch.prelu(end, slope) for end in (box.lower, box.upper, kink)))
    if box.error is None or box.arithmetic is None:
        return result(box, lower, upper, None)
    size = slope.abs().view(-1, *[1] * max(0, box.lower.ndim - 2))
    rounding = box.arithmetic.unit * size * box.magnitude + box.arithmetic.smallest
    return result(box, lower, upper, size.clamp_min(1) * box.error + rounding)


def gelu(box: Box, *, approximate: str = "none") -> Box:
    bottoms = {"none": -0.7517915246935645, "tanh": -0.7524614220710161}
    if approximate not in bottoms:
        raise TypeError(f"approximate is {approximate!r}")
    function = partial(functional.gelu, approximate=approximate)
    return _rising(function, box, bottom=bottoms[approximate], steepest=1.13, scaled=_ULPS)


class _Followers(threading.local):
    """What follows each ReLU in this thread."""

    follow: "Callable[[Box], Box | None] | None" = None


_followers = _Followers()


@contextmanager
def followed_activations(follow: Callable[[Box], Box | None]) -> Iterator[None]:
    """Within the block, call a function with the box before each ReLU; a box that it returns replaces the ReLU's."""
    before, _followers.follow = _followers.follow, follow
    try:
        yield
    finally:
        _followers.follow = before


def relu(box: Box) -> Box:
    replaced = None if _followers.follow is None else _followers.follow(box)
    if replaced is not None:
        return replaced
    if box.error is not None and box.error_above is not None:
        box = replace(box, error=torch.minimum(box.error, box.error_above))
    return _rising(torch.relu, box)


sigmoid = partial(_rising, torch.sigmoid, steepest=0.25, fixed=_ULPS)
log_sigmoid = partial(_rising, functional.logsigmoid, scaled=_ULPS, fixed=_ULPS)
selu = partial(_rising, functional.selu, steepest=1.76, scaled=4, fixed=2 * _ULPS)
tanh = partial(_rising, torch.tanh, fixed=_ULPS)
silu = partial(_rising, functional.silu, bottom=-1.2784645427610738, steepest=1.1, scaled=_ULPS)
mish = partial(_rising, functional.mish, bottom=-1.1924312145154952, steepest=1.1, scaled=_ULPS)
hardswish = partial(_rising, functional.hardswish, bottom=-1.5, steepest=1.5, scaled=_ULPS)
hardsigmoid = partial(_rising, functional.hardsigmoid, steepest=0.17, fixed=_ULPS)
