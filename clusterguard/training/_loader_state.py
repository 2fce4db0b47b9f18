"""The state that loaders and modules keep outside of state dicts, such as random generators and counters."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from types import FunctionType
from typing import Any

from clusterguard._support import GENERATORS, attributes_of, custom_classes, is_user_module, reachable
from clusterguard.detection._internal import is_one_pass_iterator
from clusterguard.errors import PersistenceError
from clusterguard.training._kept_values import copy_value, is_same, is_value, replace_value, restore_value
from clusterguard.training._random_generators import get_state, is_of_the_system, kind_of, make_generator, set_state
from torch import nn
from torch.utils.data import DataLoader, Sampler

_LARGEST = 10_000  # largest number of elements of a value outside samplers, so that images are not copied
_CLASS = "class "  # prefix of a class name in paths
_NOTHING = object()
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


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
        >>> from torch import Generator
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
        return [reason for path, value in reachable(self._loader, self._name) for reason in _obstacles(path, value)]

    def get(self) -> dict[str, Any]:
        """The present state, as numbers, strings, tensors, and lists and dicts of them."""
        search = self._search = _Search(self._loader, self._name)
        generators = search.generators
        return {
            "generators": {path: get_state(generator) for path, generator in generators.items()},
            "made": {
                path: kind_of(generator)
                for path, generator in generators.items()
                if path not in self._generators_at_first
            },
            "values": search.values(),
            "names": {path: list(attributes_of(owner)) for path, owner in search.owners.items()},
        }

    def changed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state that `get` returned without the values that never changed, for a checkpoint.

        A setting of the loader that never changes, such as a folder's name, may then differ when a training resumes.
        """
        now = self._search.values()
        values = {
            path: value
            for path, value in state["values"].items()
            if not is_same(value, self._first.get(path)) or not is_same(now.get(path), self._first.get(path))
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
                set_state(search.generators[path], generator_state)


class _Search:
    """The generators, and the objects with attributes, that a loader holds at this moment, by their paths."""

    def __init__(self, loader: object, name: str) -> None:
        self.generators: dict[str, Any] = {}
        self.owners: dict[str, Any] = {}
        classes: set[type] = set()
        for path, value in reachable(loader, name):
            if isinstance(value, GENERATORS):
                if not is_of_the_system(value):
                    self.generators[path] = value
            elif not isinstance(value, FunctionType) and _has_attributes(value) and not _is_shared(value):
                self.owners[path] = value
                new = {kind for kind in custom_classes(value) if is_user_module(kind.__module__)} - classes
                self.owners |= {f"{path}.{_CLASS}{kind.__name__}": kind for kind in new}
                classes |= new

    def values(self) -> dict[str, Any]:
        """Copies of all values that may change, by path."""
        return {
            f"{path}.{name}": copy_value(value)
            for path, owner in self.owners.items()
            for name, value in (_outside_state_dict if isinstance(owner, nn.Module) else attributes_of)(owner).items()
            if is_value(value, limit=None if isinstance(owner, Sampler | nn.Module) else _LARGEST)
        }

    def put(self, path: str, value: Any) -> None:
        """Restore an attribute; a container changes in place, because other objects may hold it too."""
        where, _, name = path.rpartition(".")
        if where not in self.owners:
            return
        owner = self.owners[where]
        present = getattr(owner, name, _NOTHING)
        if isinstance(present, GENERATORS):
            if value is None:
                setattr(owner, name, None)  # the loader will make a new one
                self.generators.pop(path, None)
        elif present is _NOTHING or (is_value(present, limit=None) and not is_same(copy_value(present), value)):
            replace_value(owner, name, present, restore_value(value))

    def forget(self, path: str, names: Collection[str]) -> None:
        """Delete the attributes that an object did not have yet, if they are generators or values."""
        owner = self.owners.get(path)
        for name, value in list(attributes_of(owner).items()) if owner is not None else []:
            if name not in names and (isinstance(value, GENERATORS) or is_value(value, limit=_LARGEST)):
                delattr(owner, name)
                self.generators.pop(f"{path}.{name}", None)

    def make(self, path: str, kind: str) -> None:
        """Make a generator that the loader would itself make in its first pass."""
        where, _, name = path.rpartition(".")
        if where in self.owners and not name.endswith("]"):
            self.generators[path] = make_generator(kind)
            setattr(self.owners[where], name, self.generators[path])
        else:
            warnings.warn(
                f"the training will not be the same as without the interruption, because the generator {path} cannot "
                "be restored; make it in __init__, as an attribute of the data set",
                stacklevel=2,
            )


def _has_attributes(value: object) -> bool:
    return hasattr(value, "__dict__") or any(hasattr(kind, "__slots__") for kind in custom_classes(value))


def _outside_state_dict(module: nn.Module) -> dict[str, Any]:
    """The attributes and buffers of a module that its state dict leaves out, by name."""
    attributes = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return attributes | {name: getattr(module, name) for name in vars(module).get("_non_persistent_buffers_set", ())}


def _obstacles(path: str, value: Any) -> Iterator[str]:
    if is_of_the_system(value):
        yield f"{path} draws from the operating system's randomness"
    if is_one_pass_iterator(value):
        yield f"{path} is an iterator, whose position cannot be kept"
    if isinstance(value, DataLoader) and value.num_workers and not getattr(value, "in_order", True):
        yield f"{path} gives batches in the order in which its workers finish them (in_order=False)"


def _is_shared(value: object) -> bool:
    """Whether a value is accelerate's state of the process, which does not belong to the loader."""
    return type(value).__module__ == "accelerate.state"


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
