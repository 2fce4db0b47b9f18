"""Progress bars where somebody can see them: on terminals and in notebooks. In a log they are noise."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

Shown = TypeVar("Shown")


def is_watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(items: Iterable[Shown], title: str, *, total: int | None = None, initial: int = 0) -> "tqdm[Shown]":
    """The same items, with a progress bar that disappears at the end.

    Args:
        items: items to pass through.
        title: text in front of the bar; an empty one shows no bar.
        total: number of items, if they do not tell it themselves.
        initial: number of items that have been passed through before.

    Example:
        >>> list(bar([1, 2], ""))
        [1, 2]
    """
    is_hidden = not title or not is_watched()
    return tqdm(items, desc=title, total=total, initial=initial, disable=is_hidden, leave=False, mininterval=0.5)


def write_line(text: str) -> None:
    """Write a line to stderr, above the bars that are there."""
    tqdm.write(text, file=sys.stderr)
