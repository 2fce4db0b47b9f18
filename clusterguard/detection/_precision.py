"""The arithmetic that a guard runs in: how far it rounds, and how to keep the hardware from rounding further."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from clusterguard.errors import ConfigurationError

_BOUNDS_UNIT = 2.0**-41  # room for the rounding of the bounds themselves, which are computed in float64
# Backends and operations for which torch has a precision. Where none is set, that of the backend's "all" holds, and
# where there is none either, the generic one; each stands behind those that it may follow.
_NAMES = (
    *(("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")),
    *(("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
)


class Arithmetic(NamedTuple):
    """How far floating-point numbers of a data type round, and where their range ends.

    Attributes:
        dtype: float32 or float64.
        unit: largest relative error of one operation, with room for bounds that are themselves computed in float64.
        largest: magnitude from which an operation is taken to overflow, with room for its intermediate results.
        smallest: more than what is lost when results below the range of numbers are replaced by 0.

    Reference:
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition (2002), sections 2.2 and 3.1.

    Example:
        >>> arithmetic = Arithmetic.of(torch.float32)
        >>> 0.99 < arithmetic.gamma(1000) / (1000 * 2**-24) < 1.01
        True
    """

    dtype: torch.dtype
    unit: float
    largest: float
    smallest: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Arithmetic":
        """The arithmetic of float32 or float64.

        Raises:
            ConfigurationError: another dtype.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(f"expected arithmetic in float32 or float64, got {dtype}")
        limits = torch.finfo(dtype)
        return cls(dtype, limits.eps / 2 + _BOUNDS_UNIT, limits.max / 64, 2.0**-96)

    def gamma(self, count: int) -> float:
        """The largest relative error of `count` operations in a row, so of a sum of `count` products in any order."""
        share = count * self.unit
        return share / (1 - share) if share < 1 else torch.inf


_lock = threading.RLock()
_restore = ExitStack()
_users = 0
if hasattr(os, "register_at_fork"):  # a fork waits until no thread switches settings, so the child can take the lock
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 in IEEE float32: no TF32, no autocast, no bfloat16 inside products, no Winograd convolution.

    PyTorch rounds the factors of convolutions on CUDA to 10 bits unless it is told otherwise, and those of matrix
    products where ``torch.set_float32_matmul_precision`` allows it. Neither a threshold nor a proof survives that. The
    settings are PyTorch's own and hold for the whole process: the first block that is entered switches them, in
    whatever thread, and the last one that is left puts them back. Inside, torch refuses to read the older
    ``torch.backends.cudnn.allow_tf32``, which has no word for it. Code that torch.compile traces is left alone.

    Returns:
        A context manager, also a decorator.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with full_precision():
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'medium'
        >>> torch.set_float32_matmul_precision("highest")
    """
    if torch.compiler.is_compiling():
        yield
        return
    _call_untraced(_enter)
    try:
        with without_autocast():
            yield
    finally:
        _call_untraced(_leave)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the weights' own precision, also inside a block of ``torch.autocast``.

    Returns:
        A context manager, also a decorator.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    with ExitStack() as blocks:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                blocks.enter_context(torch.autocast(device, enabled=False))
        yield


_disable = cache(torch.compiler.disable)


def _call_untraced(function: Callable[[], None]) -> None:
    """Call it out of sight of torch.compile, which traces what a function calls after it gave up on the function."""
    (_disable(function) if "torch._dynamo" in sys.modules else function)()


def _enter() -> None:
    global _restore, _users
    with _lock:
        if not _users:
            _restore = _switch_to_ieee()
        _users += 1


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _restore.close()


def _switch_to_ieee() -> ExitStack:
    """Switch every setting; closing what comes back restores them all, in the opposite order."""
    restore = ExitStack()
    try:
        _change(restore, torch._C._get_nnpack_enabled(), torch._C._set_nnpack_enabled, False)
        if hasattr(torch._C, "_get_fp32_precision_getter"):
            _switch_by_name(restore)
        else:  # torch 2.6 to 2.8
            _change(restore, torch._C._get_cudnn_allow_tf32(), torch._C._set_cudnn_allow_tf32, False)
            _change(restore, torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision, "highest")
    except BaseException:
        restore.close()
        raise
    return restore


def _change(restore: ExitStack, before: object, write: Callable[..., object], value: object) -> None:
    restore.callback(write, before)
    write(value)


def _switch_by_name(restore: ExitStack) -> None:
    """Write no more than it takes: what only follows another setting, as most do, has to go on following it."""
    for name in _NAMES:
        if _get(name) != "ieee":  # so it is set itself, for all that it could follow is "ieee" by now
            _change(restore, _get(name), partial(_set, name), "ieee")
    if torch.get_float32_matmul_precision() != "highest":  # it writes two of the others, and must not contradict them
        for name in (("cuda", "matmul"), ("mkldnn", "matmul")):
            restore.callback(_set, name, _get_alone(name))
        _change(restore, torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision, "highest")


def _get_alone(name: tuple[str, str]) -> str:
    """What is set under the name itself, "none" where it follows the same backend's "all", or that the generic one."""
    backend = (name[0], "all")
    _set(_NAMES[0], "none")
    for_backend = _get(backend)
    _set(backend, "none")
    value = _get(name)
    _set(backend, for_backend)
    _set(_NAMES[0], "ieee")
    return value


def _get(name: tuple[str, str]) -> str:
    value: str = torch._C._get_fp32_precision_getter(*name)
    return value


def _set(name: tuple[str, str], value: str) -> None:
    torch._C._set_fp32_precision_setter(*name, value)
