"""Which cluster an attacked image belongs to."""

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
    """How much of an attacked image belongs to the adversarial cluster; the rest belongs to its original class."""

    def check(self, attack: Attack) -> None:  # noqa: B027  # most need nothing
        """Make sure that a training attack tells what is needed of it.

        Raises:
            ConfigurationError: it does not.
        """

    @abstractmethod
    def shares(self, attack: Attack, images: Tensor, attacked: Tensor, got_through: Tensor) -> Tensor:
        """The share of each attacked image that belongs to the adversarial cluster.

        Args:
            attack: that was run.
            images: (B, C, H, W) before it.
            attacked: (B, C, H, W) after it.
            got_through: (B,) bools, whether the guard accepted it under a wrong label.

        Returns:
            (B,) in [0, 1].
        """


@final
@dataclass(frozen=True)
class Separate(Relabel):
    """The paper's method: what got through belongs to the adversarial cluster."""

    def shares(self, attack: Attack, images: Tensor, attacked: Tensor, got_through: Tensor) -> Tensor:
        """As in `Relabel`."""
        return got_through.float()


@final
@dataclass(frozen=True)
class Original(Relabel):
    """Every attacked image keeps its class: the paper's ablation L-Ben, adversarial training of the same head."""

    def shares(self, attack: Attack, images: Tensor, attacked: Tensor, got_through: Tensor) -> Tensor:
        """As in `Relabel`."""
        return torch.zeros_like(got_through, dtype=torch.float32)


@final
@dataclass(frozen=True)
class Graded(Relabel):
    """What got through belongs to the adversarial cluster the more, the larger its perturbation is.

    A share of 1 − (1 − ‖δ‖ / ε)^power belongs there and the rest to its class, as if its centre lay between theirs. The
    attack must state a norm and a radius.

    Args:
        power: exponent, positive.

    Raises:
        ConfigurationError: a power that is not positive.

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
        stated: Any = attack  # has both, as `check` makes sure
        size: Tensor = get_norm(stated.norm).size(attacked - images)
        shares: Tensor = got_through * (1 - (1 - size.float() / stated.eps).clamp(0, 1) ** self.power)
        return shares
