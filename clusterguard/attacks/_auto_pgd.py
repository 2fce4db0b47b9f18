"""APGD, which is projected gradient descent that adapts each image's step size and, for l1, its sparsity."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from clusterguard.attacks._descent import ObjectiveValues, Problem, UpdateRule
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._objectives import Objective
from clusterguard.attacks._pgd import IteratedAttack
from clusterguard.attacks._starts import Start, get_start
from clusterguard.detection import Detector
from torch import Generator, Tensor


def halving_checkpoints(steps: int) -> tuple[int, ...]:
    """The numbers of steps, out of `steps` in all, after which APGD checks whether to halve an image's step size.

    Reference:
        Croce & Hein (2020), section 3.2.

    Example:
        >>> halving_checkpoints(100)
        (22, 41, 57, 70, 80, 87, 93, 99)
    """
    positions, percent, gap = set(), 22, 22
    while percent < 100:
        positions.add(-(-percent * steps // 100))
        gap = max(gap - 3, 6)
        percent += gap
    return tuple(sorted(positions - {steps}))


class _FromTheBest(ABC):
    """Base of rules in which each image has a step size and can return to its iterate with the smallest loss.

    Every tensor in an instance has one row for each image.

    Attributes:
        step_size: (B, 1, 1, 1) length of the next step in the problem's norm.
    """

    def __init__(self, problem: Problem, start: Tensor, *, first_step: float | Tensor) -> None:
        """Set the length of the first step, one number or (B,)."""
        length = torch.as_tensor(first_step, dtype=start.dtype, device=start.device)
        self._first_step_size = self.step_size = length.view(-1, 1, 1, 1).expand(len(start), 1, 1, 1)
        self._best, self._gradient = start, torch.zeros_like(start)
        self._loss = start.new_full((len(start),), torch.inf)
        self._taken = 0

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        """The iterates (B, C, H, W) after the next step."""
        better = evaluation.loss < self._loss
        self._loss = torch.where(better, evaluation.loss, self._loss)
        self._best = torch.where(_wide(better), iterates, self._best)
        self._gradient = torch.where(_wide(better), evaluation.gradient, self._gradient)
        returns = _wide(self._adapt(problem, evaluation.loss))
        iterates = torch.where(returns, self._best, iterates)
        moved = self._move(problem, iterates, torch.where(returns, self._gradient, evaluation.gradient), returns)
        self._taken += 1
        return moved

    def select(self, index: Tensor) -> None:
        """Keep the state of the images at these positions only."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])

    @abstractmethod
    def _adapt(self, problem: Problem, loss: Tensor) -> Tensor:
        """Adapt step sizes, and return (B,) whether each image goes back to its best iterate."""

    @abstractmethod
    def _move(self, problem: Problem, iterates: Tensor, gradient: Tensor, returns: Tensor) -> Tensor:
        """The iterates after one step; `returns` (B, 1, 1, 1) says which images have just gone back to their best."""


@final
class HalvingSteps(_FromTheBest):
    """The rule of APGD, with momentum and with a step size that is halved when progress is slow.

    The first step is 2 eps long. For l0 it is so long that pixels jump to corners of the box, because sparse attacks
    succeed there; on digits this breaks a fifth more images than 2 eps. At a checkpoint, an image's step size is halved
    and the image goes back to its best iterate in two cases. Either fewer than 75 % of the steps since the last
    checkpoint lowered the loss, or neither the step size nor the best loss has changed since then.

    Args:
        problem: images to attack, with their objective and ball.
        start: (B, C, H, W) first iterates.
        steps: number of steps that will be taken, at least 1.

    Reference:
        Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks" (2020), algorithm 1.
    """

    def __init__(self, problem: Problem, start: Tensor, *, steps: int) -> None:
        super().__init__(problem, start, first_step=2 * problem.norm.longest_step(problem.eps, start.shape[1:]))
        self._checkpoints = (0, *halving_checkpoints(steps))
        self._checked = 0
        self._previous = start
        self._last_loss = self._checked_loss = self._loss
        self._improvements = torch.zeros_like(self._loss)
        self._halved = torch.zeros_like(self._loss, dtype=torch.bool)

    def _adapt(self, problem: Problem, loss: Tensor) -> Tensor:
        self._improvements = self._improvements + (loss < self._last_loss)
        self._last_loss = loss
        if self._taken not in self._checkpoints:
            return torch.zeros_like(self._halved)
        too_few = self._improvements < 0.75 * (self._taken - self._checked)
        self._halved = too_few | (~self._halved & (self._loss >= self._checked_loss))
        self.step_size = torch.where(_wide(self._halved), self.step_size / 2, self.step_size)
        self._last_loss = torch.where(self._halved, self._loss, loss)
        self._checked, self._checked_loss = self._taken, self._loss
        self._improvements = torch.zeros_like(self._improvements)
        return self._halved

    def _move(self, problem: Problem, iterates: Tensor, gradient: Tensor, returns: Tensor) -> Tensor:
        straight = problem.project(iterates - self.step_size * problem.norm.direction(gradient))
        previous, self._previous = torch.where(returns, iterates, self._previous), iterates
        if self._taken == 0:
            return straight
        return problem.project(iterates + 0.75 * (straight - iterates) + 0.25 * (iterates - previous))


@final
class SparseSteps(_FromTheBest):
    """The rule of l1-APGD, whose steps change a number of coordinates that follows the image's best perturbation.

    The first step is eps long and changes a fifth of the coordinates. After every tenth of the steps, but at least 4,
    the number of coordinates is set to that of the best perturbation divided by 1.5. If the best perturbation has
    become sparser by more than 5 %, the step size goes back to eps and the image to its best iterate. Otherwise the
    step size is divided by 1.5, down to eps / 10.

    Args:
        problem: images to attack, with their objective and ball.
        start: (B, C, H, W) first iterates; a perturbed one sets the first number of coordinates.
        steps: number of steps that will be taken, at least 1.

    Reference:
        Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (2021), algorithm 1.
    """

    def __init__(self, problem: Problem, start: Tensor, *, steps: int) -> None:
        super().__init__(problem, start, first_step=problem.eps)
        # The paper adapts after every 4 % of 100 steps. With fewer steps, adapting more often broke fewer images.
        self._every = max(4, steps // 10)
        changed = self._changed(problem)
        whole = torch.full_like(changed, start.shape[1:].numel())
        self._sparsity = torch.where(changed > 0, changed / 1.5, whole / 5)
        self._changed_before = torch.where(changed > 0, changed, whole)

    def _changed(self, problem: Problem) -> Tensor:
        """(B,) number of coordinates that the best perturbation changes."""
        return (self._best != problem.images).flatten(1).sum(dim=1, dtype=self._best.dtype)

    def _adapt(self, problem: Problem, loss: Tensor) -> Tensor:
        if self._taken == 0 or self._taken % self._every:
            return torch.zeros_like(loss, dtype=torch.bool)
        changed = self._changed(problem)
        sparser = changed < 0.95 * self._changed_before
        shrunk = torch.maximum(self.step_size / 1.5, self._first_step_size / 10)
        self.step_size = torch.where(_wide(sparser), self._first_step_size, shrunk)
        self._sparsity, self._changed_before = changed / 1.5, changed
        return sparser

    def _move(self, problem: Problem, iterates: Tensor, gradient: Tensor, returns: Tensor) -> Tensor:
        direction = problem.norm.direction(gradient, sparsity=self._sparsity)
        return problem.project(iterates - self.step_size * direction)


@final
@dataclass(frozen=True, kw_only=True)
class APGD(IteratedAttack):
    """Projected gradient descent with a step size that adapts to each image, so that there is none to tune.

    For l0 it takes steps as PGD0 does, along the gradient divided by its l1 norm, with the step sizes of linf and l2.

    Args:
        large_radii: whether l1 attacks spend 30 % of the steps in the ball of three times the radius and 30 % in that
            of twice the radius, to find the coordinates worth changing. `on_step` then reports the remaining steps
            only. With fewer than 4 steps, all are taken in the ball itself. The other norms ignore this option.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Croce & Hein (2020) for linf and l2; Croce & Hein, "Mind the box" (2021) for l1.

    Example:
        >>> import torch
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = APGD(norm="l2", eps=0.5, steps=20)(guard, images, labels)
        >>> bool((attacked - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6)
        True
    """

    steps: int = 100
    objective: str | Objective = "margin"
    large_radii: bool = True

    def _rule(self, problem: Problem, start: Tensor) -> UpdateRule:
        if problem.norm.takes_sparsity:
            return SparseSteps(problem, start, steps=self.steps)
        return HalvingSteps(problem, start, steps=self.steps)

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        leg = self.steps * 3 // 10
        if not get_norm(self.norm).takes_sparsity or not self.large_radii or not leg:
            return super()._perturb(detector, images, labels, targets, generator)

        def shifted(step: int, margins: Tensor) -> None:
            if self.on_step is not None:
                self.on_step(2 * leg + step, margins)

        # A success in a larger ball does not count in this one, so no image may leave the batch early there.
        outer = replace(self, steps=leg, keep="best", stop_early=False, on_step=None, large_radii=False)
        start = get_start(self.start)
        for factor in (3, 2):
            wider = replace(outer, eps=factor * self.eps, start=start)
            start = _projected(wider._perturb(detector, images, labels, targets, generator))
        inner = replace(self, steps=self.steps - 2 * leg, on_step=shifted, large_radii=False)
        inner = replace(inner, start=_better(get_start(self.start), start))
        return inner._perturb(detector, images, labels, targets, generator)


def _projected(candidates: Tensor) -> Start:
    """A start at these points, projected onto the ball."""
    return lambda problem: problem.project(candidates)


def _better(first: Start, second: Start) -> Start:
    """A start that takes, for each image, the one of two starts with the smaller success margin."""

    def start(problem: Problem) -> Tensor:
        one, other = first(problem), second(problem)
        return torch.where(_wide(problem.margin(one) < problem.margin(other)), one, other)

    return start


def _wide(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]
