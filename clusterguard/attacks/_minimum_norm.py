"""The fast minimum-norm attack, which walks along the boundary of success in a ball that shrinks and grows."""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from clusterguard.attacks._descent import ObjectiveValues, Problem, backpropagate
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._objectives import Objective
from clusterguard.attacks._pgd import IteratedAttack
from clusterguard.errors import ConfigurationError
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class FastMinimumNorm(IteratedAttack):
    """The fast minimum-norm attack, which may leave the budget's ball and return along the boundary of success.

    Each image has its own ball, which shrinks after a success and grows after a failure. Steps follow the gradient
    divided by its l2 norm, whatever the norm of the ball. This finds paths into the accepted region that attacks
    confined to the budget miss. Only perturbations within the budget count as successes. A step costs one gradient.

    Args:
        step_size: length of the first step, positive, in l2 units; it falls along a cosine to a hundredth. For l0 try
            10, because pixels should jump to corners of the box.
        adjustment: fraction by which a ball grows or shrinks at the first step, in (0, 1); it also falls along a
            cosine.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Pintor, Roli, Brendel & Biggio, "Fast minimum-norm adversarial attacks through adaptive norm constraints"
        (2021).

    Example:
        >>> FastMinimumNorm(norm="linf", eps=0.3).step_size
        1.0
    """

    objective: str | Objective = "margin"
    step_size: float = 1.0
    adjustment: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.step_size > 0 and 0 < self.adjustment < 1):
            raise ConfigurationError(
                f"expected a positive step_size and adjustment in (0, 1), got {self.step_size} and {self.adjustment}"
            )

    def _rule(self, problem: Problem, start: Tensor) -> "_Walk":
        return _Walk(self, start.new_full((len(start),), math.inf))


@dataclass
class _Walk:
    """Gradient and rule in one object, because the rule must know of successes outside the budget.

    Attributes:
        attack: attack with the options.
        nearest: (B,) size of the smallest successful perturbation so far, +inf where there is none.
        radii: (B,) radii of the balls.
        done: number of steps so far.
    """

    attack: FastMinimumNorm
    nearest: Tensor
    radii: Tensor = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.radii = self.nearest.clone()

    def evaluate(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        evaluation = backpropagate(problem, iterates)
        size = problem.norm.size(iterates - problem.images)
        success = evaluation.margin <= 0
        self.nearest = torch.where(success, torch.minimum(size, self.nearest), self.nearest)
        slope = problem.norm.slope(evaluation.gradient)
        rate = 0.001 + (self.attack.adjustment - 0.001) * self._decay
        one = problem.norm.grain
        grown = torch.maximum(self.radii * (1 + rate), self.radii + one)
        # A linear margin would be 0 at this radius. It is slightly larger, or rounding may keep the margin above 0.
        missing = (evaluation.margin.abs() / slope.clamp_min(1e-12)).clamp_max(1e6)
        first = size + torch.maximum(missing * (1 + rate), torch.full_like(missing, one))
        shrunk = torch.minimum(torch.minimum(self.radii * (1 - rate), self.radii - one), self.nearest)
        self.radii = torch.where(success, shrunk, torch.where(self.nearest.isfinite(), grown, first)).clamp_min(one)
        return evaluation._replace(margin=evaluation.margin.masked_fill(size > problem.eps, math.inf))

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        length = self.attack.step_size * (0.01 + 0.99 * self._decay)
        self.done += 1
        ahead = iterates - length * get_norm("l2").direction(evaluation.gradient)
        budget = problem.eps if self.done == self.attack.steps else math.inf  # the last iterate must be inside
        return problem.norm.project(problem.images, ahead, self.radii.clamp_max(budget))

    def select(self, index: Tensor) -> None:
        self.nearest, self.radii = self.nearest[index], self.radii[index]

    @property
    def _decay(self) -> float:
        return (1 + math.cos(math.pi * self.done / self.attack.steps)) / 2
