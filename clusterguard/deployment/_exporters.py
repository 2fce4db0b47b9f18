"""Contexts for calls of torch's exporters, which handle their warnings, their output and their errors."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from clusterguard.detection._internal import without_autocast
from clusterguard.errors import ConfigurationError, in_one_line


@contextmanager
def quiet() -> Iterator[None]:
    """Disable autocast, whose casts would become part of the graph, and warnings of exporters about their own code."""
    with warnings.catch_warnings(), without_autocast():
        warnings.simplefilter("ignore")
        yield


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
    """Enter `quiet` and `_silent`, and turn an exporter's error into one of clusterguard."""
    with quiet(), _silent():
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the errors of torch's exporters have no common base class
            raise ConfigurationError(
                "expected a network that torch.export can follow for any number of images, got one that it cannot; "
                f"use plain modules, without TorchScript or branches on images. What went wrong: {in_one_line(error)}"
            ) from error
