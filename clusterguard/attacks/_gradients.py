"""The gradients that attacks follow, and what to say of a detector that has none."""

import torch
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError
from torch import Tensor


def gradient_at(leaf: Tensor, loss: Tensor, detector: Detector, *, again: bool = False) -> Tensor:
    """The gradient of a loss (B,) at images (B, C, H, W), of which it was computed.

    Args:
        leaf: images that require a gradient.
        loss: loss of each image, by the evidence of the detector.
        detector: detector to name in an error.
        again: whether another gradient of the same evidence follows.

    Raises:
        ConfigurationError: the evidence does not depend on the images in a way that autograd knows.
    """
    found = torch.autograd.grad(loss.sum(), leaf, retain_graph=again, allow_unused=True) if loss.requires_grad else None
    if found is None or found[0] is None:
        while hasattr(detector, "detector"):
            detector = detector.detector
        raise ConfigurationError(
            "expected a detector whose evidence has gradients, which this attack needs, got a "
            f"{type(detector).__name__} without; attack the network that it was made from, or take Square, SparseRS or "
            "Boundary"
        )
    return found[0]
