"""A time budget for runs that must stop cleanly in time and are resumed later."""

import math
import time
from dataclasses import dataclass, field


class OutOfTimeError(Exception):
    """The time budget is used up. Finished work is saved."""


@dataclass
class Clock:
    """A time budget.

    Args:
        seconds: size of the budget. None sets no limit.
        started: reading of `time.perf_counter` at the start.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """The number of seconds that are left."""
        return math.inf if self.seconds is None else self.seconds - (time.perf_counter() - self.started)

    @property
    def is_ending(self) -> bool:
        """Whether unfinished work has to be saved now.

        That is so in the last tenth of the budget, or in the last 20 seconds if these are less.
        """
        return self.seconds is not None and self.left <= min(20.0, self.seconds / 10)

    def check(self, needed: float = 0.0) -> None:
        """Stop unless enough time is left.

        Args:
            needed: seconds that the next piece of work takes.

        Raises:
            OutOfTimeError: no more than that is left.
        """
        if self.left <= needed:
            raise OutOfTimeError
