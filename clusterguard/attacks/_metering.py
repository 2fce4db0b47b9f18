"""The cost of an attack, as images judged and gradients taken, counted at the detector."""

from typing import Any, NamedTuple, final

from clusterguard.attacks._encoders import find_representation, has_representation
from clusterguard.detection import Detector, Evidence
from torch import Tensor, nn


class Cost(NamedTuple):
    """The number of images that a detector has processed.

    Attributes:
        forward: number of images judged; for an attack without gradients, these are its queries.
        backward: number of images for which a gradient was taken.
    """

    forward: int = 0
    backward: int = 0

    def __add__(self, other: tuple[Any, ...]) -> "Cost":
        """Both costs together."""
        return Cost(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class _Meter:
    """A running cost, which copies of a detector share."""

    def __init__(self) -> None:
        self.cost = Cost()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Meter":
        return self


@final
class Metered(nn.Module):
    """A detector that counts its images, which works for any attack because every attack must call the detector.

    Args:
        detector: detector to wrap, which is shared and not copied.

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
        self._meter = _Meter()
        self.training = getattr(detector, "training", False)
        if has_representation(detector):  # attacks on representations do not call `evidence`
            self.represent = self._represent

    @property
    def cost(self) -> Cost:
        """The number of images so far, those of copies of this detector included."""
        return self._meter.cost

    @property
    def thresholds(self) -> Tensor:
        """(K,) the thresholds of the detector."""
        return self.detector.thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Tensor) -> None:
        self.detector.thresholds = thresholds

    def evidence(self, images: Tensor) -> Evidence:
        """The detector's evidence on images (B, C, H, W), after counting them."""
        return self.detector.evidence(self._count(images))

    def _represent(self, images: Tensor) -> Tensor:
        return find_representation(self.detector)(self._count(images))

    def _count(self, images: Tensor) -> Tensor:
        self._meter.cost += (len(images), 0)
        if images.requires_grad:
            images = images.view_as(images)  # the hook then belongs to this call alone
            images.register_hook(self._count_gradient)
        return images

    def _count_gradient(self, gradient: Tensor) -> None:
        self._meter.cost += (0, len(gradient))
