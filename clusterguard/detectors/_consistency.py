"""A detector that also evaluates the most suspicious neighbour it finds around an image."""

import math

import torch
from clusterguard._support import check_detector, is_traced
from clusterguard.detection import Detector, Evidence
from clusterguard.detectors._base import DetectorModule
from clusterguard.errors import ConfigurationError
from torch import Tensor


class ConsistentDetector(DetectorModule):
    """Wraps a detector, and is also suspicious of an image if a close neighbour is suspicious under the same label.

    The neighbour lies in the ℓ∞ ball of `radius` around the image. A few deterministic gradient steps find it. They
    increase the suspicion of the label that the image has. Class scores, and so labels, are those of the wrapped
    detector for the image. The suspicion of every label is the larger one of the image and the neighbour. So it is
    never less than in the wrapped detector, and it is not finite if either of the two is not. The thresholds do not
    come from the wrapped detector; calibrate this detector like any other.

    Judging an image costs `steps` + 2 forward and `steps` backward passes of the wrapped detector. So this detector
    needs autograd and cannot be exported. `attacks.metering.Metered` around the wrapped detector counts these passes.
    Around this detector it counts judged images, as `evaluate` does.

    A gradient of this detector is the gradient of both evaluations, in which the offset of the neighbour is held
    constant although it depends on the image. Attacks without gradients see the full dependence. When the label of an
    image changes, the search climbs the suspicion of the new label, which may jump up, and an attack has to continue
    from there. If the gradient in the search is exactly 0, the neighbour is the image itself. So this wrapper does not
    help a detector that hides its gradients.

    Args:
        detector: detector that yields evidence; it is shared, not copied.
        radius: positive radius of the ball, in units of pixels in [0, 1].
        steps: number of gradient steps, at least 1.
        step_size: positive length of a step; None takes min(1, 2 / steps) times the radius.

    Raises:
        InputError: the detector yields no evidence.
        ConfigurationError: an option is out of its range.

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
        """The options of the search, which are shown when the module is printed."""
        return f"radius={self.radius:g}, steps={self.steps}, step_size={self.step_size:g}"

    def evidence(self, images: Tensor) -> Evidence:
        """The class scores of images (B, C, H, W), and the larger suspicion of each image and its neighbour.

        Raises:
            ConfigurationError: the detector is being exported or compiled. A graph cannot hold the search's gradients.
        """
        if is_traced():
            raise ConfigurationError(
                "a ConsistentDetector needs gradients to judge images, and no exported graph has them; "
                "export what it wraps"
            )
        here = self.detector.evidence(images)
        offset = self._offset(images, here.class_scores.detach().argmax(dim=1))
        nearby = self.detector.evidence(images + offset)
        return Evidence(here.class_scores, torch.maximum(here.suspicion, nearby.suspicion))

    def _offset(self, images: Tensor, labels: Tensor) -> Tensor:
        """The offset (B, C, H, W) from each image to its neighbour, without a gradient."""
        with torch.inference_mode(False), torch.enable_grad():
            images, labels = images.detach().clone(), labels.clone()  # autograd cannot use inference tensors
            low, high = (images - self.radius).clamp_min(0), (images + self.radius).clamp_max(1)
            neighbours = images
            for _ in range(self.steps):
                leaf = neighbours.detach().requires_grad_()
                suspicion = self.detector.evidence(leaf).suspicion.gather(1, labels[:, None])
                if not suspicion.requires_grad:
                    raise ConfigurationError(
                        "expected evidence that is differentiable in the images, which the search needs; that of "
                        f"{type(self.detector).__name__} has no gradient"
                    )
                (gradient,) = torch.autograd.grad(suspicion.sum(), leaf)
                neighbours = (leaf.detach() + self.step_size * gradient.sign()).clamp(low, high)
            return neighbours - images
