"""Iterated attacks in one place: gradients, the best iterate so far, steps, and images that are done."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import torch
from clusterguard.attacks._norms import Norm
from clusterguard.attacks._objectives import Objective
from clusterguard.attacks._objectives import margin as margin_objective
from clusterguard.detection import Detector, success_margin
from torch import Generator, Tensor

Keep = Literal["best", "last"]
OnStep = Callable[[int, Tensor], None]
"""(step, best success margins so far (B,)): called at every step, for traces and plots."""


@dataclass(frozen=True)
class Problem:
    """What is attacked: a batch of images, and what may be done to them.

    Attributes:
        detector: whatever yields evidence and thresholds.
        images: (B, C, H, W) the clean images.
        labels: (B,) their true labels.
        targets: (B,) wrong labels aimed at, or None.
        norm: of the perturbation.
        eps: its largest size, one number or (B,).
        objective: what to minimise.
        generator: randomness.
    """

    detector: Detector
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    norm: Norm
    eps: float | Tensor
    objective: Objective
    generator: Generator | None = None

    def project(self, candidates: Tensor) -> Tensor:
        """The candidates (B, C, H, W), projected onto ball ∩ box."""
        return self._projection(candidates)

    @cached_property
    def _projection(self) -> Callable[[Tensor], Tensor]:
        return self.norm.projection(self.images, self.eps)

    def margin(self, candidates: Tensor) -> Tensor:
        """(B,) success margins of candidates (B, C, H, W), without gradients."""
        with torch.no_grad():
            evidence = self.detector.evidence(candidates)
            return success_margin(evidence, self.detector.thresholds, self.labels, self.targets)

    def select(self, index: Tensor) -> "Problem":
        """The problem of some of the images; index is (b,) integers or (B,) bools."""
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            targets=None if self.targets is None else self.targets[index],
            eps=self.eps[index] if isinstance(self.eps, Tensor) else self.eps,
        )


class ObjectiveValues(NamedTuple):
    """One look at a batch of iterates.

    Attributes:
        loss: (B,) the objective.
        margin: (B,) success margin, at most 0 for a success; +inf where nobody asked.
        gradient: (B, C, H, W) of the loss, or an estimate of it.
    """

    loss: Tensor
    margin: Tensor
    gradient: Tensor


Gradient = Callable[[Problem, Tensor], ObjectiveValues]
"""(problem, iterates) -> evaluation: by backpropagation, or estimated from queries."""


class Rule(Protocol):
    """How to go on from an iterate; it may remember things per image."""

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        """The next iterates (B, C, H, W) of a problem after an evaluation of these, inside ball and box."""
        ...

    def select(self, index: Tensor) -> None:
        """Forget the images that are not in the index, (b,) positions in the present batch."""
        ...


def descend(
    problem: Problem,
    start: Tensor,
    rule: Rule,
    *,
    gradient: Gradient,
    steps: int,
    keep: Keep = "best",
    stop_early: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Take steps down the objective.

    Args:
        problem: what is attacked.
        start: (B, C, H, W) first iterates.
        rule: makes the next iterates.
        gradient: evaluates iterates.
        steps: how many to take, at least 1.
        keep: "best" returns each image's iterate with the smallest success margin, the start among them, and costs
            one more forward pass than "last".
        stop_early: images with a success leave the batch; needs ``keep="best"`` and does not change which images
            succeed, only how far beyond success they get.
        on_step: see `OnStep`.

    Returns:
        (B, C, H, W).
    """
    best, iterates = _Best(start), start
    for step in range(steps):
        evaluation = gradient(problem, iterates)
        with torch.no_grad():
            if keep == "best":
                best.remember(iterates, evaluation.margin)
            if on_step is not None:
                on_step(step, best.of_all()[1])
            if stop_early and step % _LOOK_EVERY == 0:
                open_rows = (best.margins > 0).nonzero().squeeze(1)
                if not len(open_rows):
                    break
                if len(open_rows) <= _WORTH_IT * len(iterates):
                    best.drop_all_but(open_rows)
                    problem, iterates = problem.select(open_rows), iterates[open_rows]
                    evaluation = ObjectiveValues(*(part[open_rows] for part in evaluation))
                    rule.select(open_rows)
            iterates = rule.step(problem, iterates, evaluation)
    else:
        if keep == "last":
            return iterates
        best.remember(iterates, problem.margin(iterates))
        if on_step is not None:
            on_step(steps, best.of_all()[1])
    return best.of_all()[0]


class _Best:
    """Each image's iterate with the smallest margin; it never waits for the device.

    Attributes:
        margins: (b,) smallest so far, of the images that are still in the batch.
    """

    def __init__(self, start: Tensor) -> None:
        self._iterates, self.margins = start, start.new_full((len(start),), torch.inf)
        self._rows = torch.arange(len(start), device=start.device)
        self._all = start.clone(), self.margins.clone()

    def remember(self, iterates: Tensor, margins: Tensor) -> None:
        """Take what is better: (b, C, H, W) and (b,)."""
        better = margins < self.margins
        self._iterates = torch.where(better[:, None, None, None], iterates, self._iterates)
        self.margins = torch.where(better, margins.to(self.margins.dtype), self.margins)

    def of_all(self) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) and (B,), with those that have left the batch."""
        iterates, margins = self._all
        return iterates.index_copy(0, self._rows, self._iterates), margins.index_copy(0, self._rows, self.margins)

    def drop_all_but(self, index: Tensor) -> None:
        """The batch goes on with these (c,) of its images."""
        self._all = self.of_all()
        self._iterates, self.margins, self._rows = self._iterates[index], self.margins[index], self._rows[index]


# Looking whether images are done waits for the device, and dropping them copies: neither pays at every step.
_LOOK_EVERY = 5
_WORTH_IT = 0.9


def backpropagate(problem: Problem, iterates: Tensor, *, with_margin: bool = True) -> ObjectiveValues:
    """The problem's loss, margin and exact gradient at iterates (B, C, H, W); those of parameters stay as they are.

    Args:
        problem: what is attacked.
        iterates: (B, C, H, W).
        with_margin: margins take more operators than a small network; an attack that keeps the last iterate needs none.
    """
    detector = problem.detector
    with torch.enable_grad():
        leaf = iterates.detach().requires_grad_()
        evidence = detector.evidence(leaf)
        loss = problem.objective(evidence, detector.thresholds, problem.labels, problem.targets)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    loss = loss.detach()
    if problem.objective is margin_objective:
        return ObjectiveValues(loss, loss, gradient)
    if not with_margin:
        return ObjectiveValues(loss, torch.full_like(loss, torch.inf), gradient)
    with torch.no_grad():
        margin = success_margin(evidence, detector.thresholds, problem.labels, problem.targets)
    return ObjectiveValues(loss, margin, gradient)


@dataclass(frozen=True, kw_only=True)
class NaturalEvolution:
    """A gradient estimated from queries along random directions and their opposites, per image.

    Args:
        samples: queries per image and step, even; half of them are directions.
        sigma: standard deviation of the directions, positive, in pixel units.

    Reference:
        Ilyas et al., "Black-box adversarial attacks with limited queries and information" (2018).
    """

    samples: int = 50
    sigma: float = 0.05

    def __call__(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        """The problem's loss, margin and estimated gradient at iterates (B, C, H, W): samples + 1 queries per image."""
        with torch.no_grad():
            loss, margin = self._query(problem, iterates)
            gradient = torch.zeros_like(iterates)
            for _ in range(self.samples // 2):
                noise = torch.empty_like(iterates).normal_(generator=problem.generator)
                ahead, _ = self._query(problem, iterates + self.sigma * noise)
                behind, _ = self._query(problem, iterates - self.sigma * noise)
                gradient += (ahead - behind).to(noise.dtype)[:, None, None, None] * noise
        return ObjectiveValues(loss, margin, gradient / (self.samples * self.sigma))

    @staticmethod
    def _query(problem: Problem, candidates: Tensor) -> tuple[Tensor, Tensor]:
        thresholds = problem.detector.thresholds
        evidence = problem.detector.evidence(candidates.clamp(0, 1))  # nobody answers queries about other images
        loss = problem.objective(evidence, thresholds, problem.labels, problem.targets)
        return loss, success_margin(evidence, thresholds, problem.labels, problem.targets)
