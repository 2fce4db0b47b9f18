"""Train and eval mode, saved and restored module by module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(*candidates: object) -> Iterator[None]:
    """Put every `nn.Module` among the candidates into eval mode, and afterwards back as each submodule was.

    Calling ``model.train()`` afterwards would wake a BatchNorm that its owner had frozen; this does not.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout())
        >>> with evaluation_mode(model):
        ...     [module.training for module in model]
        [False, False]
        >>> [module.training for module in model]
        [False, True]
    """
    training = [
        module
        for candidate in candidates
        if isinstance(candidate, nn.Module)
        for module in candidate.modules()
        if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
