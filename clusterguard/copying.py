"""Copies of modules that hold results of a computation, which `copy.deepcopy` refuses to copy."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)


class CopiedValues(TorchFunctionMode):
    """While it is active, `copy.deepcopy` copies the values of a tensor that has a gradient history.

    Weights under `torch.nn.utils.weight_norm` have such a history, and so have activations that a module keeps. The
    copy has no history: hooks compute the weight again before it is used, and a kept activation is only looked at.

    Example:
        >>> import torch
        >>> kept = torch.ones(2, requires_grad=True) * 3
        >>> with CopiedValues():
        ...     copy.deepcopy([kept])
        [tensor([3., 3.])]
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copy values where torch would raise, and call torch everywhere else."""
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def copy_module(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Copy a module with everything in it, tensors with a gradient history included.

    Args:
        module: stays as it is.
        memo: of `copy.deepcopy`: what stands in the copy for the object of an id.

    Returns:
        The copy. Its hooks and everything else are copies too.

    Example:
        >>> copy_module(nn.Linear(3, 2)).weight.shape
        torch.Size([2, 3])
    """
    with CopiedValues():
        return copy.deepcopy(module, memo)
