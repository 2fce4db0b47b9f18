"""Compares the steps that a network takes for a tensor with those that it takes for an interval."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NAMES = {  # of operators, by what torch and an interval call them
    **dict.fromkeys(("addition", "radd", "iadd"), "add"),
    **dict.fromkeys(("subtraction", "rsub", "isub"), "sub"),
    **dict.fromkeys(("multiplication", "rmul", "imul"), "mul"),
    **dict.fromkeys(("division", "truediv", "itruediv"), "div"),
    "negation": "neg",
}
_QUESTIONS = ("__get__", "size", "dim")  # an interval answers these as a tensor does; they are no steps


@dataclass(frozen=True)
class _Dependent:
    """Stands for an argument that depends on the image."""

    shape: torch.Size


@dataclass(frozen=True, eq=False)
class Step:
    """A function that a network applies to numbers that depend on the image, with its arguments in order."""

    name: str
    values: Sequence[Any]

    def is_like(self, other: "Step") -> bool:
        """Whether the other step is the same function of the same arguments."""
        pairs = [*zip(self.values, other.values, strict=False)]
        sizes = {len(self.values), len(other.values), len(pairs)}
        return self.name == other.name and len(sizes) == 1 and all(_is_equal(*pair) for pair in pairs)


class _Recording(threading.local):
    """The steps within a `recorded_steps` block of this thread; None outside."""

    steps: list[Step] | None = None


_recording = _Recording()


@contextmanager
def recorded_steps() -> Iterator[list[Step]]:
    """Collect the steps that networks take for intervals within the block."""
    before, _recording.steps = _recording.steps, []
    try:
        yield _recording.steps
    finally:
        _recording.steps = before


def record(name: str, args: Sequence[Any], options: Mapping[str, Any], kind: type) -> None:
    """Note a step within a `recorded_steps` block, whose arguments of this kind depend on the image."""
    if _recording.steps is not None:
        _recording.steps.append(_step(name, args, options, lambda value: isinstance(value, kind)))


class SameSteps(TorchFunctionMode):
    """Follows a tensor through a network, and compares each step with those that were recorded.

    Args:
        steps: steps that the network took for an interval.
        images: the tensor that the network gets now.

    Attributes:
        difference: name of the first step that is not the recorded one; None as long as there is none.
    """

    def __init__(self, steps: Iterable[Step], images: Tensor) -> None:
        super().__init__()
        self.difference: str | None = None
        self._left = deque(steps)
        self._dependent = {id(images): images}  # holds the tensors, so that no other one gets their numbers

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of one of its functions."""
        name = getattr(function, "__name__", str(function))
        step = _step(name, args, kwargs or {}, self._is_dependent)
        result = function(*args, **(kwargs or {}))
        outputs = {id(value): value for value in _flatten([result]) if isinstance(value, Tensor)}
        if any(isinstance(value, _Dependent) for value in step.values) and (outputs or name not in _QUESTIONS):
            if self._left and self._left[0].is_like(step):
                self._left.popleft()
            elif step.name != "clone":  # bounds hold for a tensor and for its copy
                self.difference = self.difference or step.name
            self._dependent |= outputs
        return result

    def finish(self, output: Any) -> None:
        """Note a difference if steps are left, or if the network's output is not that of a step."""
        if self._left or not self._is_dependent(output):
            self.difference = self.difference or (self._left[0].name if self._left else "its output")

    def _is_dependent(self, value: Any) -> bool:
        return id(value) in self._dependent


def _step(name: str, args: Sequence[Any], options: Mapping[str, Any], is_dependent: Callable[[Any], bool]) -> Step:
    name = name.strip("_")
    args = args[::-1] if name == "rsub" else args
    named = [(key, options[key]) for key in sorted(options) if key != "inplace" or options[key]]
    values = [_Dependent(value.shape) if is_dependent(value) else value for value in _flatten([*args, *named])]
    return Step(_NAMES.get(name, name), values)


def _flatten(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flatten(value)
        else:
            yield value


def _is_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
