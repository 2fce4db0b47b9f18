"""Tells code that is traced for a graph from code that runs, also while another thread exports."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

_exporting: set[int] = set()  # threads that export; torch tells only that some thread of the process does


def is_traced() -> bool:
    """Whether `torch.compile` or `torch.export` is tracing this call for a graph.

    Example:
        >>> is_traced()
        False
    """
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and not _is_exported_elsewhere())


def _is_exported_elsewhere() -> bool:
    return bool(_exporting) and threading.get_ident() not in _exporting


@contextmanager
def tracing_in_this_thread() -> Iterator[None]:
    """Note that an export of this thread begins. Calls in other threads are not traced by it."""
    begun = {threading.get_ident()} - _exporting  # nothing, within an export of the same thread
    _exporting.update(begun)
    try:
        yield
    finally:
        _exporting.difference_update(begun)


_disable = cache(torch.compiler.disable)


def call_untraced(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call a function that `torch.compile` must not compile, as it would also where it gave up on the caller.

    Args:
        function: function to call.
        *args: its positional arguments.
        **kwargs: its keyword arguments.
    """
    # Without torch's compiler, which takes seconds to import, nothing is compiled. While another thread exports,
    # torch.compiler.disable looks for the graph of that export, and fails.
    if "torch._dynamo" not in sys.modules or (not torch.compiler.is_dynamo_compiling() and _is_exported_elsewhere()):
        return function(*args, **kwargs)
    untraced: Callable[_P, _R] = _disable(function)
    return untraced(*args, **kwargs)
