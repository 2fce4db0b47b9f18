"""Primal-dual proximal gradient descent, which weighs success against the size of a perturbation as it goes."""

import math
from dataclasses import dataclass
from typing import final

import torch
from clusterguard.attacks._adam import Adam
from clusterguard.attacks._descent import ObjectiveValues, Problem, backpropagate
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._objectives import Objective
from clusterguard.attacks._pgd import IteratedAttack
from clusterguard.errors import ConfigurationError
from torch import Tensor

_FIRST_PRICE = 0.1  # of size, as a share of what the objective gains by it
_LARGEST_LEAD = math.log(1e6)
_LAST_STEP, _LAST_DUAL_STEP = 0.01, 0.1  # shares of the first steps that are left at the end
_MEMORY = 0.9  # decay factor of the running mean of the weights
_SOFTNESS = 0.05  # margin over which the objective's weight fades, as a share of the first margin


@final
@dataclass(frozen=True, kw_only=True)
class PDPGD(IteratedAttack):
    """Primal-dual proximal gradient descent, for the smallest perturbation that succeeds.

    Two players move in turn. The first takes a step of Adam along the objective and then makes the perturbation
    smaller, by the proximal operator of the norm (see `Norm.shrink`). The second weighs these two aims for each image,
    the objective more while the image fails and the size more while it succeeds. The attack may leave the budget on its
    way, but only perturbations within the budget count as successes. A step costs one gradient.

    Where the paper weighs a loss, this attack weighs its slope in the norm against the size, so that the units of the
    detector do not matter. Adam scales the steps of an image by one number, so that the proximal step is exact.

    With ``keep="nearest"`` and a large eps, it returns the smallest perturbation that it has found.

    Args:
        norm: norm of the ball, "linf", "l2" or "l1", or one of your own that defines `Norm.shrink`.
        learning_rate: learning rate of Adam, positive, in pixel units; it falls exponentially to a hundredth.
        dual_rate: change of the logarithm of the weights' ratio at a step, at least 0; it falls linearly to a tenth.

    Raises:
        ConfigurationError: an option is out of its range, or the norm does not define `Norm.shrink`.

    Reference:
        Matyasko & Chau, "PDPGD: primal-dual proximal gradient descent adversarial attack" (2021).

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = PDPGD(norm="l1", eps=3.0, steps=20)(guard, images, labels)
        >>> bool((attacked - images).flatten(1).abs().sum(dim=1).max() <= 3 + 1e-5)
        True
    """

    steps: int = 100
    objective: str | Objective = "margin"
    learning_rate: float = 0.1
    dual_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        get_norm(self.norm).shrink(torch.zeros(1, 1, 1, 1), 0.0)  # raises where the norm cannot
        if not (0 < self.learning_rate < math.inf and 0 <= self.dual_rate < math.inf):
            raise ConfigurationError(
                "expected a positive learning_rate and a dual_rate of at least 0, both finite, got "
                f"{self.learning_rate} and {self.dual_rate}"
            )

    def _rule(self, problem: Problem, start: Tensor) -> "_Players":
        return _Players(self, start)


class _Players:
    """Gradient and rule in one object, because the rule must know of successes outside the budget."""

    def __init__(self, attack: PDPGD, start: Tensor) -> None:
        self._attack, self._adam, self._done = attack, Adam(start, per_image=True), 0
        self._lead = start.new_full((len(start),), -math.log(_FIRST_PRICE))  # log of the ratio of the two weights
        self._weight = self._lead.sigmoid()
        self._margin = self._unit = torch.ones_like(self._lead)

    def evaluate(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        evaluation = backpropagate(problem, iterates)
        self._margin = evaluation.margin
        if self._done == 0:
            self._unit = _SOFTNESS * self._margin.abs().clamp(1e-6, 1e6)
        size = problem.norm.size(iterates - problem.images)
        return evaluation._replace(margin=evaluation.margin.masked_fill(size > problem.eps, torch.inf))

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        images, progress = problem.images, self._done / self._attack.steps
        gradient = evaluation.gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        push = (self._margin / self._unit).sigmoid().nan_to_num(1).to(gradient.dtype)
        rate = self._attack.learning_rate * _LAST_STEP**progress
        moved = (iterates - rate * self._adam.direction(gradient * push[:, None, None, None])).clamp(0, 1)
        price = problem.norm.slope(gradient) * (1 - self._weight) / self._weight
        amount = (rate * price / self._adam.scale.flatten()).clamp_max(1e6)
        smaller = (images + problem.norm.shrink(moved - images, amount)).clamp(0, 1)
        dual_rate = self._attack.dual_rate * (1 - (1 - _LAST_DUAL_STEP) * progress)
        ascent = torch.where(self._margin > 0, dual_rate, -dual_rate)
        self._lead = (self._lead + ascent).clamp(-_LARGEST_LEAD, _LARGEST_LEAD)
        self._weight = self._weight.lerp(self._lead.sigmoid(), 1 - _MEMORY)
        self._done += 1
        return problem.project(smaller) if self._done == self._attack.steps else smaller  # the last must be inside

    def select(self, index: Tensor) -> None:
        self._adam.select(index)
        self._lead, self._weight = self._lead[index], self._weight[index]
        self._margin, self._unit = self._margin[index], self._unit[index]
