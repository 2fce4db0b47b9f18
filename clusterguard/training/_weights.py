"""The weights and buffers of a detector: which are frozen, whether they are equal, and how they move for a while."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def are_equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same weights; thresholds, which a calibration fits, may differ."""
    names = {*state, *other} - {"thresholds"}
    return all(name in state and name in other and torch.equal(state[name], other[name]) for name in names)


def frozen_modules(detector: nn.Module) -> frozenset[str]:
    """The names of modules whose parameters are all frozen, and of all modules inside them."""
    frozen: set[nn.Module] = set()
    for module in detector.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen |= {*module.modules()}
    return frozenset(name for name, module in detector.named_modules() if module in frozen)


@contextmanager
def moved(
    detector: nn.Module, parameters: Sequence[Tensor], directions: Sequence[Tensor], share: float
) -> Iterator[None]:
    """Move each parameter in its direction by a share of its norm, and afterwards restore all tensors bit by bit.

    Buffers are restored too, because BatchNorm's statistics of the moved network must not last.
    """
    kept = {name: tensor.detach().clone() for name, tensor in named_tensors(detector)}
    try:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                length = direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)  # a gradient of 0 moves nothing
                parameter.add_(direction / length * (share * parameter.norm()))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in named_tensors(detector):
                tensor.copy_(kept[name])


def named_tensors(detector: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, also those that a state dict leaves out."""
    yield from detector.named_parameters()
    yield from detector.named_buffers()


def usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if it was made in inference mode, because autograd refuses such tensors."""
    return tensor.clone() if tensor.is_inference() else tensor
