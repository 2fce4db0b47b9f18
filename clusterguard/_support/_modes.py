"""Reading modules in eval mode and training them in train mode, without threads in each other's way."""

import itertools
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from clusterguard._support._eval_views import view_in_eval_mode
from clusterguard._support._mode_flags import set_mode, switch, to_eval_mode
from clusterguard._support._tracing import is_traced
from clusterguard.errors import ConfigurationError
from torch import nn

Readable = TypeVar("Readable")

# Modules in eval mode are read as they are, and whoever wants to put them into train mode waits for their readers.
_lock = threading.RLock()
_is_left = threading.Condition(_lock)  # a thread has left a module
_trained: dict[nn.Module, int] = {}  # modules that one thread alone uses, and that thread
_readers: dict[nn.Module, int] = {}
_wanted: dict[nn.Module, int] = {}  # modules that threads wait for, to put them into train mode
_this_thread = threading.local()  # the modules that this thread reads; a forked child has no other thread


@contextmanager
def evaluation_mode(candidate: Readable) -> Iterator[Readable]:
    """Give what is to be read in eval mode: a module as it is, or a view of it if a part of it is in train mode.

    A view is a copy in eval mode that shares parameters. So reading never changes the mode of a module that
    others may use. Only a thread that trains a module with `training_mode` switches it, because no other thread reads
    it then. What the module notes on itself while a view is read is lost.

    Args:
        candidate: object of any type. One that is no module is given back.

    Yields:
        The candidate or its view.

    Raises:
        ConfigurationError: another thread trains the module; no view of it can be made; a part was put into train mode
            while it was read; weights or buffers changed while a view was read; or a module's own `train` or `eval`
            raises an error.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout())
        >>> with evaluation_mode(model) as view:
        ...     [module.training for module in view], [module.training for module in model]
        ([False, False], [False, True])
    """
    if not isinstance(candidate, nn.Module):
        yield candidate
        return
    modules = dict.fromkeys(candidate.modules())
    if is_traced() and not any(module.training for module in modules):
        yield candidate  # traced code cannot take a lock, and no mode has to change
        return
    with _lock:
        _refuse_if_trained_elsewhere(modules)
        is_own = any(module in _trained for module in modules)
        is_direct = not is_own and not any(map(_needs_view, modules))
        versions = [] if is_own or is_direct else _versions(candidate)
        read: Any = candidate if is_own or is_direct else view_in_eval_mode(candidate)
        if is_direct:
            _enter(modules)
    if is_own:
        with _switched(modules):
            yield candidate
    elif is_direct:
        try:
            yield candidate
        finally:
            _leave(modules)
        if any(module.training for module in modules):
            raise ConfigurationError(
                f"a part of this {type(candidate).__name__} was put into train mode while it was read, so the result "
                "may be wrong; call train() of the whole detector, which waits for its readers, or train a copy, made "
                "by copy.deepcopy"
            )
    else:
        yield read
        if versions != _versions(candidate):
            raise ConfigurationError(
                f"weights or buffers of this {type(candidate).__name__} changed while it was read, so the result may "
                "belong to no state of it; read a copy, made by copy.deepcopy between two steps of the training"
            )


def _needs_view(module: nn.Module) -> bool:
    """Whether a module is in train mode, or another thread waits to put it there. The lock is held."""
    return module.training or (module in _wanted and not _read_here(module))


def _enter(modules: dict[nn.Module, None]) -> None:
    vars(_this_thread).setdefault("read", []).append(modules)
    for module in modules:
        _readers[module] = _readers.get(module, 0) + 1


def _leave(modules: dict[nn.Module, None]) -> None:
    with _lock:
        _this_thread.read.remove(modules)
        for module in modules:
            _readers[module] -= 1
            if not _readers[module]:
                del _readers[module]
        _is_left.notify_all()


def _read_here(module: nn.Module) -> int:
    """How often this thread reads a module at present."""
    return sum(module in modules for modules in vars(_this_thread).get("read", []))


@contextmanager
def _switched(modules: dict[nn.Module, None]) -> Iterator[None]:
    """Put modules that no other thread uses into eval mode, and restore the mode of each afterwards.

    Restoring with ``model.train()`` would also unfreeze a BatchNorm that its owner had frozen.
    """
    before = dict.fromkeys(module for module in modules if module.training)
    try:
        set_mode(modules, training=False)
        yield
    finally:
        set_mode(before, training=True)


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Which parameters and buffers a module has, and how often each has been changed in place."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return [(id(tensor), tensor._version) for tensor in tensors if not tensor.is_inference()]


def _forget_other_threads() -> None:
    """Drop the readers of other threads in a forked child, where only the forking thread goes on. It holds the lock."""
    try:
        _readers.clear()
        _wanted.clear()
        for module in [module for module, thread in _trained.items() if thread != threading.get_ident()]:
            del _trained[module]
        for modules in vars(_this_thread).get("read", []):
            for module in modules:
                _readers[module] = _readers.get(module, 0) + 1
    finally:
        _lock.release()


if hasattr(os, "register_at_fork"):  # a fork waits until no thread is in the middle of a change
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget_other_threads)


def train_when_unread(module: nn.Module, mode: bool) -> None:
    """Call `nn.Module.train`; for train mode, wait until no other thread reads the module in eval mode.

    Threads that begin to read in the meantime read a view. There is no wait in a thread that reads the detector itself.

    Raises:
        ConfigurationError: another thread trains the module.
    """
    parts = dict.fromkeys(module.modules())
    with _lock:
        _refuse_if_trained_elsewhere(parts)
        if mode and not any(map(_read_here, parts)):
            _wait_for_readers(parts)
        nn.Module.train(module, mode)


@contextmanager
def sole_use(module: nn.Module) -> Iterator[None]:
    """Let this thread alone use a module. It waits for other threads that read, and they cannot read it meanwhile.

    Raises:
        ConfigurationError: another thread trains the module.
    """
    modules = [part for part in dict.fromkeys(module.modules()) if _trained.get(part) != threading.get_ident()]
    try:
        with _lock:
            _refuse_if_trained_elsewhere(modules)
            _trained.update(dict.fromkeys(modules, threading.get_ident()))
            _wait_for_readers(modules)
        yield
    finally:
        with _lock:
            for part in modules:
                if _trained.get(part) == threading.get_ident():
                    del _trained[part]


@contextmanager
def training_mode(module: nn.Module, *, frozen: Collection[str] = ()) -> Iterator[None]:
    """Put a module into train mode, except for its frozen parts, and put all of it into eval mode afterwards.

    This waits until no other thread reads the module, and other threads cannot read it in the meantime.

    Args:
        module: module whose parts are switched.
        frozen: names of submodules that stay in eval mode, as `names_in_eval_mode` gives them.

    Raises:
        ConfigurationError: no submodule has one of the names, another thread trains the module, or its own `train` or
            `eval` raises an error.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
        >>> with training_mode(model, frozen={"0"}):
        ...     [module.training for module in model]
        [False, True]
        >>> [module.training for module in model]
        [False, False]
    """
    parts = dict(module.named_modules())
    unknown = sorted(set(frozen) - set(parts))
    if unknown:
        raise ConfigurationError(
            f"expected frozen to hold names of submodules of {type(module).__name__}, got {unknown[0]!r}, which is not "
            "one; set detector.frozen to names that named_modules() gives, or to set() to freeze none"
        )
    with sole_use(module):
        try:
            switch(module, training=True)
            set_mode({parts[name] for name in frozen}, training=False)
            yield
        finally:
            to_eval_mode(module)


def _refuse_if_trained_elsewhere(modules: Collection[nn.Module]) -> None:
    """Refuse modules that another thread trains. The lock is held."""
    this = threading.get_ident()
    if any(_trained.get(module, this) != this for module in modules):
        raise ConfigurationError(
            "another thread trains this module, so it cannot be read, trained or switched meanwhile; use a copy, made "
            "by copy.deepcopy before the training"
        )


def _wait_for_readers(modules: Collection[nn.Module]) -> None:
    """Wait until no other thread reads the modules. The lock is held, and released while this waits."""
    for module in modules:
        _wanted[module] = _wanted.get(module, 0) + 1
    try:
        while any(_readers.get(module, 0) > _read_here(module) for module in modules):
            _is_left.wait()
    finally:
        for module in modules:
            _wanted[module] = _wanted.get(module, 1) - 1
            if not _wanted[module]:
                del _wanted[module]
