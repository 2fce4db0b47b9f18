"""Work that n processes share. Each takes every n-th item, and all of them get all results in order."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from clusterguard.errors import ConfigurationError
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

Item = TypeVar("Item")
Collected = TypeVar("Collected")


def check_accelerator(accelerator: object) -> None:
    """Check that accelerate's state has not been reset since an accelerator was made. All accelerators share it.

    Args:
        accelerator: accelerator to check; None passes.

    Raises:
        ConfigurationError: the state was reset.

    Example:
        >>> check_accelerator(None)
    """
    states = {"distributed_type": "state", "sync_gradients": "gradient_state"}
    for needed, name in states.items():
        state = getattr(accelerator, name, None)
        if state is not None and not hasattr(state, needed):
            raise ConfigurationError(
                f"expected an accelerator in use, got one without its state, which {type(state).__name__}._reset_state "
                "has deleted; make a new Accelerator, and a new trainer with it"
            )


def share(items: Iterable[Item], accelerator: "Accelerator | None") -> Iterator[tuple[int, Item]]:
    """The items that this process works on, each with its position among all items.

    Args:
        items: all items, which must come in the same order in every process.
        accelerator: accelerator that knows the number of processes and the index of this one; None takes all items.

    Example:
        >>> list(share("abc", None))
        [(0, 'a'), (1, 'b'), (2, 'c')]
    """
    check_accelerator(accelerator)
    numbered = enumerate(items)
    if accelerator is None:
        return numbered
    return islice(numbered, accelerator.process_index, None, accelerator.num_processes)


def gather(results: Mapping[int, Collected], accelerator: "Accelerator | None") -> list[Collected]:
    """The results of all processes, in the order of their positions. Every process must call this.

    Args:
        results: results of this process by position, with tensors on the CPU.
        accelerator: accelerator as in `share`.

    Example:
        >>> gather({1: "b", 0: "a"}, None)
        ['a', 'b']
    """
    check_accelerator(accelerator)
    parts = [results]
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    result_at = {position: result for part in parts for position, result in part.items()}
    return [result_at[position] for position in sorted(result_at)]


class OneProcess:
    """The part of an `accelerate.Accelerator` that a trainer uses, for one process without mixed precision.

    accelerate keeps precision and accumulation in one state for the whole Python process. A training without an
    accelerator must not depend on what a script, a notebook or another trainer has put there, and must not change it
    either. So it uses this object, which has no state at all.

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
        """Return the module unchanged."""
        return module

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer unchanged."""
        return optimizer

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context without effect, because there is no other process to exchange gradients with."""
        return nullcontext()

    def reduce(self, values: Any, reduction: str) -> Any:
        """Return the values unchanged, because they are both the sum and the mean over one process."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Return the values unchanged."""
        return values

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """Scale the gradients down to an l2 norm of `max_norm` if their norm is larger."""
        nn.utils.clip_grad_norm_(parameters, max_norm)

    def wait_for_everyone(self) -> None:
        """Return at once."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Discard the values, because there are no trackers."""
