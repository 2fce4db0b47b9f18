"""The mode of torch.compile that suits a network and a device."""

from typing import Literal

import torch
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from benchmarks.detectors._networks import Features

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
CompileChoice = Literal["auto", CompileMode]
_WORTHWHILE = 0.9  # largest share of the eager time at which compiling is worth its cost


def quickest_mode(network: Features, images: Tensor) -> CompileMode | None:
    """The mode of torch.compile that computes input gradients fastest on this device. None if eager mode is best.

    Modes whose gradient differs from the eager one, and modes that fail on this machine, are left out.

    Args:
        network: network to measure. It may be compiled in any mode afterwards, so it should not be used further.
        images: batch (B, C, H, W).
    """
    timer = Timer("gradient(network, images)", globals={"gradient": _gradient, "network": network, "images": images})
    timer.timeit(2)
    limit = _WORTHWHILE * timer.blocked_autorange(min_run_time=0.5).median
    quickest: CompileMode | None = None
    modes: tuple[CompileMode, ...] = ("default", "reduce-overhead") if images.is_cuda else ("default",)
    for mode in modes:
        network.compile(mode=mode)
        try:
            timer.timeit(5)  # the first calls compile and record CUDA graphs
            seconds = timer.blocked_autorange(min_run_time=0.5).median
        except (ConfigurationError, RuntimeError):  # errors of the compiler are RuntimeErrors
            continue
        if seconds < limit:
            quickest, limit = mode, seconds
    return quickest


def _gradient(network: nn.Module, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(network(leaf).sum(), leaf)[0]
