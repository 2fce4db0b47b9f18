"""Keeps memory that is freed, because every step of an attack or of a training asks for the same sizes again."""

import ctypes
import os
import sys

_NEVER_TRIM = (-1, -1)  # M_TRIM_THRESHOLD of malloc.h, and the value that switches trimming off
_MAP_NOTHING = (-4, 0)  # M_MMAP_MAX: no block is mapped from the system and unmapped when it is freed
_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let the C library keep memory that is freed, for the rest of this process.

    By default it hands large blocks back to the system at once, and the system clears them page by page whenever they
    are asked for again. Networks on a CPU spend up to a quarter of their time there. The process keeps the memory of
    its peak instead.

    Returns:
        Whether the C library was set. It is not if it is no glibc, or if the environment has settings of its own for
        it.

    Reference:
        The manual page mallopt(3).

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(*_NEVER_TRIM), mallopt(*_MAP_NOTHING)])
