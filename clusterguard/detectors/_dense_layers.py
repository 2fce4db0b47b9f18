"""The layers that classifiers end in: how they are recognised, made anew and replaced."""

from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Dense: TypeAlias = nn.Linear | nn.Conv2d


def count_outputs(layer: Dense) -> int:
    """The number of outputs, or of output channels, of a layer."""
    # A user may have replaced the weight and forgotten the attribute, so the weight decides.
    if is_lazy(layer.weight):
        return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return len(layer.weight)


def dense_layers(module: nn.Module) -> list[Dense]:
    """All linear layers and convolutions in a module, in order."""
    return [
        layer
        for path, layer in module.named_modules()
        if isinstance(layer, Dense) and "parametrizations" not in path.split(".")  # layers there compute a weight
    ]


def last_parameter(module: nn.Module) -> Tensor | None:
    """The last floating-point parameter of a module, whose device and data type a new layer gets."""
    # In a model spread over devices, the last parameter is on the device of the output.
    return next((p for p in reversed(list(module.parameters())) if p.is_floating_point()), None)


def make_layer_like(layer: Dense, out_features: int) -> Dense:
    """A new layer with the inputs, device, data type and mode of an old one, and another number of outputs."""
    like = next(layer.parameters())  # a weight computed before each call may be on another device
    options: dict[str, Any] = {"bias": layer.bias is not None, "device": like.device, "dtype": like.dtype}
    fresh: Dense
    if isinstance(layer, nn.Linear):
        fresh = nn.Linear(layer.weight.shape[1], out_features, **options)
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        fresh = nn.Conv2d(layer.in_channels, out_features, **options, **{name: getattr(layer, name) for name in names})
    fresh.training = layer.training
    return fresh


def put_in_place(encoder: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another one in all places where it occurs."""
    for path, module in list(encoder.named_modules(remove_duplicate=False)):
        if module is old:
            encoder.set_submodule(path, new)
