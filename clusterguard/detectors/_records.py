"""A digest by which a detector notices that its weights are not those of its calibration any more."""

from contextlib import suppress

from clusterguard._support import digest_of
from torch import Tensor, nn


def digest_of_values(module: nn.Module) -> str | None:
    """A digest of the weights and buffers of a module except thresholds, the same in float32 and float64.

    It takes about as long as reading the weights once. None if they have no plain values, as on the meta device.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> digest_of_values(layer) == digest_of_values(layer.double())
        True
    """
    with suppress(Exception):  # state dicts of a user's modules may hold anything
        return digest_of(
            {
                name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in module.state_dict().items()
                if name != "thresholds"
            }
        )
    return None
