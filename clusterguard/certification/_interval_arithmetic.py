"""Interval bounds of sums, products and quotients, with the rounding errors of each operation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from clusterguard.certification._boxes import Box, Linear
from clusterguard.errors import ConfigurationError
from torch import Tensor

IntervalRule = Callable[..., "Box"]


def result(
    box: Box,
    lower: Tensor,
    upper: Tensor,
    error: Tensor | None,
    *,
    peak: Tensor | None = None,
    source: Linear | None = None,
) -> Box:
    """The box that a rule returns, with an infinite error wherever a number may overflow.

    `peak` holds the largest magnitudes of intermediate results, if they exceed those of the result.
    """
    if not (isinstance(lower, Tensor) and lower.is_floating_point()):
        raise ConfigurationError("no bounds are known for a tensor that is not floating-point")
    if box.arithmetic is None or error is None:
        return Box(lower, upper, arithmetic=box.arithmetic, source=source)
    if torch.is_autocast_enabled(lower.device.type):
        raise ConfigurationError("no bounds are known under autocast; run the guard in float32, and outside autocast")
    size = torch.maximum(lower.abs(), upper.abs()) + error
    is_in_range = (size if peak is None else torch.maximum(size, peak)) < box.arithmetic.largest
    error = torch.where(is_in_range, error, torch.inf)
    return Box(lower, upper, error=error, arithmetic=box.arithmetic, source=source)


def operand(box: Box, other: Any) -> Box:
    """A constant as a box of width 0, with the error of its conversion to the network's data type."""
    if not isinstance(other, Tensor | int | float) or (isinstance(other, Tensor) and other.is_complex()):
        raise TypeError(f"{type(other).__name__} is neither a real tensor nor a number")
    is_wide = isinstance(other, Tensor) and other.is_floating_point() and box.arithmetic is None
    device = None if isinstance(other, Tensor) else box.device
    value = torch.as_tensor(other, dtype=None if is_wide else box.lower.dtype, device=device)
    if box.arithmetic is None:
        return Box(value, value)
    arithmetic = box.arithmetic
    if torch.result_type(torch.empty((1,) * box.lower.ndim, dtype=box.dtype), other) != box.dtype:
        raise TypeError(f"the data type of the other operand is not that of the tensor, {box.dtype}")
    if isinstance(other, Tensor) and other.dtype == arithmetic.dtype:
        return Box(value, value, error=torch.zeros_like(value), arithmetic=arithmetic)
    return result(box, value, value, arithmetic.unit * value.abs() + arithmetic.smallest)


def ordered(*ends: Tensor) -> tuple[Tensor, Tensor]:
    """The elementwise minimum and maximum of several tensors."""
    if len(ends) == 2:
        return torch.minimum(*ends), torch.maximum(*ends)
    stacked = torch.stack(torch.broadcast_tensors(*ends))
    return stacked.amin(dim=0), stacked.amax(dim=0)


def _pair(first: Any, second: Any) -> tuple[Box, Box]:
    """Both operands as boxes; at least one of them is a box already."""
    if isinstance(first, Box):
        return first, second if isinstance(second, Box) else operand(first, second)
    return operand(second, first), second


def negate(box: Box) -> Box:
    """The box of all numbers with their signs reversed."""
    return result(box, -box.upper, -box.lower, box.error)


def add(first: Any, second: Any) -> Box:
    """The sum of two boxes, or of a box and a number or tensor."""
    one, other = _pair(first, second)
    lower, upper = one.lower + other.lower, one.upper + other.upper
    if one.error is None or other.error is None or one.arithmetic is None:
        return result(one, lower, upper, None)
    rounding = one.arithmetic.unit * (one.magnitude + other.magnitude) + one.arithmetic.smallest
    return result(one, lower, upper, one.error + other.error + rounding)


def subtract(first: Any, second: Any) -> Box:
    """The difference of two boxes, or of a box and a number or tensor."""
    one, other = _pair(first, second)
    return add(one, negate(other))


def multiply(first: Any, second: Any) -> Box:
    """The product of two boxes, or of a box and a number or tensor."""
    one, other = _pair(first, second)
    ends = [end * factor for end in (one.lower, one.upper) for factor in (other.lower, other.upper)]
    if not (isinstance(first, Box) and isinstance(second, Box)):
        ends = [ends[0], ends[3]]
    lower, upper = ordered(*ends)
    if one.error is None or other.error is None or one.arithmetic is None:
        return result(one, lower, upper, None)
    error = one.magnitude * other.error + other.magnitude * one.error
    rounding = one.arithmetic.unit * one.magnitude * other.magnitude + one.arithmetic.smallest
    return result(one, lower, upper, error + rounding)


def divide(box: Box, divisor: Any) -> Box:
    """A box divided by a number, or by a tensor without a 0."""
    if isinstance(divisor, Box):
        raise TypeError("the divisor depends on the image")
    other = operand(box, divisor)
    smallest = box.arithmetic.smallest if box.arithmetic else 0.0
    if not bool((other.lower.abs() > smallest).all()):
        raise TypeError("the divisor is 0 somewhere")
    lower, upper = ordered(box.lower / other.lower, box.upper / other.lower)
    if box.error is None or other.error is None or box.arithmetic is None:
        return result(box, lower, upper, None)
    error = box.error + box.arithmetic.gamma(4) * box.magnitude  # divisor, its inverse and the product round
    return result(box, lower, upper, error / other.lower.abs() + box.arithmetic.smallest)


def check_options(args: Iterable[Any], options: dict[str, Any]) -> None:
    """Refuse options such as an output tensor, a dtype or an interval; numbers, strings and lists of them are fine."""
    for option in (*args, *options.values()):
        for value in option if isinstance(option, list | tuple) else [option]:
            if not isinstance(value, (int, float, str, torch.memory_format, type(None))):
                raise TypeError(f"{type(value).__name__} is not a number")
