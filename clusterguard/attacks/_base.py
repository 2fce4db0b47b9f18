"""The protocol of attacks, the base class of built-in ones, and checks of their input."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from clusterguard._support import (
    IN_GREY_LEVELS,
    check_calibrated,
    check_detector,
    check_images,
    check_labels,
    evaluation_mode,
)
from clusterguard.attacks._norms import get_norm
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError, InputError
from torch import Generator, Tensor

_LARGEST = torch.finfo(torch.float32).max


class Attack(Protocol):
    """An attack on a detector; any callable with this signature is one, also a plain function.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector, WithThresholds
        >>> from clusterguard import evaluate
        >>> def invert(detector, images, labels, *, targets=None, generator=None):
        ...     return 1 - images
        >>> pixels = ConfidenceDetector(torch.nn.Flatten(), num_classes=2)  # the brighter of two pixels
        >>> detector = WithThresholds(pixels, torch.full((2,), torch.inf))
        >>> batches = [(torch.tensor([[[[0.2, 0.7]]], [[[0.9, 0.1]]]]), torch.tensor([1, 0]))]
        >>> evaluate(detector, invert, batches, sanity_images=0).asr
        1.0
    """

    def __call__(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Attack images.

        Args:
            detector: detector to attack, which returns evidence and has thresholds.
            images: (B, C, H, W) in [0, 1].
            labels: (B,) true labels.
            targets: (B,) wrong labels to aim at; None aims at any wrong label.
            generator: randomness; None takes torch's global one.

        Returns:
            Attacked images (B, C, H, W).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class BuiltInAttack(ABC):
    """Base of the attacks of clusterguard, which are frozen keyword-only dataclasses.

    A call checks its input first and runs the detector in eval mode. Afterwards every module's mode and every
    parameter's gradient are as before. A call also works under ``no_grad`` and ``inference_mode``, and returns
    detached images.

    Args:
        batch_size: number of images to attack at a time, which limits memory; None attacks all at once.
    """

    batch_size: int | None = None

    _needs_evidence: ClassVar[bool] = True  # False for attacks that need verdicts only

    def __call__(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Attack images.

        Args:
            detector: detector to attack, which returns evidence and has thresholds.
            images: (B, C, H, W), finite, in [0, 1], float32 or float64.
            labels: (B,) true labels.
            targets: (B,) wrong labels to aim at; None aims at any wrong label.
            generator: randomness, on the images' device; None takes torch's global one.

        Returns:
            Attacked images (B, C, H, W), in [0, 1] and within the attack's budget around the images.

        Raises:
            InputError: images, labels or targets have a wrong shape, dtype, range or device.
            NotCalibratedError: the detector has no thresholds.
            ConfigurationError: the radius is so large that the ball around an image contains every other image.
        """
        check_attack_input(detector, images, labels, targets, needs_evidence=self._needs_evidence)
        return self._attack_checked(detector, images, labels, targets, generator)

    def _attack_checked(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        """The attacked images (B, C, H, W) of a call whose input `check_attack_input` has accepted."""
        check_radius(self, images)
        if not len(images):
            return images
        with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(detector) as detector:
            # Inference tensors cannot take part in autograd; a clone made outside inference mode can.
            images, labels = images.detach().clone(), labels.long().clone()
            targets = None if targets is None else targets.long().clone()
            size = len(images) if self.batch_size is None else self.batch_size
            parts = [
                self._perturb(
                    detector, images[rows], labels[rows], targets if targets is None else targets[rows], generator
                )
                for rows in torch.arange(len(images), device=images.device).split(size)
            ]
        return torch.cat(parts).detach()

    def scaled(self, factor: float) -> Self:
        """The same attack with radius and step size multiplied by a factor, for schedules.

        Args:
            factor: factor of radius and step size, positive.

        Raises:
            ConfigurationError: the attack has no radius.
        """
        names = {option.name for option in fields(self)} & {"eps", "step_size"}
        if "eps" not in names:
            raise ConfigurationError(f"expected an attack with a radius eps, got {self!r}")
        changed = {name: factor * getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **changed)

    @abstractmethod
    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        """The attacked images of one batch, whose input has been checked."""


@dataclass(frozen=True, kw_only=True)
class WrappingAttack(BuiltInAttack):
    """Base of attacks that wrap another attack and have the same budget.

    Args:
        attack: attack inside.
    """

    attack: Attack

    def scaled(self, factor: float) -> Self:
        """The same wrapper around the scaled inner attack.

        Args:
            factor: factor of radius and step size, positive.

        Raises:
            ConfigurationError: the inner attack cannot be scaled.
        """
        return replace(self, attack=scale(self.attack, factor))

    @property
    def norm(self) -> str | None:
        """The norm of the inner attack."""
        return getattr(self.attack, "norm", None)

    @property
    def eps(self) -> float | None:
        """The radius of the inner attack."""
        return getattr(self.attack, "eps", None)

    @property
    def precision(self) -> str | None:
        """The precision in which the inner attack searches; None if it has no such option."""
        return getattr(self.attack, "precision", None)


def attack_checked_images(
    attack: Attack,
    detector: Detector,
    images: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Run an attack on a copy of input that `check_attack_input` has accepted. A built-in attack checks nothing again.

    The arguments and the result are those of a call of the attack. An attack of one's own may write into its arguments,
    which the caller still compares with the result, and gives to other attacks.
    """
    images, labels = images.clone(), labels.clone()
    targets = None if targets is None else targets.clone()
    if isinstance(attack, BuiltInAttack) and type(attack).__call__ is BuiltInAttack.__call__:
        return attack._attack_checked(detector, images, labels, targets, generator)
    if targets is None:  # an attack of one's own need not take any
        return attack(detector, images, labels, generator=generator)
    return attack(detector, images, labels, targets=targets, generator=generator)


def scale(attack: Attack, factor: float) -> Attack:
    """The attack with its radius and step size multiplied by a factor.

    Args:
        attack: attack with a method `scaled`.
        factor: factor of radius and step size, positive.

    Raises:
        ConfigurationError: the attack has no method `scaled`, or cannot be scaled.
    """
    scaled: Callable[[float], Attack] | None = getattr(attack, "scaled", None)
    if scaled is None:
        raise ConfigurationError(
            f"expected an attack with a method scaled(factor), as the built-in ones have, got {attack!r}"
        )
    return scaled(factor)


def ramp(attack: Attack, done: float, length: float) -> Attack:
    """The attack scaled by done / length, by at least 0.001 and at most 1.

    Args:
        attack: attack with a method `scaled`, which is not needed after the ramp.
        done: number of epochs since the ramp began, at least 0.
        length: number of epochs of the ramp, at least 0; with 0 there is no ramp.
    """
    return attack if done >= length else scale(attack, max(done / length, 1e-3))


def shorten_steps(attack: Attack, factor: float) -> Attack:
    """The attack with its step size multiplied by a factor, in the same ball.

    Attacks without the option `step_size` are returned as they are. Attacks inside wrappers are shortened too.

    Args:
        attack: any attack.
        factor: factor of the step size, positive.

    Example:
        >>> from clusterguard.attacks import PGD, NoisyFGSM
        >>> shorten_steps(PGD(eps=0.5, step_size=0.25), 0.5).step_size, shorten_steps(NoisyFGSM(eps=0.5), 0.5).step_size
        (0.125, 0.25)
    """
    given: Any = attack
    if factor == 1 or not is_dataclass(given) or isinstance(given, type):
        return attack
    options = {option.name: getattr(given, option.name) for option in fields(given)}
    changed: dict[str, Any] = {}
    if "step_size" in options:
        changed["step_size"] = factor * (options["eps"] if options["step_size"] is None else options["step_size"])
    if "attack" in options:
        changed["attack"] = shorten_steps(options["attack"], factor)
    if "attacks" in options:
        changed["attacks"] = tuple(shorten_steps(inner, factor) for inner in options["attacks"])
    return cast(Attack, replace(given, **changed)) if changed else attack


def check_attack_input(
    detector: Detector,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    *,
    needs_evidence: bool = True,
) -> None:
    """Check the input of an attack before any work.

    Args:
        detector: detector to attack.
        images: (B, C, H, W) in [0, 1], finite, float32 or float64.
        labels: (B,) true labels.
        targets: (B,) wrong labels to aim at, or None.
        needs_evidence: whether the attack needs the detector's evidence, and not only verdicts.

    Raises:
        InputError: images, labels or targets have a wrong shape, dtype, range or device, or the detector has no
            evidence.
        NotCalibratedError: the detector has no thresholds.
    """
    if needs_evidence:
        check_detector(detector)
    check_images(images)
    if images.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"expected images in float32 or float64, got {images.dtype}, whose rounding would leave the ball; "
            "attack copy.deepcopy(detector).float()"
        )
    if not images.isfinite().all():
        raise InputError("expected finite images, got NaN or infinite pixels; a guard refuses those without an attack")
    thresholds: Tensor | None = getattr(detector, "thresholds", None)
    # The number of classes is unknown for a black box that returns verdicts only.
    num_classes = 2**31 if thresholds is None else len(thresholds)
    if thresholds is not None and images.device != thresholds.device:
        raise InputError(
            f"expected images on {thresholds.device} like the detector, got {images.device}; "
            "move one of them with .to(device)"
        )
    check_labels(labels, images, num_classes)
    if targets is not None:
        check_labels(targets, images, num_classes, name="targets")
        if (targets == labels).any():
            raise InputError("expected targets that differ from the labels, got at least one that is equal")
    if thresholds is not None:
        check_calibrated(thresholds)


def check_radius(attack: object, images: Tensor) -> None:
    """Refuse an attack whose radius is larger than any change of an image, because its units must be wrong.

    Args:
        attack: any attack; one without a norm or eps, or with eps +inf, has no budget and passes.
        images: (B, C, H, W), of which only the shape matters.

    Raises:
        ConfigurationError: eps is larger than any change of such an image can be.
    """
    name, eps = getattr(attack, "norm", None), getattr(attack, "eps", None)
    if name is None or not isinstance(eps, int | float) or math.isinf(eps):
        return
    largest = get_norm(name).largest(images.shape[1:])
    if eps > largest * (1 + 1e-6):
        raise ConfigurationError(
            f"expected eps of at most {largest:.6g} in {name}, which is all that can change in an image of shape "
            f"{tuple(images.shape[1:])} with pixels in [0, 1], got {eps:g}; {IN_GREY_LEVELS}"
        )


def check_budget(
    *,
    eps: float,
    norm: str | None = None,
    steps: int = 1,
    step_size: float = 1.0,
    batch_size: int | None = None,
    may_be_unbounded: bool = False,
) -> None:
    """Check options that many attacks have.

    Args:
        eps: radius in the norm.
        norm: name of the norm, whose `limit` is checked; None has no limit. A limit that depends on the size of the
            images is checked by `check_radius`.
        steps: number of steps.
        step_size: length of a step.
        batch_size: number of images to attack at a time; None attacks all at once.
        may_be_unbounded: whether eps may be +inf.

    Raises:
        ConfigurationError: eps is negative, too large, or infinite although it may not be; `steps` or `batch_size` is
            below 1; or `step_size` is not positive and finite.
    """
    if not eps >= 0 or not (may_be_unbounded or eps <= _LARGEST):
        raise ConfigurationError(f"expected a finite eps of at least 0, got {eps}")
    limit = math.inf if norm is None else get_norm(norm).limit
    if limit < eps < math.inf:
        raise ConfigurationError(
            f"expected eps in [0, {limit:g}] in {norm}, because pixels are in [0, 1], got {eps:g}; {IN_GREY_LEVELS}"
        )
    if steps < 1:
        raise ConfigurationError(f"expected at least 1 step, got {steps}")
    if not 0 < step_size <= _LARGEST:
        raise ConfigurationError(f"expected a positive, finite step_size, got {step_size}")
    if batch_size is not None and batch_size < 1:
        raise ConfigurationError(f"expected a batch_size of at least 1, got {batch_size}")
