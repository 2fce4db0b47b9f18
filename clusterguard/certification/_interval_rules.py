"""The rules of interval bounds: each maps a box through one operation and adds the operation's rounding errors."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from clusterguard.certification._boxes import Box, Linear
from clusterguard.detection import Arithmetic
from clusterguard.errors import ConfigurationError
from torch import Tensor
from torch.nn import functional

IntervalRule = Callable[..., "Box"]


def _result(
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
        return Box(lower, upper, source=source)
    if torch.is_autocast_enabled(lower.device.type):
        raise ConfigurationError("no bounds are known under autocast; run the guard in float32, and outside autocast")
    size = torch.maximum(lower.abs(), upper.abs()) + error
    is_in_range = (size if peak is None else torch.maximum(size, peak)) < box.arithmetic.largest
    error = torch.where(is_in_range, error, torch.inf)
    return Box(lower, upper, error=error, arithmetic=box.arithmetic, source=source)


def _operand(box: Box, other: Any) -> Box:
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
    return _result(box, value, value, arithmetic.unit * value.abs() + arithmetic.smallest)


def _ordered(*ends: Tensor) -> tuple[Tensor, Tensor]:
    """The elementwise minimum and maximum of several tensors."""
    if len(ends) == 2:
        return torch.minimum(*ends), torch.maximum(*ends)
    stacked = torch.stack(torch.broadcast_tensors(*ends))
    return stacked.amin(dim=0), stacked.amax(dim=0)


def _pair(first: Any, second: Any) -> tuple[Box, Box]:
    """Both operands as boxes; at least one of them is a box already."""
    if isinstance(first, Box):
        return first, second if isinstance(second, Box) else _operand(first, second)
    return _operand(second, first), second


def negate(box: Box) -> Box:
    """The box of all numbers with their signs reversed."""
    return _result(box, -box.upper, -box.lower, box.error)


def add(first: Any, second: Any) -> Box:
    """The sum of two boxes, or of a box and a number or tensor."""
    one, other = _pair(first, second)
    lower, upper = one.lower + other.lower, one.upper + other.upper
    if one.error is None or other.error is None or one.arithmetic is None:
        return _result(one, lower, upper, None)
    rounding = one.arithmetic.unit * (one.magnitude + other.magnitude) + one.arithmetic.smallest
    return _result(one, lower, upper, one.error + other.error + rounding)


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
    lower, upper = _ordered(*ends)
    if one.error is None or other.error is None or one.arithmetic is None:
        return _result(one, lower, upper, None)
    error = one.magnitude * other.error + other.magnitude * one.error
    rounding = one.arithmetic.unit * one.magnitude * other.magnitude + one.arithmetic.smallest
    return _result(one, lower, upper, error + rounding)


def divide(box: Box, divisor: Any) -> Box:
    """A box divided by a number, or by a tensor without a 0."""
    if isinstance(divisor, Box):
        raise TypeError("the divisor depends on the image")
    other = _operand(box, divisor)
    smallest = box.arithmetic.smallest if box.arithmetic else 0.0
    if not bool((other.lower.abs() > smallest).all()):
        raise TypeError("the divisor is 0 somewhere")
    lower, upper = _ordered(box.lower / other.lower, box.upper / other.lower)
    if box.error is None or other.error is None or box.arithmetic is None:
        return _result(box, lower, upper, None)
    error = box.error + box.arithmetic.gamma(4) * box.magnitude  # divisor, its inverse and the product round
    return _result(box, lower, upper, error / other.lower.abs() + box.arithmetic.smallest)


def _affine(function: Callable[..., Tensor], box: Any, weight: Any, bias: Any = None, *args: Any, **kw: Any) -> Box:
    """A product with weights, plus a bias.

    The centre of the box goes through the layer itself, its radius through the layer with absolute weights.
    """
    if not isinstance(box, Box) or isinstance(weight, Box) or isinstance(bias, Box):
        raise ConfigurationError("no bounds are known for weights that depend on the image")
    _check_options(args, kw)
    layer = partial(_call_layer, function, args, kw)
    error = above = rounding = size = None
    if box.error is not None and box.arithmetic is not None:
        if {weight.dtype, box.dtype if bias is None else bias.dtype} != {box.dtype}:
            raise TypeError(f"weights of {weight.dtype} meet a tensor of {box.dtype}")
        weight, bias = weight.to(box.lower), None if bias is None else bias.to(box.lower)
        error, above, rounding, size = _affine_error(layer, box, weight, bias, box.arithmetic)
    center, radius = layer(box.center, weight, bias), layer(box.radius, weight.abs(), None)
    source = None
    if function is functional.linear and box.lower.ndim == 2:
        frozen = (weight, bias) if torch.is_grad_enabled() else (weight.clone(), None if bias is None else bias.clone())
        source = Linear(box, *frozen, rounding)
    return replace(_result(box, center - radius, center + radius, error, peak=size, source=source), error_above=above)


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


def _batch_norm(
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
    ends = [functional.batch_norm(end, mean, var, scale, shift, False, momentum, eps) for end in (box.lower, box.upper)]
    if box.error is None or box.arithmetic is None:
        return _result(box, *_ordered(*ends), None)
    # A backend may compute (x − mean) · factor + bias or x · factor + (bias − mean · factor); this bound covers both.
    factor = (var + eps).rsqrt() if scale is None else scale.abs() * (var + eps).rsqrt()
    along = (-1, *[1] * (box.lower.ndim - 2))
    factor, mean = factor.view(along), mean.abs().view(along)
    terms = factor * (box.magnitude + mean) + (0 if shift is None else shift.abs().view(along))
    error = factor * box.error + box.arithmetic.gamma(16) * terms + box.arithmetic.smallest
    return _result(box, *_ordered(*ends), error, peak=terms)


def _check_options(args: Iterable[Any], options: dict[str, Any]) -> None:
    """Refuse options such as an output tensor, a dtype or an interval; numbers, strings and lists of them are fine."""
    for option in (*args, *options.values()):
        for value in option if isinstance(option, list | tuple) else [option]:
            if not isinstance(value, (int, float, str, torch.memory_format, type(None))):
                raise TypeError(f"{type(value).__name__} is not a number")


def _view(name: str, box: Box, *args: Any, **options: Any) -> Box:
    """The same numbers in another shape; as with tensors, both may share their memory."""
    _check_options(args, options)
    ends = (None if end is None else getattr(end, name)(*args, **options) for end in (box.lower, box.upper, box.error))
    lower, upper, error = ends
    return Box(lower, upper, error=error, arithmetic=box.arithmetic)  # type: ignore[arg-type]


def _clone(box: Box) -> Box:
    return Box(box.lower, box.upper, error=box.error, arithmetic=box.arithmetic, source=box.source)


def _to(box: Box, *args: Any, **options: Any) -> Box:
    """The box on another device or in a wider data type; the network's arithmetic does not change."""
    like = torch.empty(0, dtype=box.dtype, device=box.device).to(*args, **options)
    is_wider = like.dtype.is_floating_point and torch.promote_types(like.dtype, box.dtype) == like.dtype
    if like.dtype != box.dtype and (box.arithmetic or not is_wider):
        raise TypeError(f"{like.dtype} is not the data type of the tensor, {box.dtype}")
    dtype = box.lower.dtype if box.arithmetic else like.dtype
    ends = (None if end is None else end.to(like.device, dtype) for end in (box.lower, box.upper, box.error))
    lower, upper, error = ends
    return Box(lower, upper, error=error, arithmetic=box.arithmetic)  # type: ignore[arg-type]


def _largest(function: Callable[..., Any], box: Box, *args: Any, **options: Any) -> Box:
    """The maximum of each window, whose error is at most the largest error in the window."""
    _check_options(args, options)
    error = None if box.error is None else function(box.error, *args, **options)
    return _result(box, function(box.lower, *args, **options), function(box.upper, *args, **options), error)


def _average(
    function: Callable[..., Tensor], axes: int, box: Box, *args: Any, divisor_override: int | None = None, **kw: Any
) -> Box:
    """A mean over windows of the last `axes` axes.

    With `axes` 0, the shape of the result tells how many numbers each mean is over.
    """
    if len(args) == 6:  # torch also takes divisor_override as a positional argument
        divisor_override, args = args[-1], args[:-1]
    _check_options((*args, divisor_override), kw)
    if divisor_override is not None:
        if not divisor_override > 0:
            raise TypeError(f"divisor_override is {divisor_override}")
        kw["divisor_override"] = divisor_override
    lower, upper = function(box.lower, *args, **kw), function(box.upper, *args, **kw)
    if box.error is None or box.arithmetic is None:
        return _result(box, lower, upper, None)
    count = math.prod(box.lower.shape[-axes:]) if axes else box.lower.numel() // max(1, lower.numel())
    gamma = box.arithmetic.gamma(count + 3)
    error = function(box.error + gamma * box.magnitude, *args, **kw) + box.arithmetic.smallest
    return _result(box, lower, upper, error, peak=count * error / gamma)


def _mean(box: Box, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Box:
    return _average(torch.mean, 0, box, *(() if dim is None else (dim, keepdim)))


def _join(function: Callable[..., Tensor], parts: Sequence[Any], dim: int = 0) -> Box:
    """Boxes and tensors concatenated or stacked."""
    first = next(part for part in parts if isinstance(part, Box))
    boxes = [part if isinstance(part, Box) else _operand(first, part) for part in parts]
    lower, upper = (function([getattr(box, end) for box in boxes], dim) for end in ("lower", "upper"))
    errors = [box.error for box in boxes if box.error is not None]
    return _result(first, lower, upper, function(errors, dim) if errors else None)


def _pad(box: Box, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Box:
    """The box padded with a constant, which is rounded to the network's data type."""
    _check_options([*pad, value], {})
    number = _operand(box, value or 0.0)
    if mode != "constant" or not math.isfinite(float(number.lower)):
        raise TypeError(f"mode is {mode!r} and value is {value}")
    ends = ((box.lower, number.lower), (box.upper, number.upper))
    lower, upper = (functional.pad(inside, pad, value=float(border)) for inside, border in ends)
    if box.error is None or number.error is None:
        return _result(box, lower, upper, None)
    border = float(number.error) if value else 0.0
    return _result(box, lower, upper, functional.pad(box.error, pad, value=border))


def _dropout(box: Box, p: float = 0.5, training: bool = True) -> Box:
    if training and p:
        raise ConfigurationError("no bounds are known for dropout in training; put the network into eval mode")
    return box


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
    return _result(box, lower - leap, upper + leap, error) if leap else _result(box, lower, upper, error)


def _check_factor(name: str, value: float, smallest: float) -> None:
    if not smallest <= value < 1e30:  # float32 has to represent the factor
        raise ConfigurationError(f"no bounds are known for {name} below {smallest:g} or of at least 1e30, got {value}")


def _clamp(box: Box, min: float | None = None, max: float | None = None) -> Box:
    ends = [end for end in (min, max) if end is not None]
    _check_options(ends, {})
    if not ends or any(math.isnan(end) for end in ends) or ends != sorted(ends):
        raise TypeError(f"limits {min} and {max} are out of order")
    rounded = [end for end in ends if torch.tensor(end, dtype=box.dtype).item() != end]  # such as 0.1 in float32
    size = sum(map(abs, rounded))
    return _rising(partial(torch.clamp, min=min, max=max), box, fixed=size)


def _hardtanh(box: Box, min_val: float = -1.0, max_val: float = 1.0) -> Box:
    return _clamp(box, min_val, max_val)


def _softplus(box: Box, beta: float = 1.0, threshold: float = 20.0) -> Box:
    """Softplus; at the threshold it changes from a logarithm to its argument, which is slightly smaller."""
    _check_factor("softplus with a threshold", threshold, 20.0)
    _check_factor("softplus with beta", beta, 1e-6)
    function = partial(functional.softplus, beta=beta, threshold=threshold)
    leap = math.log1p(math.exp(-threshold)) / beta
    return _rising(function, box, scaled=_ULPS, fixed=_ULPS / beta, leap=leap)


def _leaky_relu(box: Box, negative_slope: float = 0.01) -> Box:
    _check_factor("leaky_relu with negative_slope", negative_slope, 0.0)
    function = partial(functional.leaky_relu, negative_slope=negative_slope)
    return _rising(function, box, steepest=max(1.0, negative_slope), scaled=2 * negative_slope)


def _elu(box: Box, alpha: float = 1.0) -> Box:
    _check_factor("elu with alpha", alpha, 0.0)
    function = partial(functional.elu, alpha=alpha)
    return _rising(function, box, steepest=max(1.0, alpha), fixed=_ULPS * alpha)


def _celu(box: Box, alpha: float = 1.0) -> Box:
    _check_factor("celu with alpha", alpha, 1e-6)
    return _rising(partial(functional.celu, alpha=alpha), box, fixed=_ULPS * alpha)


def _prelu(box: Any, weight: Any) -> Box:
    """Two straight lines that meet at 0, so that the extremes lie at 0 or at an end of the box.

    The slope below 0 may have either sign.
    """
    if not isinstance(box, Box) or isinstance(weight, Box):
        raise ConfigurationError("no bounds are known for weights that depend on the image")
    if weight.dtype != box.dtype:
        raise TypeError(f"weights of {weight.dtype} meet a tensor of {box.dtype}")
    slope = weight.to(box.lower)
    kink = torch.zeros_like(box.lower).clamp(box.lower, box.upper)
    lower, upper = _ordered(*(torch.prelu(end, slope) for end in (box.lower, box.upper, kink)))
    if box.error is None or box.arithmetic is None:
        return _result(box, lower, upper, None)
    size = slope.abs().view(-1, *[1] * max(0, box.lower.ndim - 2))
    rounding = box.arithmetic.unit * size * box.magnitude + box.arithmetic.smallest
    return _result(box, lower, upper, size.clamp_min(1) * box.error + rounding)


def _gelu(box: Box, *, approximate: str = "none") -> Box:
    bottoms = {"none": -0.7517915246935645, "tanh": -0.7524614220710161}
    if approximate not in bottoms:
        raise TypeError(f"approximate is {approximate!r}")
    function = partial(functional.gelu, approximate=approximate)
    return _rising(function, box, bottom=bottoms[approximate], steepest=1.13, scaled=_ULPS)


def _relu(box: Box) -> Box:
    if box.error is not None and box.error_above is not None:
        box = replace(box, error=torch.minimum(box.error, box.error_above))
    return _rising(torch.relu, box)


_sigmoid = partial(_rising, torch.sigmoid, steepest=0.25, fixed=_ULPS)
_log_sigmoid = partial(_rising, functional.logsigmoid, scaled=_ULPS, fixed=_ULPS)
_selu = partial(_rising, functional.selu, steepest=1.76, scaled=4, fixed=2 * _ULPS)
_tanh = partial(_rising, torch.tanh, fixed=_ULPS)
_silu = partial(_rising, functional.silu, bottom=-1.2784645427610738, steepest=1.1, scaled=_ULPS)
_mish = partial(_rising, functional.mish, bottom=-1.1924312145154952, steepest=1.1, scaled=_ULPS)
_hardswish = partial(_rising, functional.hardswish, bottom=-1.5, steepest=1.5, scaled=_ULPS)
_hardsigmoid = partial(_rising, functional.hardsigmoid, steepest=0.17, fixed=_ULPS)


IN_PLACE = {"relu_"}
"""Names of functions that change their argument in place."""
_VIEWS = (
    *("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze"),
    *("contiguous", "permute", "transpose", "detach"),
)
METHODS: dict[str, IntervalRule] = {
    **{name: partial(_view, name) for name in _VIEWS},
    **{"mean": _mean, "clone": _clone, "to": _to, "clamp": _clamp, "sigmoid": _sigmoid, "tanh": _tanh},
    **{"relu": _relu, "relu_": _relu},
    **{name: partial(_to, dtype=dtype) for name, dtype in (("float", torch.float32), ("double", torch.float64))},
}
CASTS = {"to", "float", "double"}
"""Names of functions that can only change the data type or the device."""
VIEWS = {*_VIEWS, *CASTS, "dropout", "dropout2d"}
"""Names of functions whose result may share the memory of their argument."""
_POOLS = {
    1: (torch.avg_pool1d, functional.adaptive_avg_pool1d),
    2: (functional.avg_pool2d, functional.adaptive_avg_pool2d),
    3: (functional.avg_pool3d, functional.adaptive_avg_pool3d),
}
_MAX_POOLS = (
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, functional.max_pool1d, functional.max_pool2d),
    *(functional.max_pool3d, functional.adaptive_max_pool1d, functional.adaptive_max_pool2d),
    functional.adaptive_max_pool3d,
)
RULES: dict[Any, IntervalRule] = {
    **{getattr(torch, name): partial(_view, name) for name in _VIEWS if name not in ("view", "contiguous")},
    **{pool: partial(_average, pool, axes) for axes, pools in _POOLS.items() for pool in pools},
    **{pool: partial(_largest, pool) for pool in _MAX_POOLS},
    **{layer: partial(_affine, layer) for layer in (functional.linear, torch.conv1d, torch.conv2d, torch.conv3d)},
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), subtract),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__), multiply),
    **dict.fromkeys((functional.dropout, functional.dropout2d), _dropout),
    **dict.fromkeys((functional.relu, torch.relu), _relu),
    torch.relu_: _relu,
    functional.relu6: partial(_clamp, min=0.0, max=6.0),
    functional.hardtanh: _hardtanh,
    torch.clamp: _clamp,
    torch.sigmoid: _sigmoid,
    torch.tanh: _tanh,
    functional.softplus: _softplus,
    functional.leaky_relu: _leaky_relu,
    functional.elu: _elu,
    functional.selu: _selu,
    functional.celu: _celu,
    functional.logsigmoid: _log_sigmoid,
    functional.prelu: _prelu,
    functional.gelu: _gelu,
    functional.silu: _silu,
    functional.mish: _mish,
    functional.hardswish: _hardswish,
    functional.hardsigmoid: _hardsigmoid,
    functional.batch_norm: _batch_norm,
    torch.mean: _mean,
    torch.cat: partial(_join, torch.cat),
    torch.stack: partial(_join, torch.stack),
    functional.pad: _pad,
}
