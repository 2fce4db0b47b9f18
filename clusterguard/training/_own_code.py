"""The settings inside functions and objects of a user's own, by which two trainings are told apart."""

import dis
import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from clusterguard._support import is_user_module
from torch import Tensor, nn

MAY_CHANGE = " (may change)"
"""End of the name of a setting that the code itself may change, such as a counter of calls."""

_COMPARABLE = (
    *(bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device),
    *(type, FunctionType, BuiltinFunctionType, MethodType, partial, nn.Module, torch.Generator),  # by their names
)
_MUTABLE = (list, dict, set)
_LONGEST_ROW = 20  # largest number of values in a row


class Incomparable:
    """Stands for a value that cannot be compared.

    Args:
        value: the value.
    """

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"{UNKNOWN_KIND}{type(self.value).__qualname__}"


UNKNOWN_KIND = "an unknown "
"""Beginning of the description of a value that cannot be compared."""


def settings_inside(value: Any) -> list[tuple[str, Any]]:
    """The named settings inside a function, a method or an object of a user's class; none for anything else.

    Those of a function are the values that it holds on to from outside, its defaults, and the numbers in it. Those of
    an object are its public attributes. An attribute that is no option of the class may be a counter, for example, so
    its name ends in `MAY_CHANGE`, and so does that of every list, dict and set.

    Args:
        value: value of any type.
    """
    if isinstance(value, MethodType):
        return settings_inside(value.__self__)
    module = str(getattr(value if isinstance(value, FunctionType) else type(value), "__module__", None))
    if not is_user_module(module) or module.partition(".")[0] == "clusterguard":
        return []
    if isinstance(value, FunctionType):
        found = dict(_held(value)) | {f"{name}=": default for name, default in _defaults(value)}
        if numbers := tuple(_numbers(value.__code__)):
            found["numbers"] = numbers
    elif not isinstance(value, type) and getattr(type(value), "__repr__", None) is object.__repr__:
        options = _options_of(type(value))
        public = {name: part for name, part in getattr(value, "__dict__", {}).items() if name[0] != "_"}
        found = {name if name in options else f"{name}{MAY_CHANGE}": part for name, part in public.items()}
    else:
        return []
    return [(_marked(name, part), _comparable(part)) for name, part in found.items()]


def _marked(name: str, value: Any) -> str:
    """The name of a setting, which says so if the value may change: lists and the like often record something."""
    return f"{name}{MAY_CHANGE}" if isinstance(value, _MUTABLE) and not name.endswith(MAY_CHANGE) else name


def _held(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The values that a function takes from the function around it. Those that it assigns to may change."""
    assigned = {step.argval for step in dis.get_instructions(function.__code__) if step.opname == "STORE_DEREF"}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell may be empty
            yield f"{name}{MAY_CHANGE}" if name in assigned else name, cell.cell_contents


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty:
            yield name, parameter.default


def _numbers(code: CodeType) -> Iterator[float | complex]:
    """The numbers in a function and in the functions inside it, in the order of the code."""
    for step in dis.get_instructions(code):
        if isinstance(step.argval, CodeType):
            yield from _numbers(step.argval)
        elif step.opname.startswith(("LOAD_CONST", "LOAD_SMALL_INT", "RETURN_CONST")):
            values = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            yield from (value for value in values if type(value) in (int, float, complex))


def _options_of(cls: type) -> set[str]:
    """The names of the options with which objects of a class are made."""
    try:
        return set(inspect.signature(cls).parameters)
    except (TypeError, ValueError):
        return set()


def _comparable(value: Any) -> Any:
    """The value, if it can be described so that equal settings have equal descriptions; an `Incomparable` otherwise."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, dict | list | tuple | set | frozenset):
        parts = [*value.values(), *value] if isinstance(value, dict) else [*value]
        known = len(value) <= _LONGEST_ROW and not any(isinstance(_comparable(part), Incomparable) for part in parts)
        return value if known else Incomparable(value)
    return value if value is None or isinstance(value, _COMPARABLE) or is_dataclass(value) else Incomparable(value)
