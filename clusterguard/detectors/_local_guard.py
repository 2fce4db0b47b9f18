"""A guard that judges every small window of an image by itself, with certificates against patches."""

from collections.abc import Sequence

import torch
from clusterguard.detectors._guard import ClusterGuard
from clusterguard.detectors._local_costs import LocalCosts
from clusterguard.detectors._templates import NearestTemplate
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn


def make_local_guard(
    network: nn.Module,
    num_classes: int,
    *,
    example: Tensor,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.25,
    class_names: Sequence[str] | None = None,
) -> ClusterGuard:
    """Make a guard that sums costs over windows of an image, and that has certificates against patches.

    The distance to a class is its cost, from 0 to the number of windows. `TemplateTrainer` trains the guard.

    Args:
        network: network of `LocalCosts` with K maps.
        num_classes: number K of classes, at least 2.
        example: (B, C, H, W) images in [0, 1] of the size that the guard is for.
        mean: mean of the pixels, as in `ClusterGuard`.
        std: standard deviation of the pixels, as in `ClusterGuard`.
        class_names: names of the classes, as in `ClusterGuard`.

    Returns:
        A guard with a `NearestTemplate` head of one template for each class. Its last linear layer hands on the costs
        as they are, and is frozen.

    Raises:
        ConfigurationError: the windows of the network are not known, or it does not return K maps.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> guard = make_local_guard(network, 2, example=torch.rand(1, 1, 9, 9))
        >>> guard.distances(torch.rand(5, 1, 9, 9)).shape
        torch.Size([5, 2])
    """
    head = NearestTemplate(num_classes, num_classes)
    guard = ClusterGuard(
        LocalCosts(network), head=head, mean=mean, std=std, example=example, class_names=class_names, classifier="new"
    )
    _, last = guard.encoder.children()
    assert isinstance(last, nn.Linear)
    if last.in_features != num_classes:
        raise ConfigurationError(f"expected a network that returns {num_classes} maps, got {last.in_features}")
    with torch.no_grad():  # the costs are the distances, which leaves nothing to learn here
        last.weight.copy_(torch.eye(num_classes))
        last.bias.zero_()
    last.requires_grad_(False)
    return guard
