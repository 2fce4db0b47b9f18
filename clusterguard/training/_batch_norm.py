"""Batch normalisation of a batch of one image."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clusterguard.errors import ConfigurationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def single_image(detector: nn.Module, *, synchronised: bool, warn: Callable[[], None]) -> Iterator[None]:
    """Context in which batch normalisation accepts a batch of one image.

    A layer uses the statistics of the image if its feature map has several pixels, and running statistics otherwise.

    Args:
        detector: detector whose batch normalisation in train mode is changed within the block.
        synchronised: whether `SyncBatchNorm` also gets the images of other processes.
        warn: function to call when a layer uses its running statistics.
    """
    layers = {
        name: layer
        for name, layer in detector.named_modules()
        if isinstance(layer, _BatchNorm) and not (synchronised and isinstance(layer, nn.SyncBatchNorm))
    }
    names = {layer: name for name, layer in layers.items()}
    switched: set[nn.Module] = set()

    def before(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        values: Tensor = [*inputs, *named.values()][0]
        if (
            math.prod(values.shape[2:]) > 1 or len(values) > 2
        ):  # a batch of two may be one image and its attacked version
            return
        if layer.running_mean is None:
            raise ConfigurationError(
                f"expected batches of at least two images, because {names[layer]} with track_running_stats=False has "
                "no running statistics to use in place of those of a single image, got a batch of one; pass "
                "drop_last=True to the DataLoader"
            )
        if layer.training:
            layer.training = False
            switched.add(layer)
            warn()

    def after(layer: nn.Module, *_: Any) -> None:
        if layer in switched:
            switched.remove(layer)
            layer.training = True

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in names]
    hooks += [layer.register_forward_hook(after, always_call=True) for layer in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
