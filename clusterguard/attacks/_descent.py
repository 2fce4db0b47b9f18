"""The loop of iterated attacks, with gradients, the best iterate so far, and images that leave the batch early."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, final, runtime_checkable

import torch
from clusterguard.attacks._gradients import gradient_at
from clusterguard.attacks._norm_base import Norm
from clusterguard.attacks._objectives import Objective
from clusterguard.attacks._objectives import margin as margin_objective
from clusterguard.attacks._search_precision import InBfloat16
from clusterguard.detection import Detector, Evidence, success_margin
from torch import Generator, Tensor

Keep = Literal["best", "last", "nearest"]
OnStep = Callable[[int, Tensor], None]
"""A callback for traces and plots, which gets the step and the best success margins so far (B,) at every step."""


@final
@dataclass(frozen=True)
class Problem:
    """A batch of images to attack, with the detector, the objective and the allowed perturbations.

    Attributes:
        detector: detector to attack, which returns evidence and has thresholds.
        images: (B, C, H, W) clean images.
        labels: (B,) true labels.
        targets: (B,) wrong labels to aim at, or None.
        norm: norm of the perturbation.
        eps: largest size of the perturbation, one number or (B,).
        objective: loss to minimise.
        generator: randomness.
        search: detector in a lower precision, of which gradients are taken; None takes gradients of `detector`.
        settled: (B,) images with a success, whose margins may stay in the lower precision; None judges all images.
    """

    detector: Detector
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    norm: Norm
    eps: float | Tensor
    objective: Objective
    generator: Generator | None = None
    search: InBfloat16 | None = None
    settled: Tensor | None = None

    def project(self, candidates: Tensor) -> Tensor:
        """The candidates (B, C, H, W) projected onto the ball around the images, cut by the box [0, 1]."""
        return self._projection(candidates)

    @cached_property
    def _projection(self) -> Callable[[Tensor], Tensor]:
        return self.norm.projection(self.images, self.eps)

    def margin(self, candidates: Tensor) -> Tensor:
        """The success margins (B,) of candidates (B, C, H, W), without gradients."""
        with torch.no_grad():
            evidence = self.detector.evidence(candidates)
            return success_margin(evidence, self.detector.thresholds, self.labels, self.targets)

    def select(self, index: Tensor) -> "Problem":
        """The problem with a part of the images; the index is (b,) integers or (B,) bools."""
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            targets=None if self.targets is None else self.targets[index],
            eps=self.eps[index] if isinstance(self.eps, Tensor) else self.eps,
            settled=None,
        )


class ObjectiveValues(NamedTuple):
    """The objective and its gradient at a batch of iterates.

    Attributes:
        loss: (B,) value of the objective.
        margin: (B,) success margin, at most 0 for a success; +inf if it was not computed.
        gradient: (B, C, H, W) gradient of the loss, or an estimate of it.
    """

    loss: Tensor
    margin: Tensor
    gradient: Tensor


Gradient = Callable[[Problem, Tensor], ObjectiveValues]
"""A function (problem, iterates) -> evaluation, by backpropagation or by estimates from queries."""


class UpdateRule(Protocol):
    """A rule for the next step from an iterate; it may keep state for each image."""

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        """The next iterates, inside ball and box.

        Args:
            problem: images to attack, with their objective and ball.
            iterates: (B, C, H, W) present iterates.
            evaluation: evaluation of the present iterates.

        Returns:
            Iterates (B, C, H, W).
        """
        ...

    def select(self, index: Tensor) -> None:
        """Keep the state of a part of the images and drop that of the others.

        Args:
            index: (b,) positions, in the present batch, of the images to keep.
        """
        ...


@runtime_checkable
class EvaluatingRule(UpdateRule, Protocol):
    """A rule that also evaluates iterates, because its steps depend on all evaluations."""

    def evaluate(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        """The evaluation of iterates, as by `Gradient`.

        Args:
            problem: images to attack, with their objective and ball.
            iterates: (B, C, H, W) present iterates.
        """
        ...


def descend(
    problem: Problem,
    start: Tensor,
    rule: UpdateRule,
    *,
    gradient: Gradient,
    steps: int,
    keep: Keep = "best",
    stop_early: bool = False,
    on_step: OnStep | None = None,
    judge_all: bool = True,
) -> Tensor:
    """Descend the objective of a problem.

    Args:
        problem: images to attack, with their objective and ball.
        start: (B, C, H, W) first iterates.
        rule: rule that makes the next iterates.
        gradient: function that evaluates iterates.
        steps: number of steps, at least 1.
        keep: iterate to return for each image, "best", "nearest" or "last". The best one has the smallest success
            margin, the start included. The nearest one is the smallest perturbation among the successes, and the best
            one where there is no success. Both cost one more forward pass.
        stop_early: whether images with a success leave the batch, which needs ``keep="best"``. It does not change which
            images succeed, only how far beyond success they get.
        on_step: callback for every step, see `OnStep`.
        judge_all: whether the rule needs the margins of all iterates in the detector's own precision. Otherwise, images
            with a success search on in the lower precision, and the detector judges the best of these iterates at the
            end. This matters only with ``keep="best"`` and a search in lower precision.

    Returns:
        Iterates (B, C, H, W).
    """
    defers = not judge_all and keep == "best" and problem.search is not None

    def sizes(candidates: Tensor) -> Tensor | None:
        return problem.norm.size(candidates - problem.images) if keep == "nearest" else None

    best, iterates = _Best(start), start
    for step in range(steps):
        settled = best.margins <= 0 if defers else None
        evaluation = gradient(problem if settled is None else replace(problem, settled=settled), iterates)
        with torch.no_grad():
            if keep != "last":
                judged = evaluation.margin if settled is None else best.set_aside(iterates, evaluation.margin, settled)
                best.remember(iterates, judged, sizes(iterates))
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
        best.remember(iterates, problem.margin(iterates), sizes(iterates))
        if defers and not stop_early:
            best.judge(problem)
        if on_step is not None:
            on_step(steps, best.of_all()[1])
    return best.of_all()[0]


class _Best:
    """The best or nearest iterate for each image; no operation waits for the device.

    Attributes:
        margins: (b,) margins of these iterates, for the images that are still in the batch.
    """

    def __init__(self, start: Tensor) -> None:
        self._iterates, self.margins = start, start.new_full((len(start),), torch.inf)
        self._sizes = self.margins
        self._rows = torch.arange(len(start), device=start.device)
        self._all = start.clone(), self.margins.clone()
        self._aside, self._rough = start, self.margins

    def remember(self, iterates: Tensor, margins: Tensor, sizes: Tensor | None) -> None:
        """Keep the iterates (b, C, H, W) whose margins (b,) are smaller than before.

        With sizes (b,) of the perturbations, successes are compared by these.
        """
        better = margins < self.margins
        if sizes is not None:
            better = torch.where(margins <= 0, (self.margins > 0) | (sizes < self._sizes), better)
            self._sizes = torch.where(better, sizes, self._sizes)
        self._iterates = torch.where(better[:, None, None, None], iterates, self._iterates)
        self.margins = torch.where(better, margins.to(self.margins.dtype), self.margins)

    def set_aside(self, iterates: Tensor, margins: Tensor, settled: Tensor) -> Tensor:
        """Set aside settled iterates (b, C, H, W) with the smallest margins (b,), until `judge` is called.

        Returns:
            The margins (b,) of the other iterates, and +inf for the settled ones.
        """
        deeper = settled & (margins < torch.minimum(self._rough, self.margins))
        self._aside = torch.where(deeper[:, None, None, None], iterates, self._aside)
        self._rough = torch.where(deeper, margins.to(self._rough.dtype), self._rough)
        return margins.masked_fill(settled, torch.inf)

    def judge(self, problem: Problem) -> None:
        """Keep those iterates set aside that are better by the detector itself."""
        rows = self._rough.isfinite().nonzero().squeeze(1)
        if len(rows):
            judged = problem.select(rows).margin(self._aside[rows]).to(self.margins.dtype)
            self.remember(self._aside, torch.full_like(self.margins, torch.inf).index_copy(0, rows, judged), None)

    def of_all(self) -> tuple[Tensor, Tensor]:
        """Best iterates (B, C, H, W) and margins (B,) of all images, including those that have left the batch."""
        iterates, margins = self._all
        return iterates.index_copy(0, self._rows, self._iterates), margins.index_copy(0, self._rows, self.margins)

    def drop_all_but(self, index: Tensor) -> None:
        """Continue the batch with the images at these positions (c,) only."""
        self._all = self.of_all()
        self._iterates, self.margins, self._rows = self._iterates[index], self.margins[index], self._rows[index]
        self._aside, self._rough = self._aside[index], self._rough[index]


# Checking which images are done waits for the device, and dropping them copies the rest, so both are done rarely.
_LOOK_EVERY = 5
_WORTH_IT = 0.9
_ERRORS = 4  # multiple of the error measured on a few images that may occur on others


def backpropagate(problem: Problem, iterates: Tensor, *, with_margin: bool = True) -> ObjectiveValues:
    """The problem's loss, margin and exact gradient at iterates (B, C, H, W); gradients of parameters do not change.

    Args:
        problem: images to attack, with their objective.
        iterates: (B, C, H, W) points at which to evaluate the objective.
        with_margin: whether to compute margins, which take more operators than a small network. An attack that keeps
            the last iterate does not need them.
    """
    detector = problem.detector if problem.search is None else problem.search
    with torch.enable_grad():
        leaf = iterates.detach().requires_grad_()
        evidence = detector.evidence(leaf)
        loss = problem.objective(evidence, detector.thresholds, problem.labels, problem.targets)
        gradient = gradient_at(leaf, loss, detector)
    loss = loss.detach()
    if problem.objective is margin_objective:
        return ObjectiveValues(loss, _judged(problem, iterates, loss, evidence), gradient)
    if not with_margin:
        return ObjectiveValues(loss, torch.full_like(loss, torch.inf), gradient)
    with torch.no_grad():
        margin = success_margin(evidence, detector.thresholds, problem.labels, problem.targets)
    return ObjectiveValues(loss, _judged(problem, iterates, margin, evidence), gradient)


def _judged(problem: Problem, iterates: Tensor, margin: Tensor, evidence: Evidence) -> Tensor:
    """Margins (B,) in lower precision. Margins that may be successes are computed again by the detector itself."""
    if problem.search is None:
        return margin
    scores, suspicion = (part.detach().abs().amax(dim=1) for part in evidence)
    # bfloat16 has 8 bits, and errors add up. Where a network subtracts large numbers, they are larger than that.
    doubt = (torch.maximum(scores, suspicion) / 64).clamp_min(_ERRORS * problem.search.error)
    near = ~(margin > doubt)
    if problem.settled is not None:
        near &= ~problem.settled
    rows = near.nonzero().squeeze(1)
    if not len(rows):
        return margin
    return margin.index_copy(0, rows, problem.select(rows).margin(iterates[rows]).to(margin.dtype))


@dataclass(frozen=True, kw_only=True)
class NaturalEvolution:
    """An estimate of each image's gradient from queries along random directions and their opposites.

    Args:
        samples: number of queries for each image and step, even; it is twice the number of directions.
        sigma: standard deviation of the directions, positive, in pixel units.

    Reference:
        Ilyas et al., "Black-box adversarial attacks with limited queries and information" (2018).
    """

    samples: int = 50
    sigma: float = 0.05

    def __call__(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        """The problem's loss, margin and estimated gradient at iterates (B, C, H, W), from samples + 1 queries each."""
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
        evidence = problem.detector.evidence(candidates.clamp(0, 1))  # a service only answers queries within the box
        loss = problem.objective(evidence, thresholds, problem.labels, problem.targets)
        return loss, success_margin(evidence, thresholds, problem.labels, problem.targets)
