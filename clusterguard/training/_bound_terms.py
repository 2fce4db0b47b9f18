"""Batch normalisation under bounds, and terms of the loss that keep the bounds of deep networks tight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from clusterguard.certification._internal import Box
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = Mapping[_BatchNorm, tuple[Tensor, Tensor]]
_TOLERANCE = 0.5  # share below which a ratio costs something, as in the publication
_TINY = 1e-12


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[dict[_BatchNorm, tuple[Tensor, Tensor]]]:
    """Note the mean and the variance by which each BatchNorm in train mode normalises within the block.

    They are differentiable. A layer that runs several times is noted with its last batch.
    """
    statistics: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if layer.training and isinstance(layer, _BatchNorm):
            values = _wide([*inputs, *named.values()][0])
            var, mean = torch.var_mean(values, dim=[0, *range(2, values.ndim)], correction=0)
            statistics[layer] = mean, var

    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def normalized_by(statistics: Statistics) -> Iterator[None]:
    """Let each BatchNorm in eval mode use these statistics within the block, in place of its running ones."""
    before = {layer: (layer.running_mean, layer.running_var) for layer in statistics}
    try:
        for layer, (mean, var) in statistics.items():
            layer.running_mean, layer.running_var = mean, var
        yield
    finally:
        for layer, (running_mean, running_var) in before.items():
            layer.running_mean, layer.running_var = running_mean, running_var


def tightness_loss(width: Tensor, boxes: Sequence[Box]) -> Tensor:
    """A penalty on inputs of ReLUs whose intervals are more than twice as wide as those of the images.

    Args:
        width: mean width of the images' intervals after normalisation, ().
        boxes: boxes before each ReLU.

    Reference:
        Shi et al., "Fast certified robust training with short warmup" (2021), equation 8.
    """
    ratios = [width / (_wide(box.upper) - _wide(box.lower)).mean().clamp_min(_TINY) for box in boxes]
    return relu(_TOLERANCE - torch.stack(ratios)).mean() / _TOLERANCE


def balance_loss(boxes: Sequence[Box]) -> Tensor:
    """A penalty on layers in which ReLUs that are always on and always off are out of balance.

    It compares sums of centres, and sums of squared deviations of centres, over the two kinds of ReLUs.

    Args:
        boxes: boxes before each ReLU.

    Reference:
        Shi et al., "Fast certified robust training with short warmup" (2021), equation 9.
    """
    losses = []
    for box in boxes:
        center = _wide(box.center)
        is_on, is_off = (box.lower > 0).to(center), (box.upper < 0).to(center)
        deviation = (center - center.mean()).square()
        for on, off in ((center * is_on, -center * is_off), (deviation * is_on, deviation * is_off)):
            on, off = on.sum(), off.sum()
            if on > 0 and off > 0:  # the ratio says nothing of a layer whose ReLUs are all on one side
                losses.append(relu(_TOLERANCE - torch.minimum(on / off, off / on)) / _TOLERANCE)
    return torch.stack(losses).sum() / len(boxes) if losses else boxes[0].lower.new_zeros(())


def stability_loss(boxes: Sequence[Box]) -> Tensor:
    """Mean of −tanh(1 + lower · upper) over all ReLUs: smallest where each stays on, or stays off, in the whole box.

    Args:
        boxes: boxes before each ReLU.

    Reference:
        Xiao et al., "Training for faster adversarial robustness verification via inducing ReLU stability" (2019).
    """
    return torch.stack([-torch.tanh(1 + _wide(box.lower) * _wide(box.upper)).mean() for box in boxes]).mean()


def _wide(values: Tensor) -> Tensor:
    """The values in at least float32, because sums over half precision lose digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
