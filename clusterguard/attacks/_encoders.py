"""The representations of a detector, for attacks that aim at them."""

from collections.abc import Callable

from clusterguard.errors import ConfigurationError
from torch import Tensor


def has_representation(detector: object) -> bool:
    """Whether a detector, or one that it wraps, has a method `represent`."""
    try:
        find_representation(detector)
    except ConfigurationError:
        return False
    return True


def find_representation(detector: object) -> Callable[[Tensor], Tensor]:
    """The method `represent` of a detector, or of the detector that it wraps in its attribute `detector`.

    Raises:
        ConfigurationError: there is no such method.

    Example:
        >>> import torch
        >>> from clusterguard import ClusterGuard
        >>> from clusterguard.detectors import WithThresholds
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 2, 2))
        >>> find_representation(WithThresholds(guard, torch.ones(2))) == guard.represent
        True
    """
    owner: object | None = detector
    while owner is not None:
        if hasattr(owner, "represent"):
            represent: Callable[[Tensor], Tensor] = owner.represent
            return represent
        owner = getattr(owner, "detector", None)
    raise ConfigurationError(
        f"expected a detector with represent(images) -> (B, m), as ClusterGuard has, got {type(detector).__name__}; "
        "attack it with OrthogonalPGD or APGD instead"
    )
