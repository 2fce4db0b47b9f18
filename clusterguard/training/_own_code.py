"""The settings inside functions and objects of a user's own, by which two trainings are told apart."""

import dis
import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from clusterguard._support import attributes_of, is_user_module
from torch import Tensor, nn

MAY_CHANGE = " (may change)"
"""End of the name of a setting that the code itself may change, such as a counter of calls."""

_COMPARABLE = (
    *(bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device),
    *(type, FunctionType, BuiltinFunctionType, MethodType, partial, nn.Module, torch.Generator),  # by their names
)
_MUTABLE = (list, dict, set)
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_LONGEST_ROW = 20  # largest number of values in a row
_MOST_FUNCTIONS = 200  # of which code is compared


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


_CODE = f"code in Python {sys.version_info.major}.{sys.version_info.minor}{MAY_CHANGE}"  # versions compile differently


def settings_inside(value: Any) -> list[tuple[str, Any]]:
    """The named settings inside a function, a method or an object of a user's class; none for anything else.

    Those of a function are the values that it holds on to from outside, its defaults, the numbers in it, and the
    plain values in its module that it uses. Those of an object are its attributes, and the plain ones of its classes.
    For both there is a digest of the code, so that another operator or method is noticed, too.

    An attribute that is no option of the class may be a counter, for example. So its name ends in `MAY_CHANGE`, and so
    do those of every list, dict and set, of values that all functions of a module share, and of code.

    Args:
        value: value of any type.
    """
    if isinstance(value, MethodType):
        return settings_inside(value.__self__)
    if not _is_own(value if isinstance(value, FunctionType | type) else type(value)):
        return []
    found: dict[str, Any] = {}
    if isinstance(value, FunctionType):
        found = dict(_held(value)) | {f"{name}=": default for name, default in _defaults(value)}
        if numbers := tuple(_numbers(value.__code__)):
            found["numbers"] = numbers
        found |= {f"{name}{MAY_CHANGE}": part for name, part in _used(value).items() if _is_plain(part)}
    elif not isinstance(value, type) and not is_dataclass(value):
        found = dict(_attributes(value))
    found[_CODE] = _digest_of_code(value)
    return [(_marked(name, part), _comparable(part)) for name, part in found.items()]


def _is_own(owner: Any) -> bool:
    """Whether a function or class is neither Python's, nor of an installed package, nor of clusterguard."""
    module = str(getattr(owner, "__module__", None))
    return is_user_module(module) and module.partition(".")[0] != "clusterguard"


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object of a user's class, without private ones that cannot be compared.

    An object that prints itself is compared by its text, too, so its other unknown attributes are left out as well.
    """
    options, has_text = _options_of(type(value)), getattr(type(value), "__repr__", None) is not object.__repr__
    own = attributes_of(value)
    for name, part in own.items():
        is_private = name[0] == "_"
        if is_private and isinstance(value, nn.Module):
            continue
        if (is_private or has_text) and isinstance(_comparable(part), Incomparable):
            continue
        if not (isinstance(value, nn.Module) and name == "training"):
            yield name if name.lstrip("_") in options else f"{name}{MAY_CHANGE}", part
    for cls in reversed(_own_classes(type(value))):
        for name, part in vars(cls).items():
            if name not in own and name[:2] != "__" and _is_plain(part):
                yield f"{name}{MAY_CHANGE}", part


def _own_classes(cls: type) -> list[type]:
    return [part for part in cls.__mro__ if _is_own(part)]


def _used(function: FunctionType) -> dict[str, Any]:
    """The values of its module that a function may use, by name: attributes of the same names cannot be told apart."""
    names = sorted(_names(function.__code__) & function.__globals__.keys())
    return {name: function.__globals__[name] for name in names}


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return len(values) <= _LONGEST_ROW and all(part is None or type(part) in _PLAIN for part in values)


def _digest_of_code(value: Any) -> str:
    """A short digest of a function or of the user's classes of an object, with the user's functions that they call."""
    digest, waiting = hashlib.sha256(), [value]
    found: dict[int, FunctionType] = {}
    while waiting and len(found) < _MOST_FUNCTIONS:
        for function in _functions_of(waiting.pop()):
            if id(function) not in found:
                found[id(function)] = function
                digest.update(repr([*_words_of(function.__code__, function.__doc__)]).encode(errors="replace"))
                waiting += [part for part in _used(function).values() if _has_code(part)]
    return digest.hexdigest()[:8]


def _has_code(value: Any) -> bool:
    return isinstance(value, FunctionType | type) and _is_own(value)


def _functions_of(value: Any) -> Iterable[FunctionType]:
    """A function itself, or the methods of a user's class or of an object of one."""
    if isinstance(value, FunctionType):
        return [value]
    members = [
        getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
        for cls in _own_classes(value if isinstance(value, type) else type(value))
        for _, member in sorted(vars(cls).items(), key=lambda item: item[0])
    ]
    return [member for member in members if isinstance(member, FunctionType) and _is_own(member)]


def _words_of(code: CodeType, documentation: str | None) -> Iterator[Any]:
    """The instructions of a function with their names and constants, but not the names of its variables."""
    yield from (code.co_code, code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words_of(constant, None)
        elif isinstance(constant, frozenset):
            yield sorted(map(repr, constant))
        elif constant != documentation:
            yield constant


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
