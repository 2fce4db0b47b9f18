"""Transfer: attack one detector, hand the images to another."""

from dataclasses import dataclass
from typing import final

from clusterguard._support import evaluation_mode
from clusterguard.attacks._base import WrappingAttack, check_attack_input, check_budget
from clusterguard.detection import Detector
from torch import Generator, Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Transfer(WrappingAttack):
    """Attack a surrogate, and hope that its mistakes are the victim's too; the victim is never asked for evidence.

    Args:
        surrogate: the detector that is attacked, calibrated, on the images' device, with the victim's classes; it is
            shared, not copied.
        attack: run on it.

    Raises:
        ConfigurationError: an option out of its range.

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
        with evaluation_mode(self.surrogate):
            return self.attack(self.surrogate, images, labels, targets=targets, generator=generator)
