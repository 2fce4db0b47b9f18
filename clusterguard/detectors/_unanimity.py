"""A detector of several detectors, which accepts an image if each of them does and all agree on its label."""

from typing import final

import torch
from clusterguard._support import check_calibrated
from clusterguard.detection import Evidence, class_margins
from clusterguard.detectors._base import DetectorModule
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn


@final
class UnanimousDetector(DetectorModule):
    """Accepts an image if each of its members accepts it, all under the same label.

    An attack has to break all members with one image. So what is proved of one member is proved of this detector:
    `certify` proves an image if it proves it for any member. A guard with certificates in l∞ and one with certificates
    in l0 make a detector with both. The price is paid by benign images: each member refuses some, and members disagree
    about others.

    The class scores are those of the first member. The suspicion of a class is the largest of the members' margins for
    it, see `clusterguard.detection.class_margins`. So the thresholds are 0. A `Calibrator` may lower them; larger ones
    would accept images that a member refuses, which makes the proofs void.

    Args:
        members: at least two calibrated detectors of the same classes. They are shared, not copied, so a member that is
            calibrated again decides with its new thresholds here, too.

    Raises:
        ConfigurationError: there are fewer than two members, or one is no `DetectorModule`, or numbers or names of
            classes differ.
        NotCalibratedError: a member has no thresholds.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector
        >>> bright = ConfidenceDetector(nn.Flatten(), num_classes=2, mean=[0.0], std=[1.0])
        >>> brighter = ConfidenceDetector(nn.Flatten(), num_classes=2, mean=[0.0], std=[0.1])
        >>> bright.thresholds, brighter.thresholds = torch.tensor([0.6, 0.6]), torch.tensor([0.1, 0.1])
        >>> images = torch.tensor([[[[0.1, 0.2]]], [[[0.1, 0.9]]]])
        >>> UnanimousDetector(bright, brighter).detect(images).is_adversarial
        tensor([ True, False])
    """

    def __init__(self, *members: DetectorModule) -> None:
        others = [type(member).__name__ for member in members if not isinstance(member, DetectorModule)]
        if len(members) < 2 or others:
            raise ConfigurationError(f"expected at least two detectors that are modules, got {others or len(members)}")
        classes, names = {member.num_classes for member in members}, {member.class_names for member in members}
        if len(classes) > 1 or len(names - {None}) > 1:
            raise ConfigurationError(
                f"expected members of the same classes, got {sorted(classes)} classes and the names {names}"
            )
        for member in members:
            check_calibrated(member.thresholds)
        super().__init__(*classes)
        self.members = nn.ModuleList(members)
        self.class_names = next(iter(names - {None}), None)
        self.thresholds = torch.zeros_like(members[0].thresholds)
        self.training = any(member.training for member in members)

    @property
    def is_calibrated(self) -> bool:
        """Whether the thresholds of this detector and of all its members are finite."""
        return super().is_calibrated and all(member.is_calibrated for member in self.detectors)

    @property
    def detectors(self) -> tuple[DetectorModule, ...]:
        """The members, in their order."""
        return tuple(member for member in self.members if isinstance(member, DetectorModule))

    def evidence(self, images: Tensor) -> Evidence:
        """The class scores of the first member, and the largest margin of all members, for images (B, C, H, W)."""
        parts = [member.evidence(images) for member in self.detectors]
        margins = [class_margins(part, member.thresholds) for part, member in zip(parts, self.detectors, strict=True)]
        return Evidence(parts[0].class_scores, torch.stack(margins).amax(dim=0))
