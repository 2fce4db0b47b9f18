"""What a loader carries from one pass to the next: random generators and counters in its sampler or data set."""

import copy
import functools
import itertools
import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from clusterguard.detection import is_running
from clusterguard.errors import PersistenceError
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Sampler

_DEPTH, _WIDTH, _MOST = 12, 256, 50_000  # of the search: it must end, also in a data set of a million file names
_GENERATORS = (Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_SCALARS = (bool, int, float, str, type(None))
_LEAVES = (*_SCALARS, bytes, complex, type, ModuleType, BuiltinFunctionType, PurePath, np.generic)


class LoaderState:
    """Finds what a loader carries from pass to pass, keeps it, and puts it back.

    It looks through the attributes of the loader, its sampler, data set, functions and so on, and knows torch's,
    NumPy's and Python's generators; numbers and strings that have changed since it first looked; and, in samplers, also
    tensors, arrays and lists of numbers.

    Args:
        loader: any.

    Example:
        >>> from torch.utils.data import RandomSampler
        >>> sampler = RandomSampler(range(100), generator=Generator().manual_seed(0))
        >>> state = LoaderState(sampler)
        >>> before, first = state.get(), list(sampler)
        >>> state.set(before)
        >>> list(sampler) == first
        True
    """

    def __init__(self, loader: object) -> None:
        self._generators: dict[str, Any] = {}
        self._owners: dict[str, Any] = {}
        self._obstacles: list[str] = []
        for path, value in _reachable(loader):
            if isinstance(value, _GENERATORS):
                self._generators[path] = value
            elif (
                hasattr(value, "__dict__") and not isinstance(value, FunctionType | nn.Module) and not _is_shared(value)
            ):
                self._owners[path] = value
            self._obstacles += _obstacles(path, value)
        self._first = self._values()

    @property
    def obstacles(self) -> list[str]:
        """What keeps the loader from being brought back to where it was, in words; empty if nothing is known."""
        return self._obstacles

    def get(self) -> dict[str, Any]:
        """The present state, of numbers, strings, tensors, and lists and dicts of them."""
        generators = {path: _get(own) for path, own in self._generators.items() if not _is_of_the_system(own)}
        return {"generators": generators, "values": self._values()}

    def changed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state that `get` returned, less the values that have never changed, as a checkpoint keeps it.

        What the loader was made with, such as a folder's name, may then be another when the training goes on.
        """
        now = self._values()
        values = {
            path: value
            for path, value in state["values"].items()
            if not _is_same(value, self._first.get(path)) or not _is_same(now.get(path), self._first.get(path))
        }
        return {"generators": state["generators"], "values": values}

    def set(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that `get` or `changed` returned.

        Raises:
            PersistenceError: it is another loader's.
        """
        generators = {path: own for path, own in self._generators.items() if not _is_of_the_system(own)}
        if set(generators) != set(state["generators"]):
            raise PersistenceError(
                f"expected a loader with the generators that it had when it was interrupted "
                f"({_listed(state['generators'])}), got one with {_listed(generators)}"
            )
        for path, generator in generators.items():
            _set(generator, state["generators"][path])
        now = self._values()
        for path, value in state["values"].items():
            if path in now and not _is_same(now[path], value):
                owner, _, name = path.rpartition(".")
                setattr(self._owners[owner], name, _restored(getattr(self._owners[owner], name), value))

    def _values(self) -> dict[str, Any]:
        return {
            f"{path}.{name}": copy.copy(value)
            if isinstance(value, (*_SCALARS, list))
            else torch.as_tensor(value).clone()
            for path, owner in self._owners.items()
            for name, value in vars(owner).items()
            if isinstance(value, _SCALARS) or (isinstance(owner, Sampler) and _is_numbers(value))
        }


def restarting_workers(loader: Any) -> Any:
    """The same loader with fresh workers in every pass: persistent ones hold random states that nobody can save.

    Example:
        >>> restarting_workers(DataLoader(range(3), num_workers=1, persistent_workers=True)).persistent_workers
        False
    """
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    same = copy.copy(loader)
    same.__dict__["persistent_workers"] = False  # the attribute itself is guarded, for workers might be running
    return same


def _reachable(root: object) -> Iterator[tuple[str, Any]]:
    """Objects that a loader holds, breadth first, each once, by the path of attributes to it."""
    queue, seen = deque([("loader", root, 0)]), {id(root): root}
    while queue:
        path, value, depth = queue.popleft()
        yield path, value
        if depth == _DEPTH or isinstance(value, _GENERATORS):
            continue
        for name, child in _children(value):
            if isinstance(child, (*_LEAVES, Tensor, np.ndarray)) or id(child) in seen or len(seen) == _MOST:
                continue
            seen[id(child)] = child  # kept, or its id might be given to another object
            queue.append((f"{path}.{name}", child, depth + 1))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{name!r}]", child) for name, child in itertools.islice(value.items(), _WIDTH))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((f"[{index}]", child) for index, child in enumerate(itertools.islice(value, _WIDTH)))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, FunctionType):
        yield from _held_by_function(value)
    else:
        yield from _held_by_object(value)


def _held_by_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What it closes over, its defaults, and what it uses of its module's generators and functions."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a name that is not bound yet
            yield name, cell.cell_contents
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, _GENERATORS) or (
            callable(value) and getattr(value, "__module__", "") == function.__module__
        ):
            yield name, value


def _names(code: CodeType) -> set[str]:
    """The global names that a function uses, those inside it included."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _held_by_object(value: Any) -> Iterator[tuple[str, Any]]:
    """Its attributes; of its classes the generators and the methods."""
    for name, child in getattr(value, "__dict__", {}).items():
        if not (isinstance(value, DataLoader) and name == "_iterator"):  # the pass that is running
            yield name, child
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] in ("builtins", "torch", "numpy", "random"):
            continue
        slots = getattr(kind, "__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))  # static methods, properties
            if isinstance(function, (*_GENERATORS, FunctionType)):
                yield name, function


def _obstacles(path: str, value: Any) -> Iterator[str]:
    if _is_of_the_system(value):
        yield f"{path} draws from the operating system's randomness"
    if is_running(value):
        yield f"{path} is an iterator, whose position cannot be kept"
    if isinstance(value, DataLoader) and value.num_workers and not getattr(value, "in_order", True):
        yield f"{path} gives batches in the order in which its workers end them (in_order=False)"


def _is_shared(value: object) -> bool:
    """Whether it is accelerate's state of the process, which is not the loader's."""
    return type(value).__module__ == "accelerate.state"


def _is_of_the_system(generator: object) -> bool:
    return isinstance(generator, random.SystemRandom)


def _get(generator: Any) -> Any:
    if isinstance(generator, Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _plain(_numpy_state(generator))


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(state))
    else:
        _bits(generator).state = _arrays(state)


def _numpy_state(generator: Any) -> Any:
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return _bits(generator).state


def _bits(generator: Any) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator


def _plain(state: Any) -> Any:
    """NumPy's state, arrays in it as their type and numbers, for a checkpoint takes no arrays."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, np.ndarray):
        return [str(state.dtype), state.tolist()]
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(state, dict):
        return {name: _arrays(value) for name, value in state.items()}
    return np.array(state[1], dtype=state[0]) if isinstance(state, list) else state


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(item) in (int, float) for item in value)
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "iufb")


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    return type(value) is type(other) and bool(value == other)


def _restored(present: Any, value: Any) -> Any:
    """A copy of a value that was kept, as an array where the present one is one."""
    return value.numpy().astype(present.dtype) if isinstance(present, np.ndarray) else copy.copy(value)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
