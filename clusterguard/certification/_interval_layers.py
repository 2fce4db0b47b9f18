"""Interval bounds of linear layers, normalisation, pooling, and of operations that change shapes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from clusterguard.certification._boxes import Box, Linear
from clusterguard.certification._interval_arithmetic import (
    check_options,
    operand,
    ordered,
    result,
)
from clusterguard.detection import Arithmetic
from clusterguard.errors import ConfigurationError
from torch import Tensor
from torch.nn import functional


def affine(function: Callable[..., Tensor], box: Any, weight: Any, bias: Any = None, *args: Any, **kw: Any) -> Box:
    """A product with weights, plus a bias.

    The centre of the box goes through the layer itself, its radius through the layer with absolute weights.
    """
    if not isinstance(box, Box) or isinstance(weight, Box) or isinstance(bias, Box):
        raise ConfigurationError("no bounds are known for weights that depend on the image")
    check_options(args, kw)
    layer = partial(_call_layer, function, args, kw)
    error = above = rounding = size = None
    if box.arithmetic is not None:
        if {weight.dtype, box.dtype if bias is None else bias.dtype} != {box.dtype}:
            raise TypeError(f"weights of {weight.dtype} meet a tensor of {box.dtype}")
        weight, bias = weight.to(box.lower), None if bias is None else bias.to(box.lower)
    if box.lower is box.upper:
        point = layer(box.lower, weight, bias)
        return result(box, point, point, None)
    if box.error is not None and box.arithmetic is not None:
        error, above, rounding, size = _affine_error(layer, box, weight, bias, box.arithmetic)
    center = layer(box.center, weight, bias)
    is_point = box.arithmetic is not None and bool((box.lower == box.upper).all())
    radius = torch.zeros_like(center) if is_point else layer(box.radius, weight.abs(), None)
    source = None
    if function is functional.linear and box.lower.ndim == 2:
        frozen = (weight, bias) if torch.is_grad_enabled() else (weight.clone(), None if bias is None else bias.clone())
        source = Linear(box, *frozen, rounding)
    return replace(result(box, center - radius, center + radius, error, peak=size, source=source), error_above=above)


def _affine_error(
    layer: Callable[..., Tensor], box: Box, weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounds on the error of a layer's outputs, on that of outputs above 0, on rounding alone, and on partial sums.

    A sum, in any order, rounds once for each term that is not 0, and a term is 0 wherever a ReLU returned 0. All
    partial sums lie between the sum of the negative terms and the sum of the positive ones. Where the whole sum is
    above 0, the positive terms are the larger part. The sums below have no negative terms, so it is enough to compute
    them in the network's own arithmetic; the factor `room` makes up for their rounding.
    """
    error, dtype = torch.zeros_like(box.lower) if box.error is None else box.error, arithmetic.dtype
    up, down = (box.upper + error).clamp_min(0).to(dtype), (error - box.lower).clamp_min(0).to(dtype)
    carried = layer(error.to(dtype), weight.abs().to(dtype), None).double()
    terms = layer(((up > 0) | (down > 0)).to(dtype), (weight != 0).to(dtype), None).double() + 3

    def largest(sign: int) -> Tensor:
        shift = None if bias is None else (sign * bias).clamp_min(0).to(dtype)
        size = layer(up, (sign * weight).clamp_min(0).to(dtype), shift).double()
        if bool((box.lower >= 0).all()):  # then only an error can change the sign of a term
            return size + carried
        return size + layer(down, (-sign * weight).clamp_min(0).to(dtype), None).double()

    above, below = largest(1), largest(-1)
    gamma = terms * arithmetic.unit / (1 - terms * arithmetic.unit).clamp_min(0)
    room = 1 + (weight[0].numel() + 8) * 2.0**-22
    size, carried = room * torch.maximum(above, below), room * carried
    rounding = gamma * size + arithmetic.smallest
    full = carried + rounding
    return full, carried + gamma * (room * above + full) + arithmetic.smallest, rounding, size


def _call_layer(
    function: Callable[..., Tensor],
    args: Sequence[Any],
    options: dict[str, Any],
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return function(inputs, weight, bias, *args, **options)


def batch_norm(
    box: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Box:
    """Batch normalisation by running statistics, which multiplies each channel by a factor of either sign."""
    if any(isinstance(part, Box) for part in (running_mean, running_var, weight, bias)):
        raise ConfigurationError("no bounds are known for weights that depend on the image")
    if running_mean is None or running_var is None or training:
        raise ConfigurationError("no bounds are known for batch statistics; put batch normalisation into eval mode")
    mean, var, scale, shift = running_mean, running_var, weight, bias
    if box.arithmetic is not None:
        mean, var, scale, shift = (part if part is None else part.to(box.lower) for part in (mean, var, scale, shift))
    normalize = _differentiable_batch_norm if mean.requires_grad else functional.batch_norm
    lower = normalize(box.lower, mean, var, scale, shift, False, momentum, eps)
    if box.lower is box.upper:
        return result(box, lower, lower, None)
    ends = [lower, normalize(box.upper, mean, var, scale, shift, False, momentum, eps)]
    if box.error is None or box.arithmetic is None:
        return result(box, *ordered(*ends), None)
    # A backend may compute (x − mean) · factor + bias or x · factor + (bias − mean · factor); this bound covers both.
    factor = (var + eps).rsqrt() if scale is None else scale.abs() * (var + eps).rsqrt()
    along = (-1, *[1] * (box.lower.ndim - 2))
    factor, mean = factor.view(along), mean.abs().view(along)
    terms = factor * (box.magnitude + mean) + (0 if shift is None else shift.abs().view(along))
    error = factor * box.error + box.arithmetic.gamma(16) * terms + box.arithmetic.smallest
    return result(box, *ordered(*ends), error, peak=terms)


def _differentiable_batch_norm(
    values: Tensor, mean: Tensor, var: Tensor, scale: Tensor | None, shift: Tensor | None, _: Any, __: Any, eps: float
) -> Tensor:
    """Batch normalisation by given statistics, with gradients for these, which torch's own function does not have."""
    factor = (var + eps).rsqrt() if scale is None else scale * (var + eps).rsqrt()
    offset = -mean * factor if shift is None else shift - mean * factor
    factor, offset = (part.to(values.dtype).view(-1, *[1] * (values.ndim - 2)) for part in (factor, offset))
    return torch.addcmul(offset, values, factor)


def view(name: str, box: Box, *args: Any, **options: Any) -> Box:
    """The same numbers in another shape; as with tensors, both may share their memory."""
    check_options(args, options)
    lower = getattr(box.lower, name)(*args, **options)
    upper = lower if box.lower is box.upper else getattr(box.upper, name)(*args, **options)
    error = None if box.error is None else getattr(box.error, name)(*args, **options)
    return Box(lower, upper, error=error, arithmetic=box.arithmetic)


def clone(box: Box) -> Box:
    return Box(box.lower, box.upper, error=box.error, arithmetic=box.arithmetic, source=box.source)


def to(box: Box, *args: Any, **options: Any) -> Box:
    """The box on another device or in a wider data type; the network's arithmetic does not change."""
    like = torch.empty(0, dtype=box.dtype, device=box.device).to(*args, **options)
    is_wider = like.dtype.is_floating_point and torch.promote_types(like.dtype, box.dtype) == like.dtype
    if like.dtype != box.dtype and (box.arithmetic or not is_wider):
        raise TypeError(f"{like.dtype} is not the data type of the tensor, {box.dtype}")
    dtype = box.lower.dtype if box.arithmetic else like.dtype
    ends = (None if end is None else end.to(like.device, dtype) for end in (box.lower, box.upper, box.error))
    lower, upper, error = ends
    return Box(lower, upper, error=error, arithmetic=box.arithmetic)  # type: ignore[arg-type]


def largest(function: Callable[..., Any], box: Box, *args: Any, **options: Any) -> Box:
    """The maximum of each window, whose error is at most the largest error in the window."""
    check_options(args, options)
    error = None if box.error is None else function(box.error, *args, **options)
    return result(box, function(box.lower, *args, **options), function(box.upper, *args, **options), error)


def average(
    function: Callable[..., Tensor], axes: int, box: Box, *args: Any, divisor_override: int | None = None, **kw: Any
) -> Box:
    """A mean over windows of the last `axes` axes.

    With `axes` 0, the shape of the result tells how many numbers each mean is over.
    """
    if len(args) == 6:  # torch also takes divisor_override as a positional argument
        divisor_override, args = args[-1], args[:-1]
    check_options((*args, divisor_override), kw)
    if divisor_override is not None:
        if not divisor_override > 0:
            raise TypeError(f"divisor_override is {divisor_override}")
        kw["divisor_override"] = divisor_override
    lower, upper = function(box.lower, *args, **kw), function(box.upper, *args, **kw)
    if box.error is None or box.arithmetic is None:
        return result(box, lower, upper, None)
    count = math.prod(box.lower.shape[-axes:]) if axes else box.lower.numel() // max(1, lower.numel())
    gamma = box.arithmetic.gamma(count + 3)
    error = function(box.error + gamma * box.magnitude, *args, **kw) + box.arithmetic.smallest
    return result(box, lower, upper, error, peak=count * error / gamma)


def mean(box: Box, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Box:
    return average(torch.mean, 0, box, *(() if dim is None else (dim, keepdim)))


def join(function: Callable[..., Tensor], parts: Sequence[Any], dim: int = 0) -> Box:
    """Boxes and tensors concatenated or stacked."""
    first = next(part for part in parts if isinstance(part, Box))
    boxes = [part if isinstance(part, Box) else operand(first, part) for part in parts]
    lower, upper = (function([getattr(box, end) for box in boxes], dim) for end in ("lower", "upper"))
    errors = [box.error for box in boxes if box.error is not None]
    return result(first, lower, upper, function(errors, dim) if errors else None)


def pad(box: Box, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Box:
    """The box padded with a constant, which is rounded to the network's data type."""
    check_options([*pad, value], {})
    number = operand(box, value or 0.0)
    if mode != "constant" or not math.isfinite(float(number.lower)):
        raise TypeError(f"mode is {mode!r} and value is {value}")
    ends = ((box.lower, number.lower), (box.upper, number.upper))
    lower, upper = (functional.pad(inside, pad, value=float(border)) for inside, border in ends)
    if box.error is None or number.error is None:
        return result(box, lower, upper, None)
    border = float(number.error) if value else 0.0
    return result(box, lower, upper, functional.pad(box.error, pad, value=border))


def dropout(box: Box, p: float = 0.5, training: bool = True) -> Box:
    if training and p:
        raise ConfigurationError("no bounds are known for dropout in training; put the network into eval mode")
    return box
