"""What an attack costs: images judged, and images differentiated, counted at the detector."""

from typing import Any, NamedTuple

from clusterguard.attacks._representation import find_representation, has_representation
from clusterguard.detection import Detector, Evidence
from torch import Tensor, nn


class Cost(NamedTuple):
    """How often a detector was asked.

    Attributes:
        forward: images judged; without gradients these are an attacker's queries.
        backward: images through which a gradient was taken.
    """

    forward: int = 0
    backward: int = 0

    def __add__(self, other: tuple[Any, ...]) -> "Cost":
        """Both costs together."""
        return Cost(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Metered(nn.Module):
    """The same detector, counting; it works for anybody's attack, since all must ask the detector.

    Args:
        detector: whatever yields evidence and thresholds; it is shared, not copied.

    Example:
        >>> import torch
        >>> from clusterguard import PGD, ClusterGuard
        >>> guard = ClusterGuard(nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 2, 2))
        >>> guard.thresholds = torch.full((2,), 8.0)
        >>> metered = Metered(guard)
        >>> attacked = PGD(eps=0.1, step_size=0.1, steps=5)(metered, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))
        >>> metered.cost
        Cost(forward=18, backward=15)
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.cost = Cost()
        if has_representation(detector):  # attacks on representations do not ask for evidence
            represent = find_representation(detector)
            self.represent = lambda images: represent(self._count(images))

    @property
    def thresholds(self) -> Tensor:
        """(K,) the detector's."""
        return self.detector.thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Tensor) -> None:
        self.detector.thresholds = thresholds

    def evidence(self, images: Tensor) -> Evidence:
        """The detector's evidence on images (B, C, H, W), which are counted."""
        return self.detector.evidence(self._count(images))

    def _count(self, images: Tensor) -> Tensor:
        self.cost = self.cost._replace(forward=self.cost.forward + len(images))
        if images.requires_grad:
            images = images.view_as(images)  # a hook of this call alone, fired once per gradient taken through it
            images.register_hook(self._count_gradient)
        return images

    def _count_gradient(self, gradient: Tensor) -> None:
        self.cost = self.cost._replace(backward=self.cost.backward + len(gradient))
