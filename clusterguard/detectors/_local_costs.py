"""An encoder that judges every small window of an image by itself, so that a patch can change few of its judgements."""

from collections.abc import Iterator
from typing import NamedTuple, final

from clusterguard._support import is_changed
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn

_POINTWISE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.BatchNorm2d, nn.Dropout)
_WINDOWED = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)


class Windows(NamedTuple):
    """The windows of an image that outputs of a network look at, the same along rows and columns.

    The output at place p sees the pixels from ``p * stride - padding``, and no more than `size` of them.
    """

    size: int
    stride: int
    padding: int


@final
class LocalCosts(nn.Module):
    """Sums over the windows of an image what each of them speaks against every class.

    A network with small windows maps images to K maps. A sigmoid makes costs in [0, 1] of them, one for each window
    and class, and the cost of a class is their sum. A patch can change only the costs of windows that it meets, and
    each of them by at most 1. `make_local_guard` puts a guard around it, and `certify` proves bounds for patches.

    Args:
        network: convolutions, poolings, batch normalisation and activations, one after the other in `nn.Sequential`,
            that map images (B, C, H, W) to (B, K, h, w).

    Raises:
        ConfigurationError: the network has another layer, or one whose windows are not known.

    Reference:
        Metzen & Yatsura, "Efficient certified defenses against patch attacks on image classifiers" (2021), for
        classifiers that sum bounded evidence of small windows.

    Example:
        >>> import torch
        >>> local = LocalCosts(nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 2, 2)))
        >>> local.windows()
        Windows(size=5, stride=2, padding=0)
        >>> local.costs(torch.rand(4, 1, 9, 9)).shape, local(torch.rand(4, 1, 9, 9)).shape
        (torch.Size([4, 2, 3, 3]), torch.Size([4, 2]))
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.windows()

    def windows(self) -> Windows:
        """The windows that the network's outputs look at.

        Raises:
            ConfigurationError: a layer is none of those that are known, or has been changed.
        """
        size, stride, padding = 1, 1, 0
        for layer in _layers(self.network):
            if type(layer) in _WINDOWED:
                kernel, step, edge, gap = _sides(layer)
                size, padding = size + gap * (kernel - 1) * stride, padding + edge * stride
                stride *= step
        return Windows(size, stride, padding)

    def costs(self, images: Tensor) -> Tensor:
        """What every window speaks against every class: images (B, C, H, W) -> (B, K, h, w) in [0, 1]."""
        costs: Tensor = self.network(images).sigmoid()
        return costs

    def forward(self, images: Tensor) -> Tensor:
        """The costs of all classes: images (B, C, H, W) -> (B, K)."""
        costs = self.costs(images)
        _, _, rows, columns = costs.shape
        return costs.flatten(2).mean(dim=2) * (rows * columns)  # a sum, of which bounds are known


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of a network in their order, each of which is known to look at windows.

    Raises:
        ConfigurationError: one of them is not.
    """
    is_known = not is_changed(network)
    if is_known and type(network) is nn.Sequential:
        for part in network._modules.values():  # `children` would leave out a layer that is applied twice
            assert part is not None
            yield from _layers(part)
        return
    is_known = is_known and type(network) in (*_POINTWISE, *_WINDOWED)
    if not is_known or (type(network) is nn.BatchNorm2d and not network.track_running_stats):
        raise ConfigurationError(
            f"expected nn.Sequential of {', '.join(kind.__name__ for kind in (*_WINDOWED, *_POINTWISE))} without "
            f"hooks, got {type(network).__name__}; the windows of other layers are not known"
        )
    yield network


def _sides(layer: nn.Module) -> tuple[int, int, int, int]:
    """Kernel, stride, padding and dilation of a layer along both sides.

    Raises:
        ConfigurationError: they differ between rows and columns, or the padding holds more than zeros.
    """
    values = [getattr(layer, name, 1) for name in ("kernel_size", "stride", "padding", "dilation")]
    pairs = [value if isinstance(value, tuple) else (value, value) for value in values]
    is_plain = getattr(layer, "padding_mode", "zeros") == "zeros" and not getattr(layer, "ceil_mode", False)
    if not is_plain or any(len({*pair}) > 1 or type(pair[0]) is not int for pair in pairs):
        raise ConfigurationError(
            f"expected a layer with the same whole numbers for rows and columns and zeros around, got {layer}"
        )
    kernel, stride, padding, dilation = (pair[0] for pair in pairs)
    if isinstance(layer, nn.Conv2d) and layer.weight.shape[2:] != layer.kernel_size:
        raise ConfigurationError(
            f"expected weights of size {layer.kernel_size}, as {layer} says, got {tuple(layer.weight.shape[2:])}; make "
            "a new layer with these weights"
        )
    if isinstance(layer, nn.MaxPool2d) and dilation > 1 and padding:
        raise ConfigurationError(f"expected pooling without padding where it is dilated, got {layer}; leave one out")
    return kernel, stride, padding, dilation
