"""The attack σ-zero, a minimum-norm attack for l0 that descends a smooth count of the changed pixels."""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from clusterguard.attacks._adam import Adam
from clusterguard.attacks._descent import ObjectiveValues, Problem, backpropagate
from clusterguard.attacks._norm_base import rescale
from clusterguard.attacks._norms import L0
from clusterguard.attacks._objectives import Objective
from clusterguard.attacks._pgd import IteratedAttack
from clusterguard.errors import ConfigurationError
from torch import Tensor

_LAST_RATE = 0.1  # share of the learning rate that is left at the end of the cosine


@final
@dataclass(frozen=True, kw_only=True)
class SigmaZero(IteratedAttack):
    """σ-zero, which lowers the objective and the number of changed pixels together, for the smallest l0 perturbation.

    It may leave the budget on its way. Until success it minimises ``objective + count / pixels`` by Adam, and then the
    second term alone. The count of changed pixels is smooth: a pixel with squared change q counts as ``q / (q + σ)``.
    After each step, pixels that have changed by less than a threshold go back to their clean values. The threshold
    rises after a success and falls after a failure, for each image. Only perturbations within the budget count as
    successes. A step costs one gradient.

    With ``keep="nearest"`` and eps at the number of pixels, it returns the sparsest perturbation that it has found.

    Args:
        eps: number of pixels that may change, at least 0.
        learning_rate: learning rate of Adam, positive, in pixel units; it falls along a cosine to a tenth.
        smoothing: σ of the smooth count, positive; the smaller, the closer to a true count.
        threshold: first change below which a pixel goes back, in [0, 1].
        adjustment: change of the threshold per learning rate at each step, at least 0.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Cinà et al., "σ-zero: gradient-based optimization of l0-norm adversarial examples" (2025), algorithm 1. There
        coordinates are counted, here pixels with all their channels.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = SigmaZero(eps=5, steps=20)(guard, images, labels)
        >>> int((attacked != images).flatten(1).sum(dim=1).max()) <= 5
        True
    """

    norm: str = field(default=L0.name, init=False)
    steps: int = 100
    objective: str | Objective = "margin"
    learning_rate: float = 1.0
    smoothing: float = 1e-3
    threshold: float = 0.3
    adjustment: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.learning_rate < math.inf and 0 < self.smoothing < math.inf):
            raise ConfigurationError(
                f"expected positive, finite learning_rate and smoothing, got {self.learning_rate}, {self.smoothing}"
            )
        if not (0 <= self.threshold <= 1 and 0 <= self.adjustment < math.inf):
            raise ConfigurationError(
                "expected a threshold in [0, 1] and a finite adjustment of at least 0, got "
                f"{self.threshold} and {self.adjustment}"
            )

    def _rule(self, problem: Problem, start: Tensor) -> "_Sparsify":
        return _Sparsify(self, start)


class _Sparsify:
    """Gradient and rule in one object, because the rule must know of successes outside the budget."""

    def __init__(self, attack: SigmaZero, start: Tensor) -> None:
        self._attack, self._adam, self._done = attack, Adam(start), 0
        self._thresholds = start.new_full((len(start), 1, 1, 1), attack.threshold)
        self._succeeded = torch.zeros_like(self._thresholds, dtype=torch.bool)

    def evaluate(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        evaluation = backpropagate(problem, iterates)
        self._succeeded = (evaluation.margin <= 0)[:, None, None, None]
        size = problem.norm.size(iterates - problem.images)
        return evaluation._replace(margin=evaluation.margin.masked_fill(size > problem.eps, torch.inf))

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        images, smoothing = problem.images, self._attack.smoothing
        change = iterates - images
        energy = change.square().sum(dim=1, keepdim=True)
        slope = 2 * smoothing * change / (energy + smoothing).square() / energy[0].numel()
        push = evaluation.gradient.nan_to_num(nan=0, posinf=0, neginf=0).masked_fill(self._succeeded, 0)
        direction = self._adam.direction(rescale(push + slope))
        rate = self._attack.learning_rate * self._decay
        moved = (iterates - rate * direction).clamp(0, 1)
        rise = torch.where(self._succeeded, rate, -rate) * self._attack.adjustment
        self._thresholds = (self._thresholds + rise).clamp(0, 1)
        reach = (moved - images).abs().amax(dim=1, keepdim=True)
        sparse = torch.where(reach < self._thresholds, images, moved)
        self._done += 1
        return problem.project(sparse) if self._done == self._attack.steps else sparse  # the last must be inside

    def select(self, index: Tensor) -> None:
        self._adam.select(index)
        self._thresholds, self._succeeded = self._thresholds[index], self._succeeded[index]

    @property
    def _decay(self) -> float:
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * self._done / self._attack.steps)) / 2
