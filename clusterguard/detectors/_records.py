"""A digest by which a detector notices that its weights are not those of its calibration or evaluation any more."""

from contextlib import suppress
from typing import Any

from clusterguard._support import digest_of
from clusterguard.errors import ConfigurationError
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


def check_evaluated(detector: Any, evaluation: Any) -> None:
    """Check that an evaluation is of a detector with its present thresholds and weights.

    Args:
        detector: a `DetectorModule`.
        evaluation: result of `evaluate`. If it has no digest of weights, only thresholds are compared.

    Raises:
        ConfigurationError: it is of other thresholds or weights.
    """
    if str(list(evaluation.thresholds)) != str(detector.thresholds.tolist()):  # as text, because NaN is not NaN
        raise ConfigurationError("expected an evaluation at this guard's thresholds, got another's; evaluate it again")
    if getattr(evaluation, "weights", None) not in (None, detector.digest()):
        raise ConfigurationError(
            "expected an evaluation of this guard's weights, got one of others, or they have changed since; evaluate "
            "it again"
        )
