"""Where an attack's gradient comes from: backpropagation, or queries."""

from dataclasses import dataclass

import torch
from clusterguard.attacks._loop import ObjectiveValues, Problem
from clusterguard.attacks._objectives import margin as margin_objective
from clusterguard.detection import success_margin
from torch import Tensor


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
