"""An attack aimed at every wrong class in turn."""

from dataclasses import dataclass
from typing import final

import torch
from clusterguard.attacks._base import WrappingAttack, check_budget
from clusterguard.detection import Detector, class_margins, success_margin
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


@final
@dataclass(frozen=True, kw_only=True)
class MultiTarget(WrappingAttack):
    """Aim an attack at every wrong class in turn and keep what came closest to success.

    Choosing the nearest wrong class anew at each step gets stuck between classes; this does not.

    Args:
        attack: run once per target; ``stop_early`` in it saves work.
        max_targets: how many wrong classes to try per image, the most promising first; None tries all.

    Raises:
        ConfigurationError: fewer than one target.

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
            return self.attack(detector, images, labels, targets=targets, generator=generator)
        with torch.no_grad():
            promise = class_margins(detector.evidence(images), detector.thresholds)
            # An image that cannot be judged has infinite margins everywhere: its own label must still come last.
            promise = promise.clamp_max(torch.finfo(promise.dtype).max).scatter(1, labels[:, None], torch.inf)
            order = promise.argsort(dim=1)[:, : len(detector.thresholds) - 1][:, : self.max_targets]
        best, best_margin = images.clone(), images.new_full((len(images),), torch.inf)
        for column in order.T:
            rows = (best_margin > 0).nonzero().squeeze(1)  # what is broken stays as it is
            if not len(rows):
                break
            attacked = self.attack(detector, images[rows], labels[rows], targets=column[rows], generator=generator)
            with torch.no_grad():
                margin = success_margin(detector.evidence(attacked), detector.thresholds, labels[rows])
            better = margin < best_margin[rows]
            best[rows[better]], best_margin[rows[better]] = attacked[better], margin[better].to(best_margin.dtype)
        return best
