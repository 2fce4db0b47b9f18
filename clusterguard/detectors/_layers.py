"""Networks of torch's layers and `LocalCosts` described as plain values, so that rebuilding one runs no saved code."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clusterguard.detectors._local_costs import LocalCosts
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn

_LAYERS = {
    layer.__name__: layer
    for layer in (
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool2d,
        nn.AvgPool2d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.Conv2d,
        nn.Dropout,
        nn.Dropout2d,
        nn.ELU,
        nn.Flatten,
        nn.GELU,
        nn.GroupNorm,
        nn.Hardswish,
        nn.Identity,
        nn.LayerNorm,
        nn.LeakyReLU,
        nn.Linear,
        nn.MaxPool2d,
        nn.ReLU,
        nn.ReLU6,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Tanh,
        nn.Unflatten,
        nn.ZeroPad2d,
    )
}
_CONTAINERS = {container.__name__: container for container in (nn.Sequential, LocalCosts)}
_NOT_KEPT = {"self", "device", "dtype", "args", "kwargs"}
_DEPTH, _LARGEST = 20, 2**24


def describe_layers(module: nn.Module) -> dict[str, Any] | None:
    """Describe a module's layers as plain values that `build_layers` takes, without weights.

    Args:
        module: `nn.Sequential` or `LocalCosts` of layers that this module knows, nested or not, or one such layer.

    Returns:
        The name of the layer and its options; None if a layer is not known.

    Example:
        >>> describe_layers(nn.Flatten())
        {'layer': 'Flatten', 'options': {'start_dim': 1, 'end_dim': -1}}
        >>> describe_layers(nn.Bilinear(1, 1, 1)) is None
        True
    """
    name = type(module).__name__
    if _CONTAINERS.get(name) is type(module):
        parts = [(key, describe_layers(part)) for key, part in module.named_children()]
        return None if any(part is None for _, part in parts) else {"layer": name, "parts": [list(p) for p in parts]}
    return {"layer": name, "options": dict(_options(module))} if _LAYERS.get(name) is type(module) else None


def _options(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name in inspect.signature(type(module)).parameters:
        if name not in _NOT_KEPT:
            value = getattr(module, name)
            yield name, value is not None if name == "bias" and not isinstance(value, bool) else value


def build_layers(description: Mapping[str, Any], *, depth: int = 0) -> nn.Module:
    """Build the module of a description, with random weights.

    Args:
        description: value that `describe_layers` returned, possibly saved as JSON since then.
        depth: number of modules that this one is nested in.

    Raises:
        ConfigurationError: a layer is not known, or does not accept its options.

    Example:
        >>> build_layers({"layer": "Linear", "options": {"in_features": 3, "out_features": 2, "bias": False}})
        Linear(in_features=3, out_features=2, bias=False)
    """
    try:
        name = description["layer"]
        if name in _CONTAINERS and depth < _DEPTH:
            parts = {str(key): build_layers(part, depth=depth + 1) for key, part in description["parts"]}
            if name == LocalCosts.__name__:
                return LocalCosts(**parts)
            built = nn.Sequential()
            for key, part in parts.items():
                built.add_module(key, part)
            return built
        return _LAYERS[name](**{name: _plain(value) for name, value in description["options"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        shown = str(description)[:80]
        raise ConfigurationError(f"expected layers as describe_layers gives them, got {shown}") from error


def _plain(value: Any) -> Any:
    """Check an option, and turn lists into the tuples that layers expect, because JSON has no tuples."""
    if isinstance(value, Mapping | Tensor) or (isinstance(value, int | float) and not abs(value) <= _LARGEST):
        raise TypeError("expected numbers of a usual size, strings, None, and lists of them")
    return tuple(map(_plain, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
