"""Settings of the whole process that several threads change together."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


class ProcessSwitch:
    """Holds a setting of the process changed while at least one thread needs it changed.

    The first thread that enters changes the setting, and the last one that leaves restores it.

    Args:
        change: function that changes the setting, and returns a function that restores it.

    Example:
        >>> setting = {"precision": "medium"}
        >>> def raise_precision():
        ...     setting["precision"] = "highest"
        ...     return lambda: setting.update(precision="medium")
        >>> switch = ProcessSwitch(raise_precision)
        >>> with switch.on(), switch.on():
        ...     setting["precision"]
        'highest'
        >>> setting["precision"]
        'medium'
    """

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change = change
        self._lock = threading.RLock()
        self._users = 0
        self._restore: Callable[[], object]
        # A fork waits until no thread switches, so that the child can take the lock.
        if hasattr(os, "register_at_fork"):
            release = self._lock.release
            os.register_at_fork(before=self._lock.acquire, after_in_parent=release, after_in_child=release)

    @contextmanager
    def on(self) -> Iterator[None]:
        """A block in which the setting is changed."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Begin a block. If the change fails, the block has not begun."""
        with self._lock:
            if not self._users:
                self._restore = self._change()
            self._users += 1

    def leave(self) -> None:
        """End a block that `enter` began."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._restore()


def _ignore_warnings() -> Callable[[], object]:
    """Ignore all warnings, and return what gives them back."""
    block = warnings.catch_warnings(action="ignore")
    block.__enter__()
    return partial(block.__exit__, None, None, None)


no_warnings = ProcessSwitch(_ignore_warnings)
"""Ignores other libraries' warnings. `warnings.catch_warnings` would ignore them for good if two threads overlap."""
