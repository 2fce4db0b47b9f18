"""The last layers of classifiers: functions that recognise, create and replace them."""

from typing import Any, TypeAlias

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Dense: TypeAlias = nn.Linear | nn.Conv2d

# Modules that change no label if they come after a classifier, or before its layer.
_HARMLESS = (nn.Identity, nn.Flatten, nn.Dropout, nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.Tanh)


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


def is_usual(layer: nn.Module) -> bool:
    """Whether a layer computes what its library says. A user's subclass or a hook may do more."""
    is_known = type(layer).__module__.split(".")[0] in ("torch", "timm", "torchvision", "transformers")
    return is_known and not layer._forward_hooks and not layer._forward_pre_hooks


def is_in_users_module(layer: nn.Module, model: nn.Module) -> bool:
    """Whether a layer is a part of a user's module inside a model, whose forward may do anything with its outputs."""
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is layer]
    holders = {path[:end] for path in paths for end, letter in enumerate(path) if letter == "."}
    return not all(is_usual(model.get_submodule(path)) for path in holders)


def changes_no_label(module: nn.Module) -> bool:
    """Whether a module without dense layers can follow a classifier without changing which output is the largest."""
    return isinstance(module, _HARMLESS)


def is_one_layer(head: nn.Module) -> bool:
    """Whether the labels of a head are those of the only dense layer in it. A user's module may compute anything."""
    inside = {part for layer in dense_layers(head) for part in layer.modules() if part is not layer}
    known = (*_HARMLESS, nn.Linear, nn.Conv2d, nn.Sequential)
    parts = [part for part in head.modules() if part not in inside]
    return len(dense_layers(head)) == 1 and all(isinstance(part, known) and is_usual(part) for part in parts)


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


def take_over(old: nn.Module, new: nn.Module, scale: float, *, exactly: bool = False) -> bool:
    """Let a new classifier compute the outputs of an old one times a scale, each of them several times.

    Only an offset that all outputs share is left out.

    Args:
        old: classifier with K outputs, which may have further layers, such as a normalisation.
        new: classifier of the same layers with m outputs, a multiple of K. Output i of the old one becomes the outputs
            i·m/K to (i + 1)·m/K − 1.
        scale: factor of all outputs.
        exactly: whether the outputs must be those of the old one, with the offset that they share.

    Returns:
        Whether the layers correspond, and the outputs are as wanted. If they do not, the new classifier is unchanged.
    """
    pairs = list(zip(dense_layers(old), dense_layers(new), strict=False))
    if not pairs or len(pairs) != len(dense_layers(old)) or len(pairs) != len(dense_layers(new)):
        return False
    if any(len(n.weight) % len(o.weight) or n.weight.shape[1:] != o.weight.shape[1:] for o, n in pairs):
        return False
    if any(n.bias is None and o.bias is not None for o, n in pairs):
        return False
    if not all(is_usual(before) for before, _ in pairs):
        return False
    if exactly and (scale != 1 or any(len(o.weight) != len(n.weight) for o, n in pairs)):
        return False
    others, fresh = _other_tensors(old), _other_tensors(new)
    if {name: value.shape for name, value in others.items()} != {name: value.shape for name, value in fresh.items()}:
        return False
    with torch.no_grad():
        for name, value in others.items():
            fresh[name].copy_(value)
        for before, after in pairs:
            copies = len(after.weight) // len(before.weight)
            after.weight.copy_(scale * repeat(before.weight, "k ... -> (k l) ...", l=copies))
            if after.bias is not None:
                bias = torch.zeros_like(before.weight[:, 0]).flatten() if before.bias is None else before.bias
                if not exactly:  # this moves no label, and distances do not drown in an offset of all logits
                    bias = bias - bias.mean()
                after.bias.copy_(scale * repeat(bias, "k -> (k l)", l=copies))
    return True


def _other_tensors(classifier: nn.Module) -> dict[str, Tensor]:
    """The tensors of a classifier that are not those of its dense layers, such as the statistics of a BatchNorm."""
    dense = {id(tensor) for layer in dense_layers(classifier) for tensor in layer.state_dict(keep_vars=True).values()}
    return {name: value for name, value in classifier.state_dict(keep_vars=True).items() if id(value) not in dense}


def put_in_place(encoder: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another one in all places where it occurs."""
    for path, module in list(encoder.named_modules(remove_duplicate=False)):
        if module is old:
            encoder.set_submodule(path, new)
