"""A time budget for runs on borrowed machines: stop cleanly in time, go on later."""

import math
import time
from dataclasses import dataclass, field


class OutOfTimeError(Exception):
    """The time budget is used up; what is done is saved."""


@dataclass
class Clock:
    """A time budget.

    Args:
        seconds: None allows any time.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return math.inf if self.seconds is None else self.seconds - (time.perf_counter() - self.started)

    @property
    def is_ending(self) -> bool:
        """Whether to save now what will not be finished: the last tenth, at most 20 seconds of it."""
        return self.seconds is not None and self.left <= min(20.0, self.seconds / 10)

    def check(self, needed: float = 0.0) -> None:
        """Stop unless that many seconds are left.

        Raises:
            OutOfTimeError: they are not.
        """
        if self.left <= needed:
            raise OutOfTimeError
