"""Rules that say which cluster an attacked image belongs to."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from clusterguard._support import check_numbers
from clusterguard.attacks import Attack, get_norm
from clusterguard.errors import ConfigurationError
from torch import Tensor


class Relabel(ABC):
    """A rule for the share of an attacked image that belongs to the adversarial cluster.

    The rest of the image belongs to its original class.
    """

    def check(self, attack: Attack) -> None:  # noqa: B027  # most rules need nothing of the attack
        """Check that a training attack states what the rule needs.

        Raises:
            ConfigurationError: the attack does not state it.
        """

    @abstractmethod
    def shares(self, attack: Attack, images: Tensor, attacked: Tensor, got_through: Tensor) -> Tensor:
        """The share of each attacked image that belongs to the adversarial cluster.

        Args:
            attack: attack that was run.
            images: (B, C, H, W) images before the attack.
            attacked: (B, C, H, W) images after the attack.
            got_through: (B,) bools, whether the guard accepted the attacked image under a wrong label.

        Returns:
            Shares (B,) in [0, 1].
        """


@final
@dataclass(frozen=True)
class Separate(Relabel):
    """The paper's method, by which an attacked image that got through belongs to the adversarial cluster."""

    def shares(self, attack: Attack, images: Tensor, attacked: Tensor, got_through: Tensor) -> Tensor:
        """As in `Relabel`."""
        return got_through.float()


@final
@dataclass(frozen=True)
class Original(Relabel):
    """The paper's ablation L-Ben, by which every attacked image keeps its class.

    It is plain adversarial training of the same head.
    """

    def shares(self, attack: Attack, images: Tensor, attacked: Tensor, got_through: Tensor) -> Tensor:
        """As in `Relabel`."""
        return torch.zeros_like(got_through, dtype=torch.float32)


@final
@dataclass(frozen=True)
class Graded(Relabel):
    """Counts an image that got through as adversarial, by a share that grows with its perturbation.

    For a perturbation δ within radius ε, the share is 1 − (1 − ‖δ‖ / ε)^power, and the rest belongs to the image's
    class. The effect is that of a centre between the two clusters' centres. The attack must state a norm and a radius.

    Args:
        power: exponent, positive.

    Raises:
        ConfigurationError: the power is not positive.

    Reference:
        Stutz, Hein & Schiele, "Confidence-calibrated adversarial training" (2020).
    """

    power: float = 10.0

    def __post_init__(self) -> None:
        check_numbers(power=self.power)
        if not 0 < self.power < math.inf:
            raise ConfigurationError(f"expected a positive power, got {self.power}")

    def check(self, attack: Attack) -> None:
        """As in `Relabel`."""
        if getattr(attack, "norm", None) is None or not getattr(attack, "eps", None):
            raise ConfigurationError(f"expected an attack with a norm and a positive eps, to grade by, got {attack!r}")

    def shares(self, attack: Attack, images: Tensor, attacked: Tensor, got_through: Tensor) -> Tensor:
        """As in `Relabel`."""
        stated: Any = attack  # has a norm and a radius, because `check` refuses others
        size: Tensor = get_norm(stated.norm).size(attacked - images)
        shares: Tensor = got_through * (1 - (1 - size.float() / stated.eps).clamp(0, 1) ** self.power)
        return shares
