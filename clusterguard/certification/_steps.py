"""Compares the steps that a network takes for a tensor with those that it takes for an interval."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from clusterguard.certification._interval_rules import RULES
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = {  # of operators, by what torch and an interval call them
    **dict.fromkeys(("addition", "radd"), "add"),
    **dict.fromkeys(("subtraction", "rsub"), "sub"),
    **dict.fromkeys(("multiplication", "rmul"), "mul"),
    **dict.fromkeys(("division", "truediv"), "div"),
    "negation": "neg",
}
_QUESTIONS = ("__get__", "size", "dim")  # an interval answers these as a tensor does; they are no steps


@dataclass(frozen=True)
class Dependent:
    """Placeholder for an argument that depends on the image.

    It holds the step that last wrote the argument, and the argument's shape.
    """

    maker: "Step | None"
    shape: torch.Size


@dataclass(frozen=True, eq=False)
class Step:
    """A function that a network applies to numbers that depend on the image, with its arguments in order."""

    name: str
    is_in_place: bool
    values: Sequence[Any]

    def is_like(self, other: "Step") -> bool:
        """Whether the other step is the same function of the same arguments."""
        pairs = [*zip(self.values, other.values, strict=False)]
        sizes = {len(self.values), len(other.values), len(pairs)}
        is_same_function = (self.name, self.is_in_place) == (other.name, other.is_in_place)
        return is_same_function and len(sizes) == 1 and all(_is_equal(*pair) for pair in pairs)


IMAGE = Step("image", False, ())
"""Stands for the step that made the input of a network."""


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


def record(
    name: str, args: Sequence[Any], options: Mapping[str, Any], find: Callable[[Any], Dependent | None]
) -> Step | None:
    """Note a step within a `recorded_steps` block, and return it; `find` tells which arguments depend on the image."""
    if _recording.steps is None:
        return None
    step = _step(name, args, options, find)
    # A network may change its constants later.
    step = Step(step.name, step.is_in_place, [x.clone() if isinstance(x, Tensor) else x for x in step.values])
    _recording.steps.append(step)
    return step


@contextmanager
def compare_steps(steps: Iterable[Step], images: Tensor) -> Iterator["StepComparison"]:
    """Follow a tensor through the network that gets it within the block, as `StepComparison` describes."""
    following = StepComparison(steps, images)
    with _Operations(following), following:
        yield following


class StepComparison(TorchFunctionMode):
    """Follows a tensor through a network, and compares each step with those that were recorded.

    A step must be the same function of the same arguments. An argument that depends on the image must come from the
    same step. What else uses the memory of such a tensor, such as scripted code, is no step, and so a difference. So is
    code that torch.compile has taken over, because it may run another function than that which is written.

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
        self._dependents: dict[int, tuple[Tensor, Step]] = {}  # holds the tensors, so that no other gets their id
        self._memory: set[int] = set()
        self._is_in_step = False
        self._add(images, IMAGE)

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of one of its functions."""
        if _is_compiled():
            self.note("code that is compiled")
        name = getattr(function, "__name__", "")
        is_of_torch = function in RULES or function is getattr(Tensor, name, None) or name in _QUESTIONS
        step = _step(name if is_of_torch else str(function), args, kwargs or {}, self._find)
        dependents = [value for value in step.values if isinstance(value, Dependent)]
        self._is_in_step = bool(dependents) and name not in _QUESTIONS
        try:
            result = function(*args, **(kwargs or {}))
            if not step.is_in_place and self._find(result):
                result = result.detach()  # a second tensor, because an interval would not return its argument either
        finally:
            self._is_in_step = False
        outputs = [value for value in _flatten([result]) if isinstance(value, Tensor)]
        if dependents and (outputs or name not in _QUESTIONS):
            maker = self._compare(step, dependents[0])
            for output in outputs:
                self._add(output, maker)
        return result

    def finish(self, output: Any, maker: Step | None) -> None:
        """Note a difference if steps are left, or if the network's output is not that of the step `maker`."""
        if self._left:
            self.note(self._left[0].name)
        dependent = self._find(output)
        if dependent is None or dependent.maker is not maker:
            self.note("its output")

    def note(self, difference: str) -> None:
        """Note a difference, unless there was one before."""
        self.difference = self.difference or difference

    def shares_memory(self, tensor: Tensor) -> bool:
        """Whether a tensor uses the memory of one that depends on the image."""
        return _address(tensor) in self._memory

    def is_unknown(self, values: Iterable[Any]) -> bool:
        """Whether an operation on these values is part of no step, though it uses numbers of the image."""
        return not self._is_in_step and any(isinstance(x, Tensor) and self.shares_memory(x) for x in _flatten(values))

    def _compare(self, step: Step, first: Dependent) -> Step:
        """The step that made the result of this one, whose first argument that depends on the image is `first`."""
        is_hidden = any(isinstance(value, Tensor) and self.shares_memory(value) for value in step.values)
        if self._left and self._left[0].is_like(step) and not is_hidden:
            return self._left.popleft()
        if step.name == "clone" and first.maker:  # bounds hold for a tensor and for its copy
            return first.maker
        self.note(step.name)
        return step

    def _add(self, tensor: Tensor, maker: Step) -> None:
        self._dependents[id(tensor)] = tensor, maker
        self._memory |= {_address(tensor)} - {0}

    def _find(self, value: Any) -> Dependent | None:
        tensor, maker = self._dependents.get(id(value), (None, None))
        return None if tensor is None else Dependent(maker, tensor.shape)


class _Operations(TorchDispatchMode):
    """Tells `StepComparison` of every operation of torch, also of those in scripted code."""

    def __init__(self, following: StepComparison) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._following = following

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of one of its operations."""
        if self._following.is_unknown([*args, *(kwargs or {}).values()]):
            self._following.note(str(function))
        return function(*args, **(kwargs or {}))


def _is_compiled() -> bool:
    """Whether this thread runs a function that torch.compile returned. Within these modes it runs uncompiled."""
    callback = set_eval_frame(None)  # which returns the one that it replaces; each thread has its own
    set_eval_frame(callback)
    return callback is not None


def _step(name: str, args: Sequence[Any], options: Mapping[str, Any], find: Callable[[Any], Dependent | None]) -> Step:
    is_in_place = bool(options.get("inplace")) or (name.endswith("_") and not name.endswith("__"))
    name = name.strip("_")
    args = args[::-1] if name == "rsub" else args
    named = [(key, options[key]) for key in sorted(options) if key != "inplace"]
    values = [find(value) or value for value in _flatten([*args, *named])]
    return Step(_NAMES.get(name, name), is_in_place, values)


def _flatten(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flatten(value)
        else:
            yield value


def _address(tensor: Tensor) -> int:
    """The address of the tensor's storage, or 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        is_alike = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
        return is_alike and (torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
    return one is other or (type(one) is type(other) and bool(one == other))
