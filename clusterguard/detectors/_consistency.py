"""Refuse what changes its mind nearby: a detector that looks at an image's worst neighbour too."""

import math

import torch
from clusterguard._support import check_detector
from clusterguard.detection import Detector, Evidence
from clusterguard.detectors._base import DetectorModule
from clusterguard.errors import ConfigurationError
from torch import Tensor


class ConsistentDetector(DetectorModule):
    """Any detector, suspicious of an image if it is suspicious of a close neighbour under the same label.

    The neighbour lies in the ℓ∞ ball of `radius` around the image; a few deterministic steps up the suspicion of the
    image's own label find it. Class scores, and so labels, are the detector's. The suspicion of every label is the
    larger of the image's and the neighbour's: never less than the detector's own, and not finite where either is not.
    Thresholds are this detector's own; calibrate it as any other.

    One look at an image costs `steps` + 2 forward and `steps` backward passes of the detector, so it can be neither
    exported nor run without autograd. `attacks.metering.Metered` around the inner detector counts these, around this
    one it counts looks, as `evaluate` does.

    Attackers get a gradient straight through: that of both evaluations, the neighbour's offset held constant, though it
    depends on the image too. Attacks without gradients see the whole. Where the label changes, the search goes another
    way and the suspicion of the new label jumps up; an attack has to go on from there. Where the search finds no way
    up, a gradient of exactly 0, the neighbour is the image and nothing is gained: a detector that hides its gradients
    is not helped by this.

    Args:
        detector: whatever yields evidence; it is shared, not copied.
        radius: of the ball, positive, in units of pixels in [0, 1].
        steps: at least 1.
        step_size: length of a step, positive; None takes min(1, 2 / steps) times the radius.

    Raises:
        InputError: it yields no evidence.
        ConfigurationError: an option out of its range.

    Reference:
        After Chen et al., "Stratified adversarial robustness with rejection" (2023), who reject where the label itself
        changes.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> consistent, images = ConsistentDetector(guard, radius=0.1), torch.rand(3, 1, 4, 4)
        >>> bool((consistent.evidence(images).suspicion >= guard.evidence(images).suspicion).all())
        True
    """

    def __init__(self, detector: Detector, *, radius: float, steps: int = 3, step_size: float | None = None) -> None:
        check_detector(detector)
        super().__init__(len(detector.thresholds))
        length = radius * min(1.0, 2 / max(1, steps)) if step_size is None else step_size
        if not 0 < radius < math.inf or not 0 < length < math.inf:
            raise ConfigurationError(f"expected a positive radius and step_size, got {radius} and {step_size}")
        if steps < 1:
            raise ConfigurationError(f"expected at least 1 step, got {steps}")
        self.detector = detector
        self.radius = radius
        self.steps = steps
        self.step_size = length
        self.thresholds = torch.full_like(detector.thresholds, torch.nan)
        self.training = getattr(detector, "training", False)

    def extra_repr(self) -> str:
        """What is shown when the module is printed: the search."""
        return f"radius={self.radius:g}, steps={self.steps}, step_size={self.step_size:g}"

    def evidence(self, images: Tensor) -> Evidence:
        """The detector's class scores, and the larger suspicion of image and neighbour, of images (B, C, H, W).

        Raises:
            ConfigurationError: while a graph of it is made, which cannot hold the search's gradients.
        """
        if torch.compiler.is_compiling():
            raise ConfigurationError(
                "a ConsistentDetector takes gradients when it looks, which no exported graph can; export what it wraps"
            )
        here = self.detector.evidence(images)
        offset = self._offset(images, here.class_scores.detach().argmax(dim=1))
        nearby = self.detector.evidence(images + offset)
        return Evidence(here.class_scores, torch.maximum(here.suspicion, nearby.suspicion))

    def _offset(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W) from each image to its neighbour, without gradient."""
        with torch.inference_mode(False), torch.enable_grad():
            images, labels = images.detach().clone(), labels.clone()  # inference tensors take no part in autograd
            low, high = (images - self.radius).clamp_min(0), (images + self.radius).clamp_max(1)
            neighbours = images
            for _ in range(self.steps):
                leaf = neighbours.detach().requires_grad_()
                suspicion = self.detector.evidence(leaf).suspicion.gather(1, labels[:, None])
                if not suspicion.requires_grad:
                    raise ConfigurationError(
                        "expected evidence that is differentiable in the images, to search along; "
                        f"{type(self.detector).__name__} yields none"
                    )
                (gradient,) = torch.autograd.grad(suspicion.sum(), leaf)
                neighbours = (leaf.detach() + self.step_size * gradient.sign()).clamp(low, high)
            return neighbours - images
