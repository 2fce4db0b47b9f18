"""The arithmetic of a guard: how far it rounds, and how to keep the hardware from rounding further."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from clusterguard._support import ProcessSwitch, call_untraced
from clusterguard.errors import ConfigurationError

_BOUNDS_UNIT = 2.0**-41  # room for the rounding of the bounds themselves, which are computed in float64
# Backends and operations for which torch has a precision setting. An operation without a setting follows the "all" of
# its backend, and an "all" without a setting follows the generic one. Each name stands after those it may follow.
_NAMES = (
    *(("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")),
    *(("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
)


class Arithmetic(NamedTuple):
    """How far floating-point numbers of a data type round, and where their range ends.

    Attributes:
        dtype: data type, float32 or float64.
        unit: largest relative error of one operation, with room for bounds that are themselves computed in float64.
        largest: magnitude from which an operation is assumed to overflow, with room for its intermediate results.
        smallest: upper bound of the error that arises when a result below the range of numbers is replaced by 0.

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
            ConfigurationError: it is another dtype.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(f"expected arithmetic in float32 or float64, got {dtype}")
        limits = torch.finfo(dtype)
        return cls(dtype, limits.eps / 2 + _BOUNDS_UNIT, limits.max / 64, 2.0**-96)

    def gamma(self, count: int) -> float:
        """The largest relative error of `count` operations in a row, and of a sum of `count` products in any order."""
        share = count * self.unit
        return share / (1 - share) if share < 1 else torch.inf


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 in IEEE float32: no TF32, no autocast, no bfloat16 inside products, no Winograd convolution.

    By default PyTorch rounds the factors of convolutions on CUDA to 10 bits, and also those of matrix products if
    ``torch.set_float32_matmul_precision`` allows it. Such rounding invalidates thresholds and proofs.

    The settings belong to PyTorch and hold for the whole process. The first block that any thread enters switches
    them, and the last block that is left restores them. A function that torch.compile meets with such a block runs as
    it is written, and those that are called in the block are compiled; with ``fullgraph=True`` torch refuses it.

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
    call_untraced(_ieee.enter)
    try:
        with without_autocast():
            yield
    finally:
        call_untraced(_ieee.leave)


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


def _switch_to_ieee() -> Callable[[], None]:
    """Switch every setting. The returned function restores them all in the opposite order."""
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
    return restore.close


_ieee = ProcessSwitch(_switch_to_ieee)


def _change(restore: ExitStack, before: object, write: Callable[..., object], value: object) -> None:
    restore.callback(write, before)
    write(value)


def _switch_by_name(restore: ExitStack) -> None:
    """Change only the generic setting, and those that are set explicitly.

    The others inherit theirs from a parent setting, and must go on doing so.
    """
    allows_tf32 = _allows_tf32()
    for name in _NAMES:
        if _get(name) != "ieee":  # so it has a value of its own, because all that it could follow is "ieee" by now
            _change(restore, _get(name), partial(_set, name), "ieee")
    if torch.get_float32_matmul_precision() != "highest":  # it writes the two settings below, which must agree
        for name in (("cuda", "matmul"), ("mkldnn", "matmul")):
            restore.callback(_set, name, _get_alone(name))
        _change(restore, torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision, "highest")
    if allows_tf32:  # likewise; torch's exporters read this flag in other threads, which raises where they disagree
        for name in (("cuda", "conv"), ("cuda", "rnn")):
            restore.callback(_set, name, _get_alone(name))
        _change(restore, True, torch._C._set_cudnn_allow_tf32, False)


def _allows_tf32() -> bool:
    """The older flag of cuDNN; False where it contradicts the settings by name, for then torch refuses to read it."""
    try:
        return torch._C._get_cudnn_allow_tf32()
    except RuntimeError:
        return False


def _get_alone(name: tuple[str, str]) -> str:
    """The value that is set under the name itself; "none" if it follows its backend's "all" or the generic setting."""
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
