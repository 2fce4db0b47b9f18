"""Train and eval mode, switched through the modules' own methods, restored one by one, and safe between threads."""

import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from clusterguard.errors import ConfigurationError, in_one_line
from torch import nn

# Several threads may read one module. The first one puts it into eval mode, and the last one to leave restores it.
_lock = threading.RLock()
_is_left = threading.Condition(_lock)  # a thread has left a module
_trained: dict[nn.Module, int] = {}  # modules in train mode, and the thread that trains them
_readers: dict[nn.Module, int] = {}
_to_restore: dict[nn.Module, None] = {}  # modules that were in train mode before anybody read them
_this_thread = threading.local()  # the modules that this thread reads; a forked child has no other thread


@contextmanager
def evaluation_mode(*candidates: object) -> Iterator[None]:
    """Put every `nn.Module` among the candidates into eval mode, and restore the mode of each submodule afterwards.

    Restoring with ``model.train()`` would also unfreeze a BatchNorm that its owner had frozen, so each submodule gets
    back its own mode. A module that overrides `train` or `eval`, for instance to swap its graph, is switched by these
    methods. If several threads use a module in this way, it stays in eval mode until the last of them has left.

    Args:
        *candidates: objects of any type. Those that are no modules are ignored.

    Raises:
        ConfigurationError: another thread trains one of the modules, whose layers can be in one mode at a time only; or
            a module's own `train` or `eval` raises an error.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout())
        >>> with evaluation_mode(model):
        ...     [module.training for module in model]
        [False, False]
        >>> [module.training for module in model]
        [False, True]
    """
    roots = [candidate for candidate in candidates if isinstance(candidate, nn.Module)]
    if torch.compiler.is_compiling() and not any(module.training for root in roots for module in root.modules()):
        yield  # traced code cannot take a lock, and no mode has to change
        return
    modules = dict.fromkeys(module for root in roots for module in root.modules())
    read_here: list[dict[nn.Module, None]] = vars(_this_thread).setdefault("read", [])
    with _lock:
        if any(_trained.get(module, threading.get_ident()) != threading.get_ident() for module in modules):
            raise ConfigurationError(
                "another thread trains this module, so it cannot be in eval mode; use a copy, made by copy.deepcopy"
            )
        read_here.append(modules)
        for module in modules:
            _readers[module] = _readers.get(module, 0) + 1
            if module.training:
                _to_restore[module] = None
    try:
        with _lock:
            _set_mode(modules, training=False)
        yield
    finally:
        with _lock:
            read_here.remove(modules)
            for module in modules:
                _readers[module] -= 1
                if not _readers[module]:
                    del _readers[module]
            _is_left.notify_all()
            _restore()


def _restore() -> None:
    """Put modules that no thread reads any more back into train mode."""
    restored = dict.fromkeys(module for module in _to_restore if _may_change(module))
    for module in restored:
        del _to_restore[module]
    _set_mode(restored, training=True)


def _forget_other_threads() -> None:
    """Drop the readers of other threads in a forked child, where only the forking thread goes on. It holds the lock."""
    try:
        _readers.clear()
        for module in [module for module, thread in _trained.items() if thread != threading.get_ident()]:
            del _trained[module]
        for modules in vars(_this_thread).get("read", []):
            for module in modules:
                _readers[module] = _readers.get(module, 0) + 1
        _restore()
    finally:
        _lock.release()


if hasattr(os, "register_at_fork"):  # a fork waits until no thread is in the middle of a change
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget_other_threads)


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
    with _lock:
        _claim(parts.values())
        _switch(module, training=True)
        _set_mode({parts[name] for name in frozen}, training=False)
    try:
        yield
    finally:
        with _lock:
            for part in parts.values():
                _trained.pop(part, None)
            to_eval_mode(module)


def _claim(modules: Collection[nn.Module]) -> None:
    """Mark modules as trained by this thread, and wait until no other thread reads them. The lock is held."""
    this = threading.get_ident()
    if any(_trained.get(module, this) != this for module in modules):
        raise ConfigurationError("another thread trains this module; train a copy, as copy.deepcopy makes one")
    _trained.update(dict.fromkeys(modules, this))
    read_here = [module for reads in vars(_this_thread).get("read", []) for module in reads]
    while any(_readers.get(module, 0) > read_here.count(module) for module in modules):
        _is_left.wait()


def to_eval_mode(module: nn.Module) -> None:
    """Put a module and all its submodules into eval mode permanently."""
    _set_mode(dict.fromkeys(module.modules()), training=False)


def names_in_eval_mode(module: nn.Module) -> frozenset[str]:
    """The names of those submodules that are in eval mode, as `named_modules` gives them."""
    return frozenset(name for name, part in module.named_modules() if not part.training)


def _set_mode(modules: Collection[nn.Module], *, training: bool) -> None:
    """Switch the given modules through their own methods, parents first. Other submodules keep their mode."""
    for module in modules:
        if module.training == training:
            continue
        if _overrides_mode_methods(module):
            before = {part: part.training for part in module.modules() if part not in modules}
            _switch(module, training=training)
            _set_mode({part for part, mode in before.items() if part.training != mode}, training=not training)
        module.training = training  # the module's own method may have left the flag as it was


def _switch(module: nn.Module, *, training: bool) -> None:
    """Call the module's own `train` or `eval`."""
    try:
        module.train() if training else module.eval()
    except Exception as error:  # a method of the user's may raise anything
        name = "train" if training else "eval"
        raise ConfigurationError(
            f"expected a module whose train() and eval() can be called, got {type(module).__name__}, whose {name}() "
            f"raised {in_one_line(error)}; let it switch its layers"
        ) from error


def _overrides_mode_methods(module: nn.Module) -> bool:
    """Whether a module overrides `train` or `eval`, which may then do more than set flags."""
    methods = (module.train, nn.Module.train), (module.eval, nn.Module.eval)
    return any(getattr(method, "__func__", None) is not usual for method, usual in methods)


def _may_change(module: nn.Module) -> bool:
    """Whether no thread reads a module, nor a submodule that the module's own `train` or `eval` would switch too."""
    if module in _readers:
        return False
    return not _overrides_mode_methods(module) or not any(part in _readers for part in module.modules())
