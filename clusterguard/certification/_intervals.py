"""Interval bounds: an interval runs through a network in place of a tensor and collects bounds on its outputs."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, final

import torch
from clusterguard.certification._boxes import Box, hull, move
from clusterguard.certification._interval_arithmetic import IntervalRule, add, divide, multiply, negate, subtract
from clusterguard.certification._interval_rules import CASTS, IN_PLACE, METHODS, RULES, VIEWS
from clusterguard.certification._steps import Dependent, Step, record
from clusterguard.detection import Arithmetic
from clusterguard.errors import ConfigurationError
from torch import Tensor


class _Refusals(threading.local):
    """The first refusal within a `final_refusals` block; a network may catch the error and go on without bounds."""

    first: ConfigurationError | None = None


_refusals = _Refusals()


def _refuse(message: str) -> ConfigurationError:
    error = ConfigurationError(message)
    _refusals.first = _refusals.first or error
    return error


@contextmanager
def final_refusals() -> Iterator[None]:
    """Raise the block's first refusal again at its end, in case the network caught it.

    Raises:
        ConfigurationError: an interval refused an operation within the block.
    """
    before, _refusals.first = _refusals.first, None
    try:
        yield
        if _refusals.first is not None:
            raise _refusals.first
    finally:
        _refusals.first = before


class _Differentiated(threading.local):
    """Whether this thread is in a `differentiated_steps` block."""

    is_on: bool = False


_differentiated = _Differentiated()


@contextmanager
def differentiated_steps() -> Iterator[None]:
    """Refuse, within the block, steps of a network whose gradients would be lost or wrong."""
    before, _differentiated.is_on = _differentiated.is_on, True
    try:
        yield
    finally:
        _differentiated.is_on = before


@final
class Interval:
    """All tensors between a lower and an upper one, elementwise; torch's functions and modules accept and return it.

    For an affine layer, a monotone function or a pooling, the bounds are the tightest possible for the box of its
    inputs. Through several layers the bounds loosen, because a box does not record how its coordinates depend on each
    other.

    An interval refuses every operation of Python or torch for which it has no rule. An operation in place changes the
    interval itself, and so every variable that refers to it. Two tensors such as ``x`` and ``x.flatten(1)`` may or may
    not share their memory, which depends on strides that an interval does not have. So after an operation in place on
    one of two such intervals, the other covers both possibilities, that it changed as well and that it did not.

    With an arithmetic, an interval also bounds the rounding errors of a network that computes in this arithmetic. Each
    value that the network computes lies within `error` of a value in the interval.

    Args:
        lower: smallest values, (B, …).
        upper: largest values, (B, …), not below `lower`.
        error: largest distance from a computed value to the interval, (B, …), at least 0; needed with an arithmetic.
        arithmetic: arithmetic in which the network computes, while the bounds are float64; None means exact numbers.

    Raises:
        ConfigurationError: an operation without known bounds is applied to the interval; the message names it.

    Reference:
        Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust models" (2018).
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition (2002), chapter 3, for errors.

    Example:
        >>> box = Interval(torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
        >>> double = torch.nn.functional.linear(box, torch.tensor([[2.0, -1.0]]))
        >>> double.lower, double.upper
        (tensor([[-4.]]), tensor([[2.]]))
        >>> torch.relu(double).lower
        tensor([[0.]])
    """

    __slots__ = ("__weakref__", "_box", "_family", "_maker", "_steps")

    _box: Box
    _family: "_Family"
    _maker: Step | None
    _steps: "tuple[IntervalRule, ...]"

    def __init__(
        self,
        lower: Tensor,
        upper: Tensor,
        *,
        error: Tensor | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        self._hold(Box(lower, upper, error, arithmetic))
        self._join(_Family(lower.shape), ())
        self.made_by(None)

    @classmethod
    def around(cls, images: Tensor, eps: float | Tensor) -> "Interval":
        """The interval of images in [0, 1] within l∞ distance eps of images (B, C, H, W); eps is a number or (B,)."""
        radius = eps.to(images).view(-1, 1, 1, 1) if isinstance(eps, Tensor) else eps
        return cls((images - radius).clamp(0, 1), (images + radius).clamp(0, 1))

    @property
    def lower(self) -> Tensor:
        """The smallest values."""
        return self._box.lower

    @property
    def upper(self) -> Tensor:
        """The largest values."""
        return self._box.upper

    @property
    def error(self) -> Tensor | None:
        """The largest distance from a computed value to the interval; None without an arithmetic."""
        return self._box.error

    @property
    def arithmetic(self) -> Arithmetic | None:
        """The arithmetic in which the network computes; None means exact numbers."""
        return self._box.arithmetic

    @property
    def center(self) -> Tensor:
        """The midpoint of lower and upper bound."""
        return self._box.center

    @property
    def radius(self) -> Tensor:
        """Half the distance between lower and upper bound."""
        return self._box.radius

    @property
    def shape(self) -> torch.Size:
        """The shape of either bound."""
        return self.lower.shape

    @property
    def ndim(self) -> int:
        """The number of dimensions of either bound."""
        return self.lower.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The data type in which the network computes."""
        return self._box.dtype

    @property
    def device(self) -> torch.device:
        """The device of either bound."""
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

    @property
    def maker(self) -> Step | None:
        """The step that made the interval or changed it last; None while no steps are recorded."""
        return self._maker

    def made_by(self, step: Step | None) -> "Interval":
        """The same interval, noted as made by a step of a recording."""
        object.__setattr__(self, "_maker", step)
        return self

    def lowest(self, directions: Tensor) -> Tensor:
        """The smallest value of ⟨direction, z⟩ over z in the interval (B, m), for directions (B, S, m): (B, S).

        If the interval is the output of a linear layer, the layer and the directions are combined, which gives a
        tighter bound than the interval alone. The bound holds in exact numbers. A network's computed value can be lower
        by `slack`.
        """
        return self._box.lowest(directions)

    def lowest_above(self, places: Tensor) -> Tensor:
        """The smallest computed z_i − z_p of every coordinate i, for the coordinate p in `places` (B,): (B, m)."""
        return self._box.lowest_above(places)

    def slack(self, directions: Tensor) -> Tensor:
        """How far rounding may take ⟨direction, z⟩ below `lowest`, for directions (B, S, m): (B, S)."""
        return self._box.slack(directions)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> "Interval":
        """Called by torch in place of one of its functions."""
        name = getattr(function, "__name__", str(function))
        rule = RULES.get(function)
        if rule is None:
            raise _refuse(
                f"no bounds are known for {name}; certificates need networks of linear layers, convolutions, batch "
                "normalisation, pooling, sums and monotone activations such as ReLU"
            )
        return _call(name, rule, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., "Interval"]:
        if name in METHODS:
            return partial(_call, name, METHODS[name], self)
        message = f"an interval has no {name!r}; no bounds are known for it"
        if name.startswith("__"):  # Python looks up special methods and expects an AttributeError without one
            raise AttributeError(message)
        raise _refuse(message)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise _refuse(f"no bounds are known of a tensor whose {name!r} is assigned")

    def __delattr__(self, name: str) -> NoReturn:
        raise _refuse(f"no bounds are known of a tensor whose {name!r} is deleted")

    def __add__(self, other: "Interval | Tensor | float") -> "Interval":
        return _call("addition", add, self, other)

    def __neg__(self) -> "Interval":
        return _call("negation", negate, self)

    def __sub__(self, other: "Interval | Tensor | float") -> "Interval":
        return _call("subtraction", subtract, self, other)

    def __rsub__(self, other: "Tensor | float") -> "Interval":
        return _call("subtraction", subtract, other, self)

    def __mul__(self, factor: "Interval | Tensor | float") -> "Interval":
        return _call("multiplication", multiply, self, factor)

    def __truediv__(self, divisor: Tensor | float) -> "Interval":
        return _call("division", divide, self, divisor)

    def __iadd__(self, other: "Interval | Tensor | float") -> "Interval":
        return _call("addition", add, self, other, inplace=True)

    def __isub__(self, other: "Interval | Tensor | float") -> "Interval":
        return _call("subtraction", subtract, self, other, inplace=True)

    def __imul__(self, factor: "Interval | Tensor | float") -> "Interval":
        return _call("multiplication", multiply, self, factor, inplace=True)

    def __itruediv__(self, divisor: Tensor | float) -> "Interval":
        return _call("division", divide, self, divisor, inplace=True)

    __radd__, __rmul__ = __add__, __mul__

    def _become(self, other: "Interval") -> "Interval":
        """Replace the interval's bounds in place, and widen those of all intervals that may share its memory."""
        if other.shape != self.shape or other.dtype != self.dtype:
            raise _refuse(
                f"no bounds are known for a change in place from {self.dtype} of shape {(*self.shape,)} to "
                f"{other.dtype} of shape {(*other.shape,)}"
            )
        others = self._family.others(self)
        if others and _differentiated.is_on:
            raise _refuse("no linear bounds are known for a change in place of memory that other tensors share")
        for member in others:
            member._hold(hull(member._box, move(other._box, self._positions(), member._positions())))
        self._hold(other._box)
        return self

    def _positions(self) -> Tensor:
        """The position of each element in the memory that the family may share."""
        first = torch.arange(self._family.shape.numel(), device=self.device).view(self._family.shape)
        box = Box(first, first)
        for step in self._steps:
            box = step(box)
        return box.lower

    def _hold(self, box: Box) -> None:
        object.__setattr__(self, "_box", box)

    def _join(self, family: "_Family", steps: "tuple[IntervalRule, ...]") -> "Interval":
        object.__setattr__(self, "_family", family)
        object.__setattr__(self, "_steps", steps)
        family.members = [member for member in family.members if member() is not None] + [weakref.ref(self)]
        return self


class _Family:
    """An interval, its views, the views of these views and so on, as long as they are in use.

    Args:
        shape: shape of the first interval.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.members: list[weakref.ref[Interval]] = []

    def others(self, member: Interval) -> list[Interval]:
        """All members except this one."""
        alive = (reference() for reference in self.members)
        return [other for other in alive if other is not None and other is not member]


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise _refuse(
            f"no bounds are known for a network that applies {name} to numbers that depend on the image; certificates "
            "need networks of sums, products and layers that do the same to every image"
        )

    return refuse


_BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_REFUSED = {
    *("bool", "len", "iter", "next", "reversed", "contains", "getitem", "setitem", "delitem", "hash"),
    *("eq", "ne", "lt", "le", "gt", "ge", "int", "float", "complex", "index", "abs", "pos", "invert"),
    *("round", "trunc", "floor", "ceil", "copy", "deepcopy", "reduce", "reduce_ex", "array"),
    *(prefix + name for prefix in ("", "r", "i") for name in _BINARY),
}
for _name in sorted(f"__{name}__" for name in _REFUSED):
    if _name not in vars(Interval):  # Python's defaults for some of these methods would give wrong bounds
        setattr(Interval, _name, _refusal(_name))


def _call(name: str, rule: IntervalRule, *args: Any, inplace: bool = False, **options: Any) -> Interval:
    """Apply a rule to intervals, and refuse arguments that the rule does not take."""
    if _differentiated.is_on and not torch.is_grad_enabled():
        raise _refuse("no linear bounds are known for a network that switches gradients off")
    step = record(name, args, {**options, "inplace": inplace}, _as_dependent)
    return _apply(name, rule, args, options, inplace or name in IN_PLACE).made_by(step)


def _apply(name: str, rule: IntervalRule, args: Sequence[Any], options: Mapping[str, Any], inplace: bool) -> Interval:
    base = next((value for value in (*args, *options.values()) if isinstance(value, Interval)), None)
    try:
        box = rule(*map(_unpack, args), **{key: _unpack(value) for key, value in options.items()})
    except ConfigurationError as error:
        raise _refuse(str(error)) from error
    except TypeError as error:
        raise _refuse(f"no bounds are known for {name} with such arguments: {error}") from error
    if name in VIEWS and not (args and args[0] is base):
        raise _refuse(f"no bounds are known for {name} of a tensor that is not its first argument")
    result = Interval(box.lower, box.upper)
    result._hold(box)
    if base is None:
        return result
    if inplace:
        return base._become(result)
    if name not in VIEWS or box.dtype != base.dtype or box.device != base.device:
        return result
    others = args[1:]
    steps = base._steps if name in CASTS else (*base._steps, lambda positions: rule(positions, *others, **options))
    return result._join(base._family, steps)


def _as_dependent(value: Any) -> Dependent | None:
    return Dependent(value.maker, value.shape) if isinstance(value, Interval) else None


def _unpack(value: Any) -> Any:
    """The box of an interval, also inside a list or tuple; anything else unchanged."""
    if isinstance(value, list | tuple):
        return type(value)(map(_unpack, value)) if type(value) in (list, tuple) else value
    return value._box if isinstance(value, Interval) else value
