"""torch.compile, not taken at its word: wrong gradients would make a detector look robust."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from clusterguard._support._modes import evaluation_mode
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn

Call = Callable[[nn.Module, Tensor], Tensor]
"""(module, images) -> the module's output."""


def call(module: nn.Module, images: Tensor) -> Tensor:
    """The module's output, as it is."""
    output: Tensor = module(images)
    return output


class CompiledCall:
    """A compiled `call` whose input gradients are compared with those of the module itself before anybody uses them.

    A copy, or what comes out of a pickle, is `call` again, not compiled.

    Args:
        *args: of `torch.compile`.
        **kwargs: of `torch.compile`.

    Example:
        >>> compiled = CompiledCall(backend="eager")
        >>> compiled(nn.Linear(3, 2), torch.rand(5, 3, requires_grad=True)).shape
        torch.Size([5, 2])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = FunctionType(call.__code__.replace(), call.__globals__)  # torch compiles one code object eight times
        self.compiled: Call = torch.compile(own, *args, **kwargs)
        self._is_checked = False

    def __reduce__(self) -> tuple[Callable[[], Call], tuple[()]]:
        return _not_compiled, ()

    def __call__(self, module: nn.Module, images: Tensor) -> Tensor:
        """The compiled module's output.

        Raises:
            ConfigurationError: at the first call with a gradient, if it is wrong.
        """
        if not self._is_checked and torch.is_grad_enabled() and images.requires_grad:
            with evaluation_mode(module):
                check_gradients(lambda own: self.compiled(module, own), lambda own: call(module, own), images)
            self._is_checked = True
        return self.compiled(module, images).clone()  # CUDA graphs write the next output where the last one lies


def _not_compiled() -> Call:
    return call


def check_gradients(compiled: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Make sure that two ways to compute the same have the same gradient with respect to the images.

    Args:
        compiled: images (B, C, H, W) -> (B, D).
        eager: the same, not compiled.
        images: some of those to come.

    Raises:
        ConfigurationError: the gradients differ by more than 1 % of the largest.
    """
    gradients = []
    for way in (compiled, eager):
        leaf = images.detach().clone().requires_grad_()
        output = way(leaf).float()
        ramp = torch.linspace(1, 2, output.numel(), device=output.device).view_as(output)  # no symmetry hides an error
        gradients.append(torch.autograd.grad((output * ramp).sum(), leaf)[0])
    found, expected = gradients
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not worst <= 0.01 * scale:
        raise ConfigurationError(
            f"torch.compile gave this network wrong input gradients: they differ by up to {worst:.3g}, where the "
            f"largest is {scale:.3g}, so attacks would be led astray and the guard would look robust. Do not compile "
            'it, or try another backend, such as "aot_eager", or another release of torch'
        )
