"""A detector of several detectors, which accepts an image if each of them does and all agree on its label."""

from typing import cast, final

import torch
from clusterguard._support import check_calibrated
from clusterguard.detection import Detection, Evidence, class_margins
from clusterguard.detection._internal import is_finite
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
        ConfigurationError: there are fewer than two members, or one is no `DetectorModule`, or they differ in classes,
            in the shape of images, or in data types.
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
        shapes = {member.image_shape for member in members if isinstance(member.image_shape, tuple)}
        dtypes = {weight.dtype for member in members for weight in member.parameters() if weight.is_floating_point()}
        if len(shapes) > 1 or len(dtypes) > 1:
            raise ConfigurationError(
                f"expected members that take the same images, got the shapes {sorted(shapes)} and the data types "
                f"{sorted(map(str, dtypes))}; detector.float() converts one, which must then be calibrated again"
            )
        super().__init__(*classes, image_shape=next(iter(shapes), None))
        self.members = nn.ModuleList(members)
        self._check_members()
        self.class_names = next(iter(names - {None}), None)
        self.thresholds = torch.zeros_like(members[0].thresholds)
        self.training = self.members.training = any(member.training for member in members)

    @property
    def is_calibrated(self) -> bool:
        """Whether the thresholds of this detector and of all its members are finite."""
        return super().is_calibrated and all(member.is_calibrated for member in self.detectors)

    @property
    def detectors(self) -> tuple[DetectorModule, ...]:
        """The members, in their order."""
        return tuple(cast(DetectorModule, member) for member in self.members)

    def evidence(self, images: Tensor) -> Evidence:
        """The first member's class scores and the largest margins of all, (B, K), for images (B, C, H, W) in [0, 1]."""
        parts = [member.evidence(images) for member in self.detectors]
        pairs = zip(parts, self.detectors, strict=True)
        suspicion = torch.stack([class_margins(part, member.thresholds) for part, member in pairs]).amax(dim=0)
        # A class that a member never accepts has an infinite margin, for which the image must not be refused as others.
        is_judged = torch.stack([is_finite(part) for part in parts]).all(dim=0)
        largest = suspicion.clamp_max(torch.finfo(suspicion.dtype).max)
        return Evidence(parts[0].class_scores, torch.where(is_judged[:, None], largest, suspicion))

    def detect(self, images: Tensor, *, check: bool = True) -> Detection:
        """Label images and decide which to refuse, as `DetectorModule.detect` does.

        Args:
            images: (B, C, H, W) floating-point images in [0, 1].
            check: whether to check images and thresholds first, those of members too.

        Returns:
            Labels, their suspicion, and whether the image is refused, each (B,).

        Raises:
            InputError: images have a wrong shape, dtype or range. The range is checked only with `check`.
            NotCalibratedError: thresholds are missing, here or in a member. This is raised only with `check`.
        """
        if check:
            self._check_members()
        return super().detect(images, check=check)

    def _check_members(self) -> None:
        for member in self.detectors:
            check_calibrated(member.thresholds)
            if isinstance(member, UnanimousDetector):
                member._check_members()
