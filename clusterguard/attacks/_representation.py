"""Attacks on representations, which match that of another image or move it away from the origin."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import final

import torch
from clusterguard.attacks._base import BuiltInAttack
from clusterguard.attacks._descent import Gradient, ObjectiveValues, OnStep, Problem, UpdateRule, backpropagate, descend
from clusterguard.attacks._encoders import find_representation
from clusterguard.attacks._gradients import gradient_at
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._objectives import Objective, margin
from clusterguard.attacks._pgd import PGD, SteepestDescent, SteppedAttack
from clusterguard.attacks._starts import Towards
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


@final
@dataclass(frozen=True, kw_only=True)
class RepresentationMatching(BuiltInAttack):
    """An attack that gives each image the representation of an accepted benign image of another class.

    The reference is of any wrong class, or of the target. The attack starts at the reference, projected onto the ball,
    and descends the squared distance between the two representations. It returns the iterate with the best success
    margin, and the clean image if there is no reference of a fitting class. A step costs two forward passes, one of
    them with a backward pass.

    Args:
        references: accepted benign images to choose from.
        norm: norm of the ball, a name of `clusterguard.attacks.NORMS`.
        eps: radius of the ball, at least 0, in units of the norm over pixels in [0, 1]; for l0 a number of pixels.
        step_size: length of a step in the norm, positive.
        steps: number of steps, at least 1.
        sparsity: fraction of coordinates that an l1 step changes, in (0, 1]; None takes the paper's dense step.
        stop_early: whether broken images leave the batch, which breaks the same images at a lower cost.
        on_step: callback for traces, which gets the step and the best margins so far (B,).

    Raises:
        ConfigurationError: an option is out of its range; when called, the detector has no representations.

    Reference:
        Sabour et al., "Adversarial manipulation of deep representations" (2016).

    Example:
        >>> import torch
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((2,), 12.0)
        >>> references = Towards.accepted(guard, torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> attack = RepresentationMatching(references=references, eps=0.1, step_size=0.02, steps=10)
        >>> attack(guard, torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)).shape
        torch.Size([4, 1, 8, 8])
    """

    references: Towards
    norm: str = "linf"
    eps: float
    step_size: float
    steps: int = 40
    sparsity: float | None = 0.05
    stop_early: bool = False
    on_step: OnStep | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        PGD(  # checks all these options
            norm=self.norm,
            eps=self.eps,
            step_size=self.step_size,
            steps=self.steps,
            sparsity=self.sparsity,
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
        represent = find_representation(detector)
        problem = Problem(detector, images, labels, targets, get_norm(self.norm), self.eps, margin, generator)
        reference = self.references(replace(problem, eps=math.inf))
        with torch.no_grad():
            wanted = _wide(represent(reference))
        rule = _Matching(wanted, SteepestDescent(self.step_size, sparsity=self.sparsity))
        return descend(
            problem,
            problem.project(reference),
            rule,
            gradient=rule.evaluate,
            steps=self.steps,
            stop_early=self.stop_early,
            on_step=self.on_step,
        )


@final
@dataclass(frozen=True, kw_only=True)
class RepelThenMinimise(SteppedAttack):
    """An attack that first moves representations away from the origin, then minimises the objective.

    The paper's head has its adversarial centre at the origin of the representations, and the objective is a plateau
    around it. The first steps maximise the distance from the origin in any direction, whatever the head, and the others
    descend the objective from there. For
    an image that is still inside the cluster of its class, the first steps lead further into this cluster. Use a start
    such as "random" or `Towards` for such images. A step of the first phase costs two forward passes, one of them with
    a backward pass.

    Args:
        share: fraction of the steps that belong to the first phase, in [0, 1].

    Raises:
        ConfigurationError: an option is out of its range; when called, the detector has no representations.

    Reference:
        arXiv 2012.03483, equations 11 and 31, for the adversarial cluster.

    Example:
        >>> RepelThenMinimise(eps=0.3, step_size=0.01).share
        0.25
    """

    objective: str | Objective = "margin"
    share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ConfigurationError(f"expected share in [0, 1], got {self.share}")

    def _gradient(self, rule: UpdateRule) -> Gradient:
        return _RepelFirst(round(self.share * self.steps))


@dataclass
class _Matching:
    """Gradient and rule in one object, because both must drop images that leave the batch.

    Attributes:
        wanted: (B, m) representations of the references.
        descent: rule of the steps.
    """

    wanted: Tensor
    descent: SteepestDescent

    def evaluate(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        return _evaluate(problem, iterates, lambda z: (z - self.wanted).square().sum(dim=1))

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        return self.descent.step(problem, iterates, evaluation)

    def select(self, index: Tensor) -> None:
        self.wanted = self.wanted[index]
        self.descent.select(index)


@dataclass
class _RepelFirst:
    """The gradient away from the origin for `steps_left` steps, and that of the objective afterwards."""

    steps_left: int

    def __call__(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        if self.steps_left == 0:
            return backpropagate(problem, iterates)
        self.steps_left -= 1
        return _evaluate(problem, iterates, lambda z: -z.square().sum(dim=1))


def _evaluate(problem: Problem, iterates: Tensor, loss_of: Callable[[Tensor], Tensor]) -> ObjectiveValues:
    """The loss, its gradient and the margin at iterates, for a loss of representations (B, m) -> (B,)."""
    represent = find_representation(problem.detector)
    with torch.enable_grad():
        leaf = iterates.detach().requires_grad_()
        loss = loss_of(_wide(represent(leaf)))
        gradient = gradient_at(leaf, loss, problem.detector)
    return ObjectiveValues(loss.detach(), problem.margin(iterates), gradient)


def _wide(representations: Tensor) -> Tensor:
    """The representations in float32 or float64, because squares in half precision may overflow."""
    return representations.to(torch.promote_types(representations.dtype, torch.float32))
