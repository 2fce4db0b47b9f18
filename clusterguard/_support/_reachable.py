"""Finds the objects that an object holds: attributes, items, and what functions and classes refer to."""

import dis
import functools
import itertools
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Generator, Tensor
from torch.utils.data.dataloader import _BaseDataLoaderIter

_DEPTH, _WIDTH, _MOST = 12, 256, 50_000  # limits of the search, which must end even in a data set of a million files
GENERATORS = (Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_LIBRARIES = ("builtins", "torch", "numpy", "random", "torchvision", "accelerate")
_NUMBERS = (bool, int, float, complex, np.generic)
_LEAVES = (*_NUMBERS, str, bytes, type(None), type, ModuleType, BuiltinFunctionType, PurePath)


def reachable(root: object, name: str) -> Iterator[tuple[str, Any]]:
    """All objects that an object holds, each once, with their paths; breadth first, with large containers last.

    An object holds its attributes or items, the functions of its classes, and what its functions refer to: their
    closures, defaults, and the objects of the user's own modules. The search has limits, so it may miss some.

    Args:
        root: object to begin with.
        name: name of `root`, with which the paths begin.
    """
    queue, visited = deque([(name, root, 0)]), {id(root): root}
    rest: deque[tuple[str, Iterator[tuple[str, Any]], int]] = deque()  # remaining elements of large containers
    while queue or rest:
        if queue:
            path, value, depth = queue.popleft()
            yield path, value
            if depth == _DEPTH or isinstance(value, GENERATORS):
                continue
            remaining = _children(value)
            children = list(itertools.islice(remaining, _WIDTH))
            if not all(_is_plain(child) for _, child in children):
                rest.append((path, remaining, depth))
        else:
            path, remaining, depth = rest.popleft()
            children = list(itertools.islice(remaining, _MOST))
        for name, child in children:
            if _is_leaf(child) or id(child) in visited or len(visited) == _MOST:
                continue
            visited[id(child)] = child  # the reference keeps another object from getting the same id
            queue.append((f"{path}.{name}", child, depth + 1))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{name!r}]", child) for name, child in value.items())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, FunctionType):
        yield from _held_by_function(value)
    else:
        yield from _held_by_object(value)


def _is_leaf(value: object) -> bool:
    return isinstance(value, (*_LEAVES, Tensor, np.ndarray))


def _is_plain(value: object, *, depth: int = 2) -> bool:
    """Whether a value is a leaf, or a small container of leaves, such as a file name with its bounding boxes."""
    if not depth or not isinstance(value, list | tuple | dict):
        return _is_leaf(value)
    items = value.values() if isinstance(value, dict) else value
    return all(_is_plain(item, depth=depth - 1) for item in itertools.islice(items, _WIDTH))


def _held_by_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The closure of a function, its defaults, and the generators and user objects of its module that it uses."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # raised for a name that is not bound yet
            yield name, cell.cell_contents
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    attributes, names = _names(function.__code__)
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, ModuleType) and is_user_module(value.__name__):
            held = {f"{name}.{attribute}": vars(value)[attribute] for attribute in attributes & vars(value).keys()}
        else:
            held = {name: value}
        yield from (
            (path, item) for path, item in held.items() if isinstance(item, GENERATORS) or _is_user_object(item)
        )


def _is_user_object(value: object) -> bool:
    """Whether a value is a function or object from user code, or a container with generators among its first items."""
    if isinstance(value, list | tuple | dict):
        items = value.values() if isinstance(value, dict) else value
        return any(isinstance(item, GENERATORS) for item in itertools.islice(items, _WIDTH))
    return is_user_module(value.__module__ if isinstance(value, FunctionType) else type(value).__module__)


@functools.cache
def is_user_module(name: str | None) -> bool:
    """Whether a module is neither Python's nor installed, such as a script, a notebook or a package in development."""
    top = str(name).partition(".")[0]
    if top in sys.stdlib_module_names or top in _LIBRARIES:
        return False
    file = getattr(sys.modules.get(str(name)), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"} & set(PurePath(file).parts)


@functools.cache
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """All names that a function and its inner functions use, attributes included, and the global names among them."""
    loads = (step for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    used = frozenset(code.co_names).union(*(names for names, _ in inner))
    return used, frozenset(step.argval for step in loads).union(*(names for _, names in inner))


def _held_by_object(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, and the generators and methods of its classes."""
    for name, child in attributes_of(value).items():
        if not isinstance(child, _BaseDataLoaderIter):  # belongs to the running pass alone
            yield name, child
    for kind in custom_classes(value):
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))  # for static methods and properties
            if isinstance(function, (*GENERATORS, FunctionType)):
                yield name, function


def custom_classes(value: object) -> list[type]:
    """The classes of an object that are not torch's, NumPy's or Python's."""
    return [kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] not in _LIBRARIES]


def attributes_of(owner: Any) -> dict[str, Any]:
    """The attributes of an object or a class that can be set, by name."""
    if isinstance(owner, type):
        return {name: value for name, value in vars(owner).items() if not name.startswith("__")}
    slots = [vars(kind).get("__slots__", ()) for kind in custom_classes(owner)]
    names = [name for names in slots for name in ((names,) if isinstance(names, str) else names)]
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)} | getattr(owner, "__dict__", {})
