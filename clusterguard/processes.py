"""Work shared by several processes: each does every n-th item, and all of them get all results, in order."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Item = TypeVar("Item")
Result = TypeVar("Result")


def share(items: Iterable[Item], accelerator: "Accelerator | None") -> Iterator[tuple[int, Item]]:
    """The items of this process with their positions among all; without an accelerator, all of them.

    Args:
        items: the same, in the same order, in every process.
        accelerator: says how many processes there are, and which of them this is.

    Example:
        >>> list(share("abc", None))
        [(0, 'a'), (1, 'b'), (2, 'c')]
    """
    numbered = enumerate(items)
    if accelerator is None:
        return numbered
    return islice(numbered, accelerator.process_index, None, accelerator.num_processes)


def collect(own: Mapping[int, Result], accelerator: "Accelerator | None") -> list[Result]:
    """All processes' results, in the order of their positions; every process must call it.

    Args:
        own: this process's results by position; tensors in them on the CPU.
        accelerator: as for `share`.

    Example:
        >>> collect({1: "b", 0: "a"}, None)
        ['a', 'b']
    """
    parts = [own]
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    found = {position: result for part in parts for position, result in part.items()}
    return [found[position] for position in sorted(found)]
