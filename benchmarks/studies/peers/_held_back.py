"""Attacks that no suite contains. They are written for this comparison, to find what the suite's stages overlook."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from clusterguard.attacks import BuiltInAttack, get_norm
from clusterguard.detection import Detector, class_margins, success_margin
from einops import rearrange, repeat
from torch import Generator, Tensor

_PROPOSALS = 16  # rectangles tried in a round, of which the best one stays
_LARGEST_SIDE = 7


@final
@dataclass(frozen=True, kw_only=True)
class RectanglesAndPGD(BuiltInAttack):
    """Random rectangles, projected onto the ball, in turns with short targeted PGD from the best image so far.

    Args:
        norm: name of the norm.
        eps: radius.
        rounds: rounds of rectangles.
        every: number of rounds after which PGD follows.
        steps: steps of PGD towards each of the nearest classes. The first one is a quarter of the radius long.
        nearest: number of classes that PGD aims at.
    """

    norm: str
    eps: float
    rounds: int = 150
    every: int = 25
    steps: int = 12
    nearest: int = 3

    def _perturb(
        self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None, generator: Generator | None
    ) -> Tensor:
        best, margins = images.clone(), _margins(detector, images, labels, targets)
        for number in range(self.rounds):
            rows = (margins > 0).nonzero().squeeze(1)
            if not len(rows):
                break
            aims = None if targets is None else targets[rows]
            tries = (
                self._descend(detector, images[rows], best[rows], labels[rows], aims)
                if number % self.every == 0
                else self._rectangles(images[rows], best[rows], generator)
            )
            for candidates in tries:
                found = _margins(detector, candidates, labels[rows], aims)
                better = found < margins[rows]
                best[rows[better]], margins[rows[better]] = candidates[better], found[better]
        return best

    def _rectangles(self, images: Tensor, best: Tensor, generator: Generator | None) -> Iterator[Tensor]:
        """Candidates with one random rectangle filled and another one put back, all from the same best images."""
        norm, count = get_norm(self.norm), len(images)
        for _ in range(_PROPOSALS):
            fill = torch.rand(count, 1, 1, 1, generator=generator)
            corner = images + self.eps * torch.sign(torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
            filled = torch.where(fill < 1 / 3, 0.0, torch.where(fill < 2 / 3, 1.0, corner))
            candidates = torch.where(_random_rectangles(images, generator), filled, best)
            candidates = torch.where(_random_rectangles(images, generator), images, candidates)
            yield norm.project(images, candidates, self.eps)

    def _descend(
        self, detector: Detector, images: Tensor, best: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Iterator[Tensor]:
        """Iterates of PGD on the margin towards each of the nearest classes."""
        norm = get_norm(self.norm)
        if targets is None:
            with torch.no_grad():
                margins = class_margins(detector.evidence(best), detector.thresholds)
            margins.scatter_(1, labels[:, None], torch.inf)
            nearest = margins.argsort(dim=1)[:, : self.nearest].unbind(dim=1)
        else:
            nearest = (targets,)
        for aims in nearest:
            moved = best
            for step in range(self.steps):
                leaf = moved.detach().requires_grad_()
                margins = class_margins(detector.evidence(leaf), detector.thresholds).gather(1, aims[:, None])
                (gradient,) = torch.autograd.grad(margins.sum(), leaf)
                length = self.eps / 4 * 0.7**step
                if norm.is_sparse:
                    length = float(norm.longest_step(self.eps, images.shape[1:]))
                moved = norm.project(images, moved - length * norm.direction(gradient), self.eps)
                yield moved


@final
@dataclass(frozen=True, kw_only=True)
class EveryPlace(BuiltInAttack):
    """PGD on the pixels of a square patch, at every second place of the image.

    Args:
        side: side of the patch in pixels.
        steps: steps at each place. The length falls from 1/2 to 0.
    """

    side: int
    steps: int = 10
    norm: str = "patch"

    @property
    def eps(self) -> float:
        """The side, which is the radius of this threat model."""
        return self.side

    def _perturb(
        self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None, generator: Generator | None
    ) -> Tensor:
        best, margins = images.clone(), _margins(detector, images, labels, targets)
        height, width = images.shape[2:]
        for top in range(0, height - self.side + 1, 2):
            for left in range(0, width - self.side + 1, 2):
                rows = (margins > 0).nonzero().squeeze(1)
                if not len(rows):
                    return best
                inside = torch.zeros(1, 1, height, width, dtype=torch.bool)
                inside[..., top : top + self.side, left : left + self.side] = True
                aims = None if targets is None else targets[rows]
                moved = torch.where(inside, torch.rand(images[rows].shape, generator=generator), images[rows])
                for step in range(self.steps):
                    leaf = moved.detach().requires_grad_()
                    found = success_margin(detector.evidence(leaf), detector.thresholds, labels[rows], aims)
                    (gradient,) = torch.autograd.grad(found.sum(), leaf)
                    better = found.detach() < margins[rows]
                    best[rows[better]], margins[rows[better]] = moved[better], found.detach()[better]
                    length = 0.5 * (1 - step / self.steps)
                    moved = torch.where(inside, (moved - length * gradient.sign()).clamp(0, 1), moved)
        return best


def _random_rectangles(images: Tensor, generator: Generator | None) -> Tensor:
    """One random rectangle for each image (B, C, H, W), as a mask (B, 1, H, W)."""
    masks = []
    for size in images.shape[2:]:
        side = torch.randint(1, _LARGEST_SIDE + 1, (len(images), 1), generator=generator)
        first = torch.randint(1 - _LARGEST_SIDE // 2, size, (len(images), 1), generator=generator)
        places = repeat(torch.arange(size), "n -> b n", b=len(images))
        masks.append((places >= first) & (places < first + side))
    rows, columns = masks
    return rearrange(rows, "b h -> b 1 h 1") & rearrange(columns, "b w -> b 1 1 w")


@torch.no_grad()
def _margins(detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    return success_margin(detector.evidence(images), detector.thresholds, labels, targets)
