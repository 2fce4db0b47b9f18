"""The state that loaders and modules keep outside of state dicts, such as random generators and counters."""

import dis
import functools
import itertools
import math
import random
import sys
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from clusterguard.detection import is_one_pass_iterator
from clusterguard.errors import PersistenceError
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

_DEPTH, _WIDTH, _MOST = 12, 256, 50_000  # limits of the search, which must end even in a data set of a million files
_GENERATORS = (Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_LARGEST = 10_000  # largest number of elements of a value outside samplers, so that images are not copied
_LIBRARIES = ("builtins", "torch", "numpy", "random", "torchvision", "accelerate")
_KINDS = "iufbc"  # kinds of NumPy types that are numbers
_CLASS = "class "  # prefix of a class name in paths
_NOTHING = object()
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SCALARS = (bool, int, float, str, type(None))
_LEAVES = (*_SCALARS, bytes, complex, type, ModuleType, BuiltinFunctionType, PurePath, np.generic)


class LoaderState:
    """Finds the state that a loader keeps from pass to pass, copies it, and restores it.

    Each call searches the attributes of the loader, its sampler, its data set, their classes, functions and so on. The
    state consists of the generators of torch, NumPy and Python, and of values that changed since the first search. A
    value is a number, a string, a tensor, an array or a container of these; outside samplers it has at most 10,000
    elements.

    Args:
        loader: loader of any kind, or a dict of modules by name. The state of a module consists of its attributes and
            buffers that are in no state dict.
        name: name of the loader in messages.

    Example:
        >>> from torch.utils.data import RandomSampler
        >>> sampler = RandomSampler(range(100), generator=Generator().manual_seed(0))
        >>> state = LoaderState(sampler)
        >>> before, first = state.get(), list(sampler)
        >>> state.set(before)
        >>> list(sampler) == first
        True
    """

    def __init__(self, loader: object, *, name: str = "loader") -> None:
        self._loader, self._name = loader, name
        self._search = _Search(loader, name)  # the latest one
        self._first, self._generators_at_first = self._search.values(), set(self._search.generators)

    @property
    def obstacles(self) -> list[str]:
        """Known reasons why the loader's state cannot be restored, in words; empty if there are none."""
        return [reason for path, value in _reachable(self._loader, self._name) for reason in _obstacles(path, value)]

    def get(self) -> dict[str, Any]:
        """The present state, as numbers, strings, tensors, and lists and dicts of them."""
        search = self._search = _Search(self._loader, self._name)
        generators = search.generators
        return {
            "generators": {path: _get(generator) for path, generator in generators.items()},
            "made": {
                path: _kind(generator)
                for path, generator in generators.items()
                if path not in self._generators_at_first
            },
            "values": search.values(),
            "names": {path: list(_attributes(owner)) for path, owner in search.owners.items()},
        }

    def changed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state that `get` returned without the values that never changed, for a checkpoint.

        A setting of the loader that never changes, such as a folder's name, may then differ when a training resumes.
        """
        now = self._search.values()
        values = {
            path: value
            for path, value in state["values"].items()
            if not _is_same(value, self._first.get(path)) or not _is_same(now.get(path), self._first.get(path))
        }
        return {"generators": state["generators"], "made": state["made"], "values": values}

    def set(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `get` or `changed` returned.

        Raises:
            PersistenceError: the state belongs to another loader.

        Warns:
            UserWarning: a generator that the loader makes during a pass cannot be restored.
        """
        search, made = _Search(self._loader, self._name), state.get("made", {})
        missing = set(state["generators"]) - set(search.generators)
        if missing - set(made) or (search.generators.keys() & self._generators_at_first) - state["generators"].keys():
            raise PersistenceError(
                f"expected a {self._name} with the generators that it had when it was interrupted "
                f"({_listed(state['generators'])}), got one with {_listed(search.generators)}"
            )
        for path, names in state.get("names", {}).items():
            search.forget(path, names)
        for path, value in sorted(state["values"].items(), key=lambda item: _CLASS not in item[0]):  # classes first
            search.put(path, value)
        for path in sorted(missing):
            search.make(path, made[path])
        for path, generator_state in state["generators"].items():
            if path in search.generators:
                _set(search.generators[path], generator_state)


class _Search:
    """The generators, and the objects with attributes, that a loader holds at this moment, by their paths."""

    def __init__(self, loader: object, name: str) -> None:
        self.generators: dict[str, Any] = {}
        self.owners: dict[str, Any] = {}
        classes: set[type] = set()
        for path, value in _reachable(loader, name):
            if isinstance(value, _GENERATORS):
                if not _is_of_the_system(value):
                    self.generators[path] = value
            elif not isinstance(value, FunctionType) and _has_attributes(value) and not _is_shared(value):
                self.owners[path] = value
                new = {kind for kind in _custom_classes(value) if _is_user_module(kind.__module__)} - classes
                self.owners |= {f"{path}.{_CLASS}{kind.__name__}": kind for kind in new}
                classes |= new

    def values(self) -> dict[str, Any]:
        """Copies of all values that may change, by path."""
        return {
            f"{path}.{name}": _kept(value)
            for path, owner in self.owners.items()
            for name, value in (_outside_state_dict if isinstance(owner, nn.Module) else _attributes)(owner).items()
            if _is_state(value, limit=None if isinstance(owner, Sampler | nn.Module) else _LARGEST)
        }

    def put(self, path: str, value: Any) -> None:
        """Restore an attribute; a container changes in place, because other objects may hold it too."""
        where, _, name = path.rpartition(".")
        if where not in self.owners:
            return
        owner = self.owners[where]
        present = getattr(owner, name, _NOTHING)
        if isinstance(present, _GENERATORS):
            if value is None:
                setattr(owner, name, None)  # the loader will make a new one
                self.generators.pop(path, None)
        elif present is _NOTHING or (_is_state(present, limit=None) and not _is_same(_kept(present), value)):
            _replace(owner, name, present, _restored(value))

    def forget(self, path: str, names: Collection[str]) -> None:
        """Delete the attributes that an object did not have yet, if they are generators or values."""
        owner = self.owners.get(path)
        for name, value in list(_attributes(owner).items()) if owner is not None else []:
            if name not in names and (isinstance(value, _GENERATORS) or _is_state(value, limit=_LARGEST)):
                delattr(owner, name)
                self.generators.pop(f"{path}.{name}", None)

    def make(self, path: str, kind: str) -> None:
        """Make a generator that the loader would itself make in its first pass."""
        where, _, name = path.rpartition(".")
        if where in self.owners and not name.endswith("]"):
            self.generators[path] = _make_generator(kind)
            setattr(self.owners[where], name, self.generators[path])
        else:
            warnings.warn(
                f"the training will not be the same as without the interruption, because the generator {path} cannot "
                "be restored; make it in __init__, as an attribute of the data set",
                stacklevel=2,
            )


def _reachable(root: object, name: str) -> Iterator[tuple[str, Any]]:
    """All objects that a loader holds, each once, with their paths; breadth first, with large containers last."""
    queue, visited = deque([(name, root, 0)]), {id(root): root}
    rest: deque[tuple[str, Iterator[tuple[str, Any]], int]] = deque()  # remaining elements of large containers
    while queue or rest:
        if queue:
            path, value, depth = queue.popleft()
            yield path, value
            if depth == _DEPTH or isinstance(value, _GENERATORS):
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
        if isinstance(value, ModuleType) and _is_user_module(value.__name__):
            held = {f"{name}.{attribute}": vars(value)[attribute] for attribute in attributes & vars(value).keys()}
        else:
            held = {name: value}
        yield from (
            (path, item) for path, item in held.items() if isinstance(item, _GENERATORS) or _is_user_object(item)
        )


def _is_user_object(value: object) -> bool:
    """Whether a value is a function or object from user code, or a container with generators among its first items."""
    if isinstance(value, list | tuple | dict):
        items = value.values() if isinstance(value, dict) else value
        return any(isinstance(item, _GENERATORS) for item in itertools.islice(items, _WIDTH))
    return _is_user_module(value.__module__ if isinstance(value, FunctionType) else type(value).__module__)


@functools.cache
def _is_user_module(name: str | None) -> bool:
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
    for name, child in _attributes(value).items():
        if not isinstance(child, _BaseDataLoaderIter):  # belongs to the running pass alone
            yield name, child
    for kind in _custom_classes(value):
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))  # for static methods and properties
            if isinstance(function, (*_GENERATORS, FunctionType)):
                yield name, function


def _custom_classes(value: object) -> list[type]:
    """The classes of an object that are not torch's, NumPy's or Python's."""
    return [kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] not in _LIBRARIES]


def _has_attributes(value: object) -> bool:
    return hasattr(value, "__dict__") or any(hasattr(kind, "__slots__") for kind in _custom_classes(value))


def _attributes(owner: Any) -> dict[str, Any]:
    """The attributes of an object or a class that can be set, by name."""
    if isinstance(owner, type):
        return {name: value for name, value in vars(owner).items() if not name.startswith("__")}
    slots = [vars(kind).get("__slots__", ()) for kind in _custom_classes(owner)]
    names = [name for names in slots for name in ((names,) if isinstance(names, str) else names)]
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)} | getattr(owner, "__dict__", {})


def _outside_state_dict(module: nn.Module) -> dict[str, Any]:
    """The attributes and buffers of a module that its state dict leaves out, by name."""
    attributes = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return attributes | {name: getattr(module, name) for name in vars(module).get("_non_persistent_buffers_set", ())}


def _obstacles(path: str, value: Any) -> Iterator[str]:
    if _is_of_the_system(value):
        yield f"{path} draws from the operating system's randomness"
    if is_one_pass_iterator(value):
        yield f"{path} is an iterator, whose position cannot be kept"
    if isinstance(value, DataLoader) and value.num_workers and not getattr(value, "in_order", True):
        yield f"{path} gives batches in the order in which its workers finish them (in_order=False)"


def _is_shared(value: object) -> bool:
    """Whether a value is accelerate's state of the process, which does not belong to the loader."""
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
    """The state of a NumPy generator, with arrays as type and list of numbers, because a checkpoint takes no arrays."""
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


def _replace(owner: Any, name: str, present: Any, value: Any) -> None:
    """Set an attribute, in place where possible, because other objects may hold its value too."""
    if type(present) is type(value) and isinstance(present, list | deque):
        present.clear()
        present.extend(value)
    elif type(present) is type(value) and isinstance(present, dict | set):
        present.clear()
        present.update(value)
    elif isinstance(present, np.ndarray) and np.shape(value) == present.shape and present.flags.writeable:
        present[...] = value
    else:
        setattr(owner, name, value.to(present.device) if isinstance(present, Tensor) else value)


def _kind(generator: Any) -> str:
    """A description of a generator, from which `_make_generator` makes one of the same kind."""
    if isinstance(generator, Generator):
        return f"torch {generator.device}"
    if isinstance(generator, random.Random):
        return "python"
    if isinstance(generator, np.random.RandomState):
        return f"old {generator.get_state(legacy=False)['bit_generator']}"
    return f"{'new' if isinstance(generator, np.random.Generator) else 'bits'} {type(_bits(generator)).__name__}"


def _make_generator(kind: str) -> Any:
    family, _, detail = kind.partition(" ")
    if family == "torch":
        return Generator(detail)
    if family == "python":
        return random.Random()
    bits = getattr(np.random, detail)()
    return {"old": np.random.RandomState, "new": np.random.Generator}.get(family, lambda bits: bits)(bits)


def _is_state(value: Any, *, limit: int | None) -> bool:
    """Whether a value is a number, string, tensor or array, or a container of them, of at most `limit` elements."""
    return _size(value, math.inf if limit is None else limit) >= 0


def _size(value: Any, limit: float) -> int:
    """The number of elements of a value; -1 if there are more than `limit`, or elements of other types."""
    if isinstance(value, _SCALARS) or (isinstance(value, np.generic) and value.dtype.kind in _KINDS):
        return 1
    if (isinstance(value, Tensor) and value.layout == torch.strided) or (
        isinstance(value, np.ndarray) and value.dtype.kind in _KINDS
    ):
        size = value.numel() if isinstance(value, Tensor) else value.size
        return size if size <= limit else -1
    if type(value) not in (list, tuple, dict, deque, set) or len(value) > limit:
        return -1
    total = 0
    for item in itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value:
        size = _size(item, limit - total)
        total += max(1, size)
        if size < 0 or total > limit:
            return -1
    return total


def _kept(value: Any) -> Any:
    """Copy a value for which `_is_state` is true.

    NumPy arrays, sets and other types that checkpoints cannot store become dicts that name the type.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray | np.generic):
        return {"array": torch.from_numpy(np.array(value)), "type": str(value.dtype)}
    if isinstance(value, dict):
        return {"dict": [[_kept(name), _kept(item)] for name, item in value.items()]}
    if isinstance(value, list | tuple | deque | set):
        items = [_kept(item) for item in value]
        return (
            items
            if isinstance(value, list)
            else {type(value).__name__: items, "maxlen": getattr(value, "maxlen", None)}
        )
    return value


def _restored(value: Any) -> Any:
    """The inverse of `_kept`."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return value["array"].numpy().astype(value["type"])[()]
    if "dict" in value:
        return {_restored(name): _restored(item) for name, item in value["dict"]}
    if "deque" in value:
        return deque(_restored(value["deque"]), value["maxlen"])
    return tuple(_restored(value["tuple"])) if "tuple" in value else set(_restored(value["set"]))


def _is_same(value: Any, other: Any) -> bool:
    """Whether two results of `_kept` are equal."""
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        return value.dtype == other.dtype and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_is_same(item, other[name]) for name, item in value.items())
    if isinstance(value, list):
        return len(value) == len(other) and all(map(_is_same, value, other))
    return bool(value == other)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
