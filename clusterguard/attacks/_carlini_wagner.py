"""The attack of Carlini and Wagner, for the smallest l2 perturbation that is accepted under a wrong label."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from clusterguard.attacks._adam import Adam
from clusterguard.attacks._base import BuiltInAttack, check_budget
from clusterguard.attacks._descent import Problem, backpropagate
from clusterguard.attacks._norms import L2, get_norm
from clusterguard.attacks._objectives import Objective, get_objective
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor

_SHRINK = 0.999  # keeps starts off the ends of the box, where tanh is flat and nothing would move


@final
@dataclass(frozen=True, kw_only=True)
class CarliniWagner(BuiltInAttack):
    """The attack of Carlini and Wagner, for the smallest l2 perturbation that is accepted under a wrong label.

    With targets, the perturbed image must be accepted as its target. The attack minimises
    ``‖x' − x‖² + c · objective(x')`` over w with ``x' = (tanh w + 1) / 2`` by Adam, and the second term counts only
    until success. Each image has its own c, which is multiplied by 10 until the image succeeds and then bisected. An
    image without a success comes back clean. The attack costs ``searches · steps`` gradients for each image.

    Args:
        eps: largest size of a perturbation that counts as success, so that the attack can be scored at a budget; None
            counts all.
        searches: number of values of c to try, at least 1.
        steps: number of steps of Adam for each value of c, at least 1.
        learning_rate: learning rate of Adam, positive, in units of w.
        initial_c: first value of c, positive.
        confidence: distance below 0 that the success margin must reach, at least 0, in units of the evidence.
        objective: loss to minimise until success, a name of `clusterguard.attacks.OBJECTIVES` or a callable.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Carlini & Wagner, "Towards evaluating the robustness of neural networks" (2017), and with the detector in the
        objective "Adversarial examples are not easily detected" (2017).

    Example:
        >>> import torch
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 10.0)
        >>> images = torch.rand(4, 1, 8, 8)
        >>> labels = guard(images).argmax(dim=1)
        >>> attacked = CarliniWagner(searches=3, steps=50)(guard, images, labels)
        >>> bool((guard.detect(attacked).labels != labels).any())
        True
    """

    eps: float | None = None
    searches: int = 5
    steps: int = 200
    learning_rate: float = 0.1
    initial_c: float = 1.0
    confidence: float = 0.0
    objective: str | Objective = "margin"

    norm: ClassVar[str] = L2.name

    def __post_init__(self) -> None:
        check_budget(eps=self._radius, steps=self.steps, batch_size=self.batch_size, may_be_unbounded=True)
        get_objective(self.objective)
        if self.searches < 1:
            raise ConfigurationError(f"expected at least 1 search, got {self.searches}")
        if not (0 < self.learning_rate < math.inf and 0 < self.initial_c < math.inf):
            raise ConfigurationError(
                f"expected positive, finite learning_rate and initial_c, got {self.learning_rate}, {self.initial_c}"
            )
        if not self.confidence >= 0:
            raise ConfigurationError(f"expected confidence of at least 0, got {self.confidence}")

    @property
    def _radius(self) -> float:
        return math.inf if self.eps is None else self.eps

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        norm, objective = get_norm(self.norm), get_objective(self.objective)
        problem = Problem(detector, images, labels, targets, norm, self._radius, objective, generator)
        closest = _Closest(problem)
        closest.consider(images, problem.margin(images) <= -self.confidence)
        c = images.new_full((len(images),), self.initial_c)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.searches):
            succeeded = self._search(problem, c, closest)
            low, high = torch.where(succeeded, low, c), torch.where(succeeded, c, high)
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        return closest.images

    def _search(self, problem: Problem, c: Tensor, closest: "_Closest") -> Tensor:
        """Descend with one c (B,) for each image, and return (B,) whether each image had a success.

        `closest` gets all successes.
        """
        w = ((2 * problem.images - 1) * _SHRINK).atanh()
        adam = Adam(w)
        succeeded = torch.zeros_like(c, dtype=torch.bool)
        for _ in range(self.steps):
            tanh = w.tanh()
            iterates = (tanh + 1) / 2
            evaluation = backpropagate(problem, iterates)
            success = evaluation.margin <= -self.confidence
            succeeded |= success
            closest.consider(iterates, success)
            # Where the evidence is not finite, the gradient of the objective is dropped, and only the distance counts.
            push = evaluation.gradient.nan_to_num(nan=0, posinf=0, neginf=0)
            weight = torch.where(success, 0, c)[:, None, None, None]
            gradient = (2 * (iterates - problem.images) + weight * push) * (1 - tanh.square()) / 2
            w = w - self.learning_rate * adam.direction(gradient)
        return succeeded


class _Closest:
    """The nearest success for each image so far, or the clean image if no success is within the radius."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.images = problem.images.clone()
        self._distance = problem.images.new_full((len(self.images),), torch.inf)

    def consider(self, candidates: Tensor, success: Tensor) -> None:
        distance = self._problem.norm.size(candidates - self._problem.images)
        better = success & (distance < self._distance) & (distance <= self._problem.eps)
        self.images = torch.where(better[:, None, None, None], candidates, self.images)
        self._distance = torch.where(better, distance, self._distance)
