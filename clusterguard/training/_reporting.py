"""Tells a person how a training goes: a line for each epoch, a bar for its steps, and how long it will take."""

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterguard._support import bar, write_line
from clusterguard.training._checkpoints import EpochRecord
from clusterguard.training._replay import Replay

if TYPE_CHECKING:
    from tqdm.auto import tqdm

_LOG = logging.getLogger("clusterguard")
_WORTH_TELLING = 10.0  # seconds


class Reporter:
    """Reports the epochs of one call of `fit`.

    Lines go to the logger "clusterguard" at level INFO if somebody has configured logging to show that, or else to
    stderr.

    Args:
        epochs: total number of epochs.
        progress: whether to write lines to stderr if nobody listens to the logger, and to show bars.
        is_main: whether this process is the one that writes.
    """

    def __init__(self, epochs: int, *, progress: bool, is_main: bool) -> None:
        self.epochs, self.progress, self.is_main = epochs, progress and is_main, is_main
        self._steps, self._last = 0, 0.0

    def say(self, text: str) -> None:
        """Write a line."""
        if _is_heard():
            if self.is_main:
                _LOG.info(text)
        elif self.progress:
            write_line(text)

    def bar(self, batches: Replay, epoch: int) -> "tqdm[tuple[Any, Any]]":
        """The batches of an epoch, with a bar."""
        title = f"epoch {epoch}/{self.epochs}" * self.progress
        return bar(batches, title, total=batches.length, initial=batches.taken)

    def step(self, batches: int | None, seconds_ahead: Callable[[float], float]) -> None:
        """Take note of a step; after the second one, tell how long the training will take, if anybody listens.

        The first step is slower than the others, because devices and libraries get ready in it.

        Args:
            batches: number of batches of an epoch; None if it is not known.
            seconds_ahead: function from the seconds of a step to those of all epochs that are left, for one step each.
        """
        if not (self.progress or _is_heard()):
            return
        self._steps, before, self._last = self._steps + 1, self._last, time.perf_counter()
        if self._steps == 2 and batches is not None:
            seconds = batches * seconds_ahead(self._last - before)
            self._last = time.perf_counter()
            if seconds >= _WORTH_TELLING:
                self.say(f"{self.epochs} epochs of {batches} steps: about {duration(seconds)} left")

    def epoch(self, record: EpochRecord, *, is_best: bool, seconds: float | None) -> None:
        """Write the line of an epoch.

        Args:
            record: record of the epoch.
            is_best: whether it is the best one so far.
            seconds: time that the other epochs take; None if it cannot be told.
        """
        parts = [f"loss {record.loss:.3f}", f"accuracy {record.accuracy:.3f}"]
        if not math.isnan(record.attack_success_rate):
            parts.append(f"attack success {record.attack_success_rate:.3f}")
        if record.check_success_rate is not None:
            parts.append(f"success of the check's attack {record.check_success_rate:.3f}")
        figures = [f"{name} {value:.3f}" for name, value in record.validation.items()]
        if figures:
            parts.append(f"validation {', '.join(figures)}{' (best so far)' * is_best}")
        parts.append(duration(record.seconds) + f" in {record.precision}" * (record.precision != "float32"))
        if seconds is not None and seconds >= _WORTH_TELLING:
            parts.append(f"about {duration(seconds)} left")
        self.say(f"epoch {record.epoch}/{self.epochs}: {', '.join(parts)}")
        if record.returned_to is not None:
            self.say(
                f"epoch {record.epoch} has overfitted catastrophically; training goes on from the weights of epoch "
                f"{record.returned_to} with smaller steps"
            )


def _is_heard() -> bool:
    """Whether somebody has configured logging to show the lines."""
    return _LOG.isEnabledFor(logging.INFO) and _LOG.hasHandlers()


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Example:
        >>> duration(3.2), duration(200), duration(9000)
        ('3 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
