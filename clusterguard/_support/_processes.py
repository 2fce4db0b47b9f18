"""Work shared by several processes: each does every n-th item, and all of them get all results, in order."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

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


class OneProcess:
    """What a trainer needs of an `accelerate.Accelerator`, for one process in the weights' own precision.

    accelerate keeps precision and accumulation in one state for the whole Python process. A training without an
    accelerator of its own must not depend on what a script, a notebook or another trainer has put there, and must not
    leave anything there either. So it runs with this object, which has no state at all.

    Example:
        >>> OneProcess().num_processes, OneProcess().mixed_precision
        (1, 'no')
    """

    num_processes = 1
    process_index = 0
    is_main_process = True
    mixed_precision = "no"
    distributed_type: Any = "NO"
    gradient_accumulation_steps = 1
    sync_gradients = True
    scaler = None
    trackers: tuple[Any, ...] = ()

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """The module as it is."""
        return module

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer as it is."""
        return optimizer

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context without effect: there is nobody to exchange gradients with."""
        return nullcontext()

    def reduce(self, values: Any, reduction: str) -> Any:
        """The values as they are, for they are the sum and the mean over one process."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The values as they are."""
        return values

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """Scale the gradients down to a norm of `max_norm` in l2, if it is larger."""
        nn.utils.clip_grad_norm_(parameters, max_norm)

    def wait_for_everyone(self) -> None:
        """Return at once."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Drop the values, for there are no trackers."""
