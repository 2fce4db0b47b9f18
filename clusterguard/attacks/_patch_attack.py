"""An attack with a patch: random search for its place, gradient steps for its pixels."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from clusterguard.attacks._base import BuiltInAttack, check_budget
from clusterguard.attacks._descent import ObjectiveValues, Problem, backpropagate, descend
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._objectives import Objective, get_objective
from clusterguard.attacks._patch_norm import Patch
from clusterguard.attacks._search_precision import InBfloat16, Precision, check_precision, choose_precision
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor

_NEAR = 3  # pixels by which a patch is moved around the best place


@final
@dataclass(frozen=True, kw_only=True)
class PatchAttack(BuiltInAttack):
    """An attack that puts a square patch at any place of an image and gives its pixels any values.

    A round proposes patches, takes the one with the smallest success margin, and descends the objective over its pixels
    by signs of gradients. In every other round, proposals lie at random places of the image. They have a random plain
    colour, random pixels of 0 and 1, or the pixels of the best patch so far. In the other rounds, the best patch is
    moved by up to three pixels. Each image keeps its best patch.

    Args:
        eps: side of the patch in pixels, at least 0.
        rounds: number of rounds, at least 1.
        proposals: number of patches to choose from in each round, at least 1.
        steps: number of gradient steps of each round, at least 1.
        step_size: length of a gradient step, positive, in pixel units.
        objective: loss to minimise, a name of `clusterguard.attacks.OBJECTIVES` or a callable.
        precision: precision of the gradient steps, as in `IteratedAttack`.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Karmon, Zoran & Goldberg, "LaVAN: localized and visible adversarial noise" (2018), for the gradient steps;
        Croce et al., "Sparse-RS" (2022), for the random search over places.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = PatchAttack(eps=3, rounds=4)(guard, images, labels)
        >>> int((attacked != images).flatten(1).sum(dim=1).max()) <= 3 * 3
        True
    """

    eps: float
    rounds: int = 20
    proposals: int = 16
    steps: int = 10
    step_size: float = 0.2
    objective: str | Objective = "margin"
    precision: Precision = "float32"

    norm: ClassVar[str] = Patch.name

    def __post_init__(self) -> None:
        check_budget(
            eps=self.eps, norm=self.norm, steps=self.steps, step_size=self.step_size, batch_size=self.batch_size
        )
        get_objective(self.objective)
        check_precision(self.precision)
        if min(self.rounds, self.proposals) < 1:
            raise ConfigurationError(
                f"expected rounds and proposals of at least 1, got {self.rounds} and {self.proposals}"
            )

    def _perturb(
        self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None, generator: Generator | None
    ) -> Tensor:
        if self.eps < 1:
            return images
        precision = choose_precision(detector, images, labels) if self.precision == "auto" else self.precision
        search = InBfloat16(detector) if precision == "bf16" else None
        norm, objective = get_norm(self.norm), get_objective(self.objective)
        problem = Problem(detector, images, labels, targets, norm, self.eps, objective, generator, search)
        best, margins = images.clone(), problem.margin(images)
        corners = self._draw_corners(problem)
        for turn in range(self.rounds):
            rows = (~(margins <= 0)).nonzero().squeeze(1)
            if not len(rows):
                break
            part = problem.select(rows)
            candidates, places = self._propose(part, best[rows], corners[rows], moved=bool(turn % 2))
            rule = _StepInside(_Squares(places, self._shape(problem)).mask(images.shape[2:]), self.step_size)
            candidates = descend(part, candidates, rule, gradient=backpropagate, steps=self.steps)
            least = part.margin(candidates)
            better = least < margins[rows]
            changed = rows[better]
            best[changed], margins[changed], corners[changed] = candidates[better], least[better], places[better]
        return best

    @torch.no_grad()
    def _propose(self, problem: Problem, best: Tensor, corners: Tensor, *, moved: bool) -> tuple[Tensor, Tensor]:
        """The best (B, C, H, W) of this round's proposals, and the corners (B, 2) of their patches."""
        count, shape = len(best), self._shape(problem)
        wide = problem.select(torch.arange(count, device=best.device).repeat_interleave(self.proposals))
        pixels = _Squares(corners, shape).cut(best).repeat_interleave(self.proposals, dim=0)
        if moved:
            shift = (_uniform(wide, 2) * (2 * _NEAR + 1)).floor().long() - _NEAR
            room = _room(problem, shape)
            places = (corners.repeat_interleave(self.proposals, dim=0) + shift).clamp_min(0).minimum(room)
        else:
            places = self._draw_corners(wide)
            kind = _uniform(wide, 1, 1, 1) * 3
            plain, noise = ((_uniform(wide, best.shape[1], *size) < 0.5).to(best) for size in ((1, 1), shape))
            pixels = torch.where(kind < 1, plain, torch.where(kind < 2, noise, pixels))
        proposed = _Squares(places, shape).paste(wide.images, pixels)
        parts = torch.arange(len(proposed), device=best.device).split(self.batch_size or len(proposed))
        judged = torch.cat([wide.select(part).margin(proposed[part]) for part in parts]).nan_to_num(torch.inf)
        chosen = judged.unflatten(0, (count, self.proposals)).argmin(dim=1)
        index = torch.arange(count, device=best.device) * self.proposals + chosen
        return proposed[index], places[index]

    def _draw_corners(self, problem: Problem) -> Tensor:
        """The upper left corners (B, 2) of patches at random places, as rows and columns."""
        room = _room(problem, self._shape(problem))
        return (_uniform(problem, 2) * (room + 1)).floor().long().minimum(room)

    def _shape(self, problem: Problem) -> tuple[int, int]:
        height, width = problem.images.shape[2:]
        return min(int(self.eps), height), min(int(self.eps), width)


class _Squares(NamedTuple):
    """One rectangle in each image of a batch.

    Attributes:
        corners: (B, 2) row and column of the upper left corner.
        shape: height and width.
    """

    corners: Tensor
    shape: tuple[int, int]

    def _index(self) -> tuple[Tensor, Tensor, Tensor]:
        device = self.corners.device
        batch = torch.arange(len(self.corners), device=device)[:, None, None]
        rows = self.corners[:, :1] + torch.arange(self.shape[0], device=device)
        columns = self.corners[:, 1:] + torch.arange(self.shape[1], device=device)
        return batch, rows[:, :, None], columns[:, None, :]

    def cut(self, images: Tensor) -> Tensor:
        """The pixels inside: (B, C, H, W) -> (B, C, h, w)."""
        batch, rows, columns = self._index()
        return images.movedim(1, 3)[batch, rows, columns].movedim(3, 1)

    def paste(self, images: Tensor, pixels: Tensor) -> Tensor:
        """The images (B, C, H, W) with these pixels (B, C, h, w) inside."""
        pasted = images.movedim(1, 3).clone()
        pasted[self._index()] = pixels.movedim(1, 3)
        return pasted.movedim(3, 1).contiguous()

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """A mask (B, 1, H, W) of the rectangles."""
        mask = torch.zeros(len(self.corners), *shape, dtype=torch.bool, device=self.corners.device)
        mask[self._index()] = True
        return mask[:, None]


class _StepInside:
    """The rule of signed steps inside masks (B, 1, H, W)."""

    def __init__(self, mask: Tensor, step_size: float) -> None:
        self._mask, self._step_size = mask, step_size

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        signs = evaluation.gradient.nan_to_num(nan=0).sign()
        return torch.where(self._mask, (iterates - self._step_size * signs).clamp(0, 1), problem.images)

    def select(self, index: Tensor) -> None:
        self._mask = self._mask[index]


def _room(problem: Problem, shape: tuple[int, int]) -> Tensor:
    """The largest row and column (2,) of a corner."""
    height, width = problem.images.shape[2:]
    return torch.tensor([height - shape[0], width - shape[1]], device=problem.images.device)


def _uniform(problem: Problem, *shape: int) -> Tensor:
    """Random numbers (B, *shape) in [0, 1)."""
    return problem.images.new_empty(len(problem.images), *shape).uniform_(generator=problem.generator)
