"""Sparse-PGD, which descends over colours and a continuous mask of pixels at once."""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from clusterguard.attacks._descent import ObjectiveValues, Problem, UpdateRule
from clusterguard.attacks._norm_base import mask_largest
from clusterguard.attacks._norms import L0, L2, get_norm
from clusterguard.attacks._objectives import Objective
from clusterguard.attacks._pgd import IteratedAttack
from clusterguard.attacks._starts import Start
from clusterguard.errors import ConfigurationError
from torch import Tensor

_PATIENCE = 3  # steps without another choice of pixels, after which an image gets a new mask


@final
@dataclass(frozen=True, kw_only=True)
class SparsePGD(IteratedAttack):
    """Sparse-PGD, an l0 attack that descends over a colour and a score of every pixel at once.

    The pixels with the eps largest scores show their colours, and the others stay clean. Colours take steps along the
    sign of the gradient. Scores take steps along the gradient that they would have if a pixel were shown in proportion
    to the sigmoid of its score. An image whose choice of pixels stays the same for three steps gets new random scores.

    Args:
        eps: number of pixels that may change, at least 0.
        colour_step: length of a step of colours, positive, in pixel units.
        score_step: length of a step of scores, positive; it is multiplied by the root of the number of pixels.
        everywhere: whether the colours of hidden pixels take steps too, which the paper calls unprojected.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Zhong & Liu, "Sparse-PGD: a unified framework for sparse adversarial perturbations generation" (2024),
        algorithm 1.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = SparsePGD(eps=5, steps=20)(guard, images, labels)
        >>> int((attacked != images).flatten(1).sum(dim=1).max()) <= 5
        True
    """

    norm: str = field(default=L0.name, init=False)
    steps: int = 100
    start: str | Start = "random"
    objective: str | Objective = "margin"
    colour_step: float = 0.25
    score_step: float = 0.25
    everywhere: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.colour_step < math.inf and 0 < self.score_step < math.inf):
            raise ConfigurationError(
                f"expected positive, finite colour_step and score_step, got {self.colour_step} and {self.score_step}"
            )

    def _rule(self, problem: Problem, start: Tensor) -> UpdateRule:
        return _ColoursAndScores(self, problem, start)


class _ColoursAndScores:
    """The colours (B, C, H, W) and scores (B, 1, H, W) of all pixels, and which pixels are shown."""

    def __init__(self, attack: SparsePGD, problem: Problem, start: Tensor) -> None:
        self._attack = attack
        self._rows, self._count = torch.arange(len(start), device=start.device), len(start)
        shown = (start != problem.images).any(dim=1, keepdim=True)
        colours = torch.empty_like(start).uniform_(generator=problem.generator)
        self._colours = torch.where(shown, start, colours)
        scores = self._draw_scores(problem)
        self._scores = scores + shown * (scores.amax() - scores.amin())  # what the start shows ranks first
        self._shown, self._unchanged = shown, self._rows.new_zeros(len(start))

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        gradient = evaluation.gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        share = self._scores.sigmoid()
        slope = (gradient * (self._colours - problem.images)).sum(dim=1, keepdim=True) * share * (1 - share)
        length = self._attack.score_step * math.sqrt(slope[0].numel())
        self._scores = self._scores - length * get_norm(L2.name).direction(slope)
        signs = gradient.sign() if self._attack.everywhere else gradient.sign() * self._shown
        self._colours = (self._colours - self._attack.colour_step * signs).clamp(0, 1)
        shown = self._choose(problem)
        same = (shown == self._shown).flatten(1).all(dim=1)
        self._unchanged = torch.where(same, self._unchanged + 1, 0)
        stuck = self._unchanged >= _PATIENCE
        self._scores = torch.where(stuck[:, None, None, None], self._draw_scores(problem), self._scores)
        self._shown, self._unchanged = self._choose(problem), self._unchanged.masked_fill(stuck, 0)
        return torch.where(self._shown, self._colours, problem.images)

    def _choose(self, problem: Problem) -> Tensor:
        count = self._scores.new_full((len(self._scores), 1), self._attack.eps)
        return mask_largest(self._scores.flatten(1), count).view_as(self._scores)

    def _draw_scores(self, problem: Problem) -> Tensor:
        """Draw for the whole batch, so that the numbers of an image do not depend on which others have left."""
        shape = self._count, 1, *problem.images.shape[2:]
        return problem.images.new_empty(shape).normal_(generator=problem.generator)[self._rows]

    def select(self, index: Tensor) -> None:
        self._rows, self._shown, self._unchanged = self._rows[index], self._shown[index], self._unchanged[index]
        self._colours, self._scores = self._colours[index], self._scores[index]
