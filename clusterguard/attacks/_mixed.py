"""One attack of several, another each time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from clusterguard.attacks._base import Attack, BuiltInAttack, check_budget, scale
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@final
@dataclass(frozen=True, kw_only=True)
class MixedAttack(BuiltInAttack):
    """Run one of several attacks, chosen at random for each batch: training against several norms.

    Args:
        attacks: at least one, all equally likely.

    Raises:
        ConfigurationError: no attacks.

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
        """That of all of them; None if they differ."""
        norm: str | None = self._common("norm")
        return norm

    @property
    def eps(self) -> float | None:
        """That of all of them; None if they differ."""
        eps: float | None = self._common("eps")
        return eps

    def _common(self, name: str) -> Any:
        found = {getattr(attack, name, None) for attack in self.attacks}
        return found.pop() if len(found) == 1 else None

    def scaled(self, factor: float) -> "Self":
        """The same of scaled attacks.

        Args:
            factor: positive.
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
        return self.attacks[chosen](detector, images, labels, targets=targets, generator=generator)
