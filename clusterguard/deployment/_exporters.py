"""Contexts for calls of torch's exporters, which handle their warnings, their output and their errors."""

import io
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from clusterguard._support import no_warnings, tracing_in_this_thread
from clusterguard.detection import full_precision
from clusterguard.errors import ConfigurationError, in_one_line


@contextmanager
def quiet() -> Iterator[None]:
    """Disable autocast, whose casts would become part of the graph, and warnings of exporters about their own code.

    An exporter restores the settings that it found, so they are those of a detection from before it starts until after
    it has ended. Otherwise a detection in another thread could lose them, or leave them behind.
    """
    with no_warnings.on(), full_precision():
        yield


_one_at_a_time = threading.RLock()  # exporters change settings of torch, loggers and stderr of the whole process
if hasattr(os, "register_at_fork"):  # a fork waits until no thread exports
    os.register_at_fork(
        before=_one_at_a_time.acquire, after_in_parent=_one_at_a_time.release, after_in_child=_one_at_a_time.release
    )
_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch.export")


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress the hundreds of lines that torch.export writes about a network that it cannot follow."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, _LOGGERS)]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


@contextmanager
def exporting() -> Iterator[None]:
    """Enter `quiet` and `_silent`, one thread at a time, and turn an exporter's error into one of clusterguard."""
    with _one_at_a_time, tracing_in_this_thread(), quiet(), _silent():
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the errors of torch's exporters have no common base class
            raise ConfigurationError(
                "expected a network that torch.export can follow for any number of images, got one that it cannot; "
                f"use plain modules, without TorchScript or branches on images. What went wrong: {in_one_line(error)}"
            ) from error
