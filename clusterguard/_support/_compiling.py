"""Calls that torch.compile has compiled. Their gradients are verified, as wrong ones make a detector look robust."""

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from clusterguard._support._modes import evaluation_mode
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn

NetworkCall = Callable[[nn.Module, Tensor], Tensor]
"""A function from a module and its images (B, C, H, W) to the module's output (B, D)."""


def call_uncompiled(module: nn.Module, images: Tensor) -> Tensor:
    """The module's output, without compilation."""
    output: Tensor = module(images)
    return output


class CompiledCall:
    """A call of a network through `torch.compile`, for a detector of your own.

    torch.compile silently gives some networks wrong gradients. Attacks on a detector then fail, and it looks robust. So
    the first gradient with respect to images is compared with that of the same network without compilation. Keep the
    object as an attribute of the detector: attacks that copy a detector recognise it, and copies of the detector call
    their network without compilation. `ClusterGuard.compile` does this for a guard.

    Args:
        *args: positional arguments of `torch.compile`.
        **kwargs: keyword arguments of `torch.compile`.

    Example:
        >>> compiled = CompiledCall(backend="eager")
        >>> compiled(nn.Linear(3, 2), torch.rand(5, 3, requires_grad=True)).shape
        torch.Size([5, 2])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch compiles each code object at most eight times, so every instance gets a new code object.
        function = FunctionType(call_uncompiled.__code__.replace(), call_uncompiled.__globals__)
        self.compiled: NetworkCall = torch.compile(function, *args, **kwargs)
        self._is_checked = False

    def __reduce__(self) -> tuple[Callable[[], NetworkCall], tuple[()]]:
        return _not_compiled, ()

    def __call__(self, module: nn.Module, images: Tensor) -> Tensor:
        """The output (B, D) of the compiled module.

        Args:
            module: network to call.
            images: (B, C, H, W).

        Raises:
            ConfigurationError: the compiled gradient is wrong. This is checked at the first call that needs one.
        """
        if not self._is_checked and torch.is_grad_enabled() and images.requires_grad:
            with evaluation_mode(module) as seen:
                check_gradients(partial(self.compiled, seen), partial(call_uncompiled, seen), images)
            self._is_checked = True
        return self.compiled(module, images).clone()  # CUDA graphs overwrite this output at the next call


def _not_compiled() -> NetworkCall:
    return call_uncompiled


def check_gradients(compiled: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Check that a compiled function and its eager version have the same gradient with respect to the images.

    Args:
        compiled: function from images (B, C, H, W) to an output (B, D).
        eager: function that is the same without compilation.
        images: example batch (B, C, H, W).

    Raises:
        ConfigurationError: the gradients differ by more than 1 % of the largest eager one.
    """
    gradients = []
    for function in (compiled, eager):
        leaf = images.detach().clone().requires_grad_()
        output = function(leaf).float()
        # Unequal weights, so that errors do not cancel by symmetry.
        ramp = torch.linspace(1, 2, output.numel(), device=output.device).view_as(output)
        gradients.append(torch.autograd.grad((output * ramp).sum(), leaf)[0])
    actual, expected = gradients
    worst, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    if not worst <= 0.01 * scale:
        raise ConfigurationError(
            f"torch.compile gave this network wrong input gradients: they differ by up to {worst:.3g} from the eager "
            f"ones, of which the largest is {scale:.3g}. Attacks would fail and the guard would look robust. Do not "
            'compile it, or try another backend, such as "aot_eager", or another release of torch'
        )
