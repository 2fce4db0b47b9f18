"""Orthogonal PGD, which fools the classification and the detection in turn, without one step undoing the other."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from clusterguard.attacks._descent import Gradient, ObjectiveValues, Problem, UpdateRule
from clusterguard.attacks._gradients import gradient_at
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._objectives import Objective, logit
from clusterguard.attacks._pgd import SteppedAttack
from clusterguard.detection import success_margin
from clusterguard.errors import ConfigurationError
from torch import Tensor

Strategy = Literal["orthogonal", "selective"]


@final
@dataclass(frozen=True, kw_only=True)
class OrthogonalPGD(SteppedAttack):
    """PGD for detectors whose suspicion is separate from the class scores, where the sum of both losses gets stuck.

    Each step follows one of two gradients. It follows that of the classification loss until the label is wrong (or is
    the target), and that of the suspicion from then on. A step costs one forward and two backward passes.

    Args:
        strategy: treatment of the gradient. "selective" takes it as it is, and "orthogonal" first removes its component
            along the other gradient, so that to first order a step on one loss does not change the other loss.
        objective: classification loss, a name of `clusterguard.attacks.OBJECTIVES` or a callable. The other loss is the
            suspicion minus the threshold, of the target or of the wrong class with the largest score.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Bryniarski et al., "Evading adversarial example detection defenses with orthogonal projected gradient descent"
        (2021).

    Example:
        >>> OrthogonalPGD(norm="l2", eps=1.0, step_size=0.1).strategy
        'orthogonal'
    """

    objective: str | Objective = "logit"
    strategy: Strategy = "orthogonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in ("orthogonal", "selective"):
            raise ConfigurationError(f"expected strategy 'orthogonal' or 'selective', got {self.strategy!r}")

    def _gradient(self, rule: UpdateRule) -> Gradient:
        return _Alternating(self.strategy)


@dataclass(frozen=True)
class _Alternating:
    """The gradient of the classification loss or, for images with a wrong label already, that of the suspicion."""

    strategy: Strategy

    def __call__(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        labels, targets, thresholds = problem.labels, problem.targets, problem.detector.thresholds
        with torch.enable_grad():
            leaf = iterates.detach().requires_grad_()
            evidence = problem.detector.evidence(leaf)
            classification = problem.objective(evidence, thresholds, labels, targets)
            others = evidence.class_scores.detach().scatter(1, labels[:, None], -torch.inf)
            aim = others.argmax(dim=1) if targets is None else targets
            detection = evidence.suspicion.gather(1, aim[:, None]).squeeze(1) - thresholds[aim]
            away = gradient_at(leaf, classification, problem.detector, again=True)
            below = gradient_at(leaf, detection, problem.detector)
        with torch.no_grad():
            fooled = logit(evidence, thresholds, labels, targets) < 0
            margin = success_margin(evidence, thresholds, labels, targets)
            wide = fooled[:, None, None, None]
            gradient, other = torch.where(wide, below, away), torch.where(wide, away, below)
            if self.strategy == "orthogonal":
                gradient = _without(gradient, other)
        return ObjectiveValues(torch.where(fooled, detection, classification).detach(), margin, gradient)


def _without(gradients: Tensor, others: Tensor) -> Tensor:
    """Gradients without their component along the others, or the gradients themselves if only rounding is left."""
    l2 = get_norm("l2")
    gradients, others = l2.direction(gradients), l2.direction(others)
    rest = gradients - (gradients * others).sum(dim=(1, 2, 3), keepdim=True) * others
    parallel = l2.size(rest) < 100 * torch.finfo(rest.dtype).eps
    return torch.where(parallel[:, None, None, None], gradients, rest)
