"""Attacks made of other attacks, with several targets, as a random mixture, or on a surrogate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from clusterguard._support import evaluation_mode
from clusterguard.attacks._base import (
    Attack,
    BuiltInAttack,
    WrappingAttack,
    attack_checked_images,
    check_attack_input,
    check_budget,
    scale,
)
from clusterguard.detection import Detector, class_margins, success_margin
from clusterguard.errors import ConfigurationError
from einops import rearrange
from torch import Generator, Tensor


@final
@dataclass(frozen=True, kw_only=True)
class MultiTarget(WrappingAttack):
    """An attack that aims another attack at every wrong class in turn, and keeps the image closest to success.

    An attack that chooses the nearest wrong class again at each step can get stuck between classes. This one cannot. If
    few images are left, several classes are tried at once, because small batches use a processor badly.

    Args:
        attack: attack to run once for each target; its option ``stop_early`` saves work.
        max_targets: number of wrong classes to try for each image, the most promising first; None tries all.

    Raises:
        ConfigurationError: `max_targets` is below 1.

    Reference:
        Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing" (2019).

    Example:
        >>> from clusterguard import PGD
        >>> MultiTarget(attack=PGD(eps=0.3, step_size=0.01)).max_targets is None
        True
    """

    max_targets: int | None = None

    def __post_init__(self) -> None:
        check_budget(eps=0, batch_size=self.batch_size)
        if self.max_targets is not None and self.max_targets < 1:
            raise ConfigurationError(f"expected max_targets of at least 1, got {self.max_targets}")

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        if targets is not None:
            return attack_checked_images(self.attack, detector, images, labels, targets=targets, generator=generator)
        with torch.no_grad():
            promise = class_margins(detector.evidence(images), detector.thresholds)
            # An image that cannot be judged has infinite margins for all classes, and its label must still come last.
            promise = promise.clamp_max(torch.finfo(promise.dtype).max).scatter(1, labels[:, None], torch.inf)
            order = promise.argsort(dim=1)[:, : len(detector.thresholds) - 1][:, : self.max_targets]
        best, best_margin, tried = images.clone(), images.new_full((len(images),), torch.inf), 0
        while tried < order.shape[1]:
            rows = (best_margin > 0).nonzero().squeeze(1)  # broken images stay as they are
            if not len(rows):
                break
            aims = order[rows, tried : tried + max(1, self._limit(images) // len(rows))]
            attacked, margin = self._aim(detector, images[rows], labels[rows], aims, generator)
            better = margin < best_margin[rows]
            best[rows[better]], best_margin[rows[better]] = attacked[better], margin[better].to(best_margin.dtype)
            tried += aims.shape[1]
        return best

    def _limit(self, images: Tensor) -> int:
        """The number of attacked images up to which a larger batch takes little more time for each step."""
        limit = 32 if images.device.type == "cpu" else 512
        return limit if self.batch_size is None else min(limit, self.batch_size)

    def _aim(
        self, detector: Detector, images: Tensor, labels: Tensor, aims: Tensor, generator: Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Aim at several classes (B, n) of each image at once: the best attacked images and their margins (B,)."""
        count = aims.shape[1]
        repeated = (part.repeat_interleave(count, dim=0) for part in (images, labels))
        attacked = attack_checked_images(self.attack, detector, *repeated, targets=aims.flatten(), generator=generator)
        with torch.no_grad():
            margins = success_margin(detector.evidence(attacked), detector.thresholds, labels.repeat_interleave(count))
        margins = rearrange(margins.nan_to_num(torch.inf), "(b n) -> b n", n=count)
        margin, chosen = margins.min(dim=1)
        return rearrange(attacked, "(b n) c h w -> b n c h w", n=count)[torch.arange(len(images)), chosen], margin


@final
@dataclass(frozen=True, kw_only=True)
class MixedAttack(BuiltInAttack):
    """An attack that runs one of several attacks, chosen at random for each batch, to train against several norms.

    Args:
        attacks: attacks to choose from, at least one, all equally likely.

    Raises:
        ConfigurationError: there are no attacks.

    Reference:
        Maini, Wong & Kolter, "Adversarial robustness against the union of multiple perturbation models" (2020).

    Example:
        >>> from clusterguard import PGD
        >>> linf, l2 = PGD(eps=0.3, step_size=0.06), PGD(norm="l2", eps=2.0, step_size=0.4)
        >>> len(MixedAttack(attacks=(linf, l2)).attacks)
        2
    """

    attacks: Sequence[Attack]

    def __post_init__(self) -> None:
        check_budget(eps=0, batch_size=self.batch_size)
        if not self.attacks:
            raise ConfigurationError("expected at least one attack, got none")

    @property
    def norm(self) -> str | None:
        """The norm of all attacks; None if they differ."""
        norm: str | None = self._common("norm")
        return norm

    @property
    def eps(self) -> float | None:
        """The radius of all attacks; None if they differ."""
        eps: float | None = self._common("eps")
        return eps

    def _common(self, name: str) -> Any:
        values = {getattr(attack, name, None) for attack in self.attacks}
        return values.pop() if len(values) == 1 else None

    def scaled(self, factor: float) -> Self:
        """The same mixture of scaled attacks.

        Args:
            factor: factor of radii and step sizes, positive.
        """
        return replace(self, attacks=tuple(scale(attack, factor) for attack in self.attacks))

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        device = None if generator is None else generator.device
        chosen = int(torch.randint(len(self.attacks), (), generator=generator, device=device))
        attack = self.attacks[chosen]
        return attack_checked_images(attack, detector, images, labels, targets=targets, generator=generator)


@final
@dataclass(frozen=True, kw_only=True)
class Transfer(WrappingAttack):
    """An attack on a surrogate, whose attacked images may also fool the victim; the victim is never queried.

    Args:
        surrogate: calibrated detector to attack, on the images' device and with the victim's classes; it is shared and
            not copied.
        attack: attack to run on the surrogate.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Papernot et al., "Transferability in machine learning: from phenomena to black-box attacks using adversarial
        samples" (2016).

    Example:
        >>> import torch
        >>> from clusterguard import PGD
        >>> from clusterguard.detectors import ConfidenceDetector, WithThresholds
        >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> undefended = WithThresholds(ConfidenceDetector(classifier, 3), torch.full((3,), torch.inf))
        >>> attack = Transfer(surrogate=undefended, attack=PGD(eps=0.1, step_size=0.02, objective="logit"))
        >>> attack.eps
        0.1
    """

    surrogate: Detector

    _needs_evidence = False

    def __post_init__(self) -> None:
        check_budget(eps=0, batch_size=self.batch_size)

    def __repr__(self) -> str:
        surrogate = type(self.surrogate).__name__
        return f"Transfer(batch_size={self.batch_size}, surrogate={surrogate}, attack={self.attack!r})"

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        check_attack_input(self.surrogate, images, labels, targets)
        with evaluation_mode(self.surrogate) as surrogate:
            return attack_checked_images(self.attack, surrogate, images, labels, targets=targets, generator=generator)
