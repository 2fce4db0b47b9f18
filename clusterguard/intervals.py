"""Interval bounds: what a network can make of every image in a box, through the network as it is written."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from clusterguard.errors import ConfigurationError
from torch import Tensor
from torch.nn import functional


class Interval:
    """All tensors between two others, elementwise; torch's functions and modules take one and give one.

    Bounds of an affine layer, of a monotone function and of a pooling are the tightest there are for their input's
    box; through several layers they loosen, because a box forgets how coordinates hang together.

    Args:
        lower: smallest values, (B, …).
        upper: largest values, (B, …), not below `lower`.
        source: an interval and the weight (m, D) and bias (m,) of the linear layer that made this one of it, so that
            differences of outputs can be bounded without that layer's loss.

    Raises:
        ConfigurationError: a function without known bounds is applied to it; the message names it.

    Reference:
        Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust models" (2018).

    Example:
        >>> box = Interval(torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
        >>> double = torch.nn.functional.linear(box, torch.tensor([[2.0, -1.0]]))
        >>> double.lower, double.upper
        (tensor([[-4.]]), tensor([[2.]]))
        >>> torch.relu(double).lower
        tensor([[0.]])
    """

    def __init__(
        self, lower: Tensor, upper: Tensor, *, source: "tuple[Interval, Tensor, Tensor | None] | None" = None
    ) -> None:
        self.lower, self.upper, self.source = lower, upper, source

    @classmethod
    def around(cls, images: Tensor, eps: float | Tensor) -> "Interval":
        """All images in [0, 1] within eps of images (B, C, H, W) in l∞; eps is a number or (B,)."""
        radius = eps.to(images).view(-1, 1, 1, 1) if isinstance(eps, Tensor) else eps
        return cls((images - radius).clamp(0, 1), (images + radius).clamp(0, 1))

    @property
    def center(self) -> Tensor:
        """The middle."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half the width."""
        return (self.upper - self.lower) / 2

    @property
    def shape(self) -> torch.Size:
        """Of either bound."""
        return self.lower.shape

    @property
    def ndim(self) -> int:
        """Of either bound."""
        return self.lower.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of either bound."""
        return self.lower.dtype

    @property
    def device(self) -> torch.device:
        """Of either bound."""
        return self.lower.device

    def dim(self) -> int:
        """The number of dimensions of either bound."""
        return self.lower.ndim

    def size(self, *which: int) -> Any:
        """The shape of either bound.

        Args:
            *which: one dimension, to get its size alone.
        """
        return self.lower.size(*which)

    def lowest(self, directions: Tensor) -> Tensor:
        """The smallest value of ⟨direction, z⟩ over z in the interval (B, m), for directions (B, S, m): (B, S).

        Where the interval comes out of a linear layer, that layer and the directions are taken together, which is
        tighter than the interval is.
        """
        if self.source is None:
            along = torch.einsum("bsm,bm->bs", directions, self.center)
            return along - torch.einsum("bsm,bm->bs", directions.abs(), self.radius)
        inside, weight, bias = self.source
        found = inside.lowest(directions @ weight)
        return found if bias is None else found + directions @ bias

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of one of its functions."""
        rule = _RULES.get(function)
        if rule is None:
            name = getattr(function, "__name__", str(function))
            raise ConfigurationError(
                f"no bounds are known for {name}; certificates need networks of linear layers, convolutions, batch "
                "normalisation, pooling, sums and monotone activations such as ReLU"
            )
        options = dict(kwargs or {})
        in_place = options.pop("inplace", False) or function is torch.relu_
        found = rule(torch.relu if function is torch.relu_ else function, *args, **options)
        return args[0]._become(found) if in_place else found

    def __getattr__(self, name: str) -> Callable[..., "Interval"]:
        if name in _METHODS:
            return partial(_monotone, getattr(Tensor, name), self)
        raise AttributeError(f"an interval has no {name!r}; no bounds are known for it")

    def __add__(self, other: "Interval | Tensor | float") -> "Interval":
        if isinstance(other, Interval):
            return Interval(self.lower + other.lower, self.upper + other.upper)
        return Interval(self.lower + other, self.upper + other)

    def __neg__(self) -> "Interval":
        return Interval(-self.upper, -self.lower)

    def __sub__(self, other: "Interval | Tensor | float") -> "Interval":
        return self + -other

    def __rsub__(self, other: "Tensor | float") -> "Interval":
        return -self + other

    def __mul__(self, factor: "Interval | Tensor | float") -> "Interval":
        factors = (factor.lower, factor.upper) if isinstance(factor, Interval) else (factor,)
        return _span([end * other for end in (self.lower, self.upper) for other in factors])

    def __truediv__(self, divisor: Tensor | float) -> "Interval":
        return self * (1 / divisor)

    def __iadd__(self, other: "Interval | Tensor | float") -> "Interval":
        return self._become(self + other)

    def __imul__(self, factor: "Interval | Tensor | float") -> "Interval":
        return self._become(self * factor)

    def _become(self, other: "Interval") -> "Interval":
        """In place, so that whatever else a network calls this interval changes too, as a tensor would."""
        self.lower, self.upper, self.source = other.lower, other.upper, other.source
        return self

    __radd__, __rmul__ = __add__, __mul__


def _monotone(function: Callable[..., Tensor], box: Interval, *args: Any, **kwargs: Any) -> Interval:
    """A function that is not decreasing in any coordinate, or only moves coordinates: each bound by itself."""
    return Interval(function(box.lower, *args, **kwargs), function(box.upper, *args, **kwargs))


def _affine(
    function: Callable[..., Tensor], box: Any, weight: Any, bias: Any = None, *args: Any, **kw: Any
) -> Interval:
    """A product with weights, plus a bias: the centre goes through it, the radius through absolute weights."""
    if not isinstance(box, Interval):
        raise ConfigurationError("no bounds are known for weights that depend on the image")
    center = function(box.center, weight, bias, *args, **kw)
    radius = function(box.radius, weight.abs(), None, *args, **kw)
    source = (box, weight, bias) if function is functional.linear and box.lower.ndim == 2 else None
    return Interval(center - radius, center + radius, source=source)


def _batch_norm(function: Callable[..., Tensor], box: Interval, mean: Any, var: Any, *args: Any, **kw: Any) -> Interval:
    """One factor a channel, of either sign, from running statistics."""
    if mean is None or var is None or kw.get("training", args[2] if len(args) > 2 else False):
        raise ConfigurationError("no bounds are known for batch statistics; put batch normalisation into eval mode")
    return _span([function(end, mean, var, *args, **kw) for end in (box.lower, box.upper)])


def _dip(function: Callable[..., Tensor], box: Interval, *args: Any, **kw: Any) -> Interval:
    """A function that falls to its one minimum and rises from there."""
    lowest = torch.full_like(box.lower, _MINIMA[function]).clamp(box.lower, box.upper)
    ends = [function(end, *args, **kw) for end in (box.lower, box.upper)]
    return Interval(function(lowest, *args, **kw), torch.maximum(*ends))


def _bent(function: Callable[..., Tensor], box: Interval, slope: float | None = None, **kw: float) -> Interval:
    """A function that rises on the right, and on the left too unless its slope there is negative."""
    options = kw if slope is None else {_SLOPES[function]: slope, **kw}
    if options.get(_SLOPES[function], 0) < 0:
        raise ConfigurationError(f"no bounds are known for {function.__name__} with {_SLOPES[function]} below 0")
    return _monotone(function, box, **options)


def _cat(function: Callable[..., Tensor], parts: Sequence[Interval | Tensor], *args: Any, **kw: Any) -> Interval:
    boxes = [part if isinstance(part, Interval) else Interval(part, part) for part in parts]
    return Interval(*(function([getattr(box, end) for box in boxes], *args, **kw) for end in ("lower", "upper")))


def _span(values: Sequence[Tensor]) -> Interval:
    stacked = torch.stack(list(values))
    return Interval(stacked.amin(dim=0), stacked.amax(dim=0))


def _dropout(function: Callable[..., Tensor], box: Interval, p: float = 0.5, training: bool = True) -> Interval:
    if training and p:
        raise ConfigurationError("no bounds are known for dropout in training; put the network into eval mode")
    return box


_METHODS = frozenset(
    {"flatten", "reshape", "view", "contiguous", "squeeze", "unsqueeze", "permute", "transpose", "mean"}
)
_METHODS |= {"relu", "sigmoid", "tanh", "clamp", "float", "double", "to"}

_MONOTONE = (
    *(functional.relu, functional.relu6, functional.hardtanh, functional.softplus, functional.sigmoid),
    *(functional.tanh, functional.hardsigmoid, torch.relu, torch.sigmoid, torch.tanh, torch.clamp),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, functional.max_pool2d, functional.avg_pool1d),
    *(functional.avg_pool2d, functional.avg_pool3d, functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d),
    *(functional.adaptive_max_pool2d, torch.adaptive_avg_pool1d, torch.flatten, torch.reshape, torch.mean),
)
_MINIMA: dict[Any, float] = {  # where each is smallest
    functional.silu: -1.2784645427610738,
    functional.mish: -1.1924337023,
    functional.hardswish: -1.5,
    functional.gelu: -0.7517916243,
}
_SLOPES: dict[Any, str] = {functional.leaky_relu: "negative_slope", functional.elu: "alpha"}
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_MONOTONE, _monotone),
    **dict.fromkeys((functional.linear, torch.conv1d, torch.conv2d, torch.conv3d), _affine),
    functional.batch_norm: _batch_norm,
    **dict.fromkeys(_SLOPES, _bent),
    torch.relu_: _monotone,
    functional.dropout: _dropout,
    functional.dropout2d: _dropout,
    **dict.fromkeys(_MINIMA, _dip),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), lambda _, first, second: second + first),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), lambda _, first, second: -second + first),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__), lambda _, first, second: second * first),
    torch.cat: _cat,
}
