"""The classics without options: FGSM and BIM, both PGD with a schedule that follows from the radius."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

from clusterguard.attacks._base import BuiltInAttack
from clusterguard.attacks._iterative import PGD
from clusterguard.attacks._objectives import Objective
from clusterguard.detection import Detector
from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class FixedSchedule(BuiltInAttack):
    """PGD from the image, last iterate, with equal steps that add up to the radius.

    Args:
        norm: "linf", "l2", "l1" or "l0".
        eps: radius of the ball, at least 0.
        objective: what to minimise, a name of `clusterguard.attacks._objectives` or a callable.
    """

    norm: str = "linf"
    eps: float
    objective: str | Objective = "suspicion"

    def __post_init__(self) -> None:
        self.as_pgd()

    @abstractmethod
    def as_pgd(self) -> PGD:
        """The same attack, spelled out."""

    def _spell_out(self, steps: int) -> PGD:
        return PGD(
            norm=self.norm,
            eps=self.eps,
            step_size=self.eps / max(1, steps) or 1.0,
            steps=steps,
            keep="last",
            objective=self.objective,
            batch_size=self.batch_size,
        )

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        return self.as_pgd()._perturb(detector, images, labels, targets, generator)


@final
@dataclass(frozen=True, kw_only=True)
class FGSM(FixedSchedule):
    """The fast gradient sign method: one step of the whole radius.

    Raises:
        ConfigurationError: an option out of its range.

    Reference:
        Goodfellow et al., "Explaining and harnessing adversarial examples" (2015).

    Example:
        >>> FGSM(eps=0.1).as_pgd().step_size
        0.1
    """

    def as_pgd(self) -> PGD:
        """One step of PGD."""
        return self._spell_out(1)


@final
@dataclass(frozen=True, kw_only=True)
class BIM(FixedSchedule):
    """The basic iterative method.

    Args:
        steps: at least 1.

    Raises:
        ConfigurationError: an option out of its range.

    Reference:
        Kurakin, Goodfellow & Bengio, "Adversarial examples in the physical world" (2017).

    Example:
        >>> BIM(eps=0.3).as_pgd().step_size
        0.03
    """

    steps: int = 10

    def as_pgd(self) -> PGD:
        """The steps of PGD."""
        return self._spell_out(self.steps)
