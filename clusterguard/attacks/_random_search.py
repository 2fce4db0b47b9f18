"""Score-based attacks by random search, which are Square for linf, l2 and l1, and Sparse-RS for l0."""

import math
from abc import abstractmethod
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from clusterguard.attacks._base import BuiltInAttack, check_budget
from clusterguard.attacks._descent import Problem
from clusterguard.attacks._draws import Draws
from clusterguard.attacks._norms import L0, NORMS, get_norm
from clusterguard.attacks._objectives import Objective, get_objective
from clusterguard.detection import Detector, success_margin
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class RandomSearch(BuiltInAttack):
    """Base of attacks that change a random part of each image and keep the change if it lowers the objective.

    They use a detector's evidence and never a gradient. An attack returns the image with the smallest success margin
    among all queried ones, the clean image included.

    Args:
        eps: radius of the ball, at least 0, in units of the norm over pixels in [0, 1].
        queries: largest number of queries for each image, at least 1.
        initial_share: fraction of the pixels (for l0, of the changed pixels) that the first proposals change, in
            (0, 1].
        objective: loss to minimise, a name of `clusterguard.attacks.OBJECTIVES` or a callable.
        stop_early: whether broken images leave the batch, which breaks the same images with fewer queries.
    """

    eps: float
    queries: int = 5000
    initial_share: float = 0.8
    objective: str | Objective = "margin"
    stop_early: bool = True

    # The initial share is divided by these, each until the number of queries in `_lasts_until`. The numbers are out of
    # 10,000 queries, and are scaled down for fewer.
    _divisors: ClassVar[tuple[int, ...]]
    _lasts_until: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        check_budget(eps=self.eps, norm=self.norm, batch_size=self.batch_size)
        get_objective(self.objective)
        if self.queries < 1:
            raise ConfigurationError(f"expected at least 1 query, got {self.queries}")
        if not 0 < self.initial_share <= 1:
            raise ConfigurationError(f"expected initial_share in (0, 1], got {self.initial_share}")

    @property
    @abstractmethod
    def norm(self) -> str:
        """The norm of the perturbation."""

    @abstractmethod
    def _begin(self, problem: Problem, draws: "Draws") -> Tensor:
        """The first states (B, C, H, W)."""

    @abstractmethod
    def _propose(self, problem: Problem, states: Tensor, share: float, draws: "Draws") -> Tensor:
        """The states (B, C, H, W) with a random part of each changed."""

    def _show(self, problem: Problem, states: Tensor) -> Tensor:
        """Turn search states into images (B, C, H, W) inside the ball and [0, 1]."""
        return states

    @torch.no_grad()
    def _perturb(
        self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None, generator: Generator | None
    ) -> Tensor:
        objective = get_objective(self.objective)
        problem = Problem(detector, images, labels, targets, get_norm(self.norm), self.eps, objective)
        draws = Draws(images, generator)
        best = images.clone()
        _, best_margin = _ask(problem, images)
        states, loss = self._begin(problem, draws), torch.full_like(best_margin, torch.inf)
        for query in range(1, self.queries):
            if self.stop_early:  # the check waits for the device, but costs less than a wasted query
                unbroken = (best_margin[draws.rows] > 0).nonzero().squeeze(1)
                if not len(unbroken):
                    break
                if len(unbroken) < len(draws.rows):
                    problem, states, loss = problem.select(unbroken), states[unbroken], loss[unbroken]
                    draws.rows = draws.rows[unbroken]
            proposals = states if query == 1 else self._propose(problem, states, self._share(query), draws)
            shown = self._show(problem, proposals)
            proposed_loss, margin = _ask(problem, shown)
            fell = proposed_loss < loss  # false for NaN
            states = torch.where(fell[:, None, None, None], proposals, states)
            loss = torch.where(fell, proposed_loss, loss)
            better = margin < best_margin[draws.rows]
            rows = draws.rows[better]
            best[rows], best_margin[rows] = shown[better], margin[better]
        return best

    def _share(self, query: int) -> float:
        of_ten_thousand = (query - 2) * 10_000 // self.queries  # the first two were the clean image and the start
        return self.initial_share / self._divisors[bisect_left(self._lasts_until, of_ten_thousand)]


@final
@dataclass(frozen=True, kw_only=True)
class Square(RandomSearch):
    """The Square attack, which changes a random square of each image; the squares shrink over time.

    For linf, a square gets the colours of the image plus or minus eps. For l2 and l1, a bump with two signs is added to
    it. The bump uses the budget that is left and the budget of a second square, whose perturbation is erased. For l1,
    the projection also takes budget from the whole perturbation.

    Args:
        norm: norm of the ball, "linf", "l2" or "l1".

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search"
        (2020); for l1 Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (2021).

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = Square(norm="l2", eps=1.0, queries=50)(guard, images, labels)
        >>> bool((attacked - images).flatten(1).norm(dim=1).max() <= 1)
        True
    """

    norm: str = "linf"

    _divisors = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    _lasts_until = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if get_norm(self.norm).grain:
            continuous = ", ".join(name for name, norm in NORMS.items() if not norm.grain)
            raise ConfigurationError(f"expected a norm among {continuous}, got {self.norm!r}; SparseRS attacks in l0")

    def _begin(self, problem: Problem, draws: "Draws") -> Tensor:
        images = problem.images
        _, channels, height, width = images.shape
        if math.isinf(problem.norm.order):
            return problem.project(images + draws.signs(channels, 1, width))  # beyond every ball, so in a corner
        radius = min(self.eps, images[0].numel())  # eps may be too large for float32 arithmetic
        side = max(1, min(height, width) // 5)
        signs = draws.signs(channels, -(-height // side), -(-width // side))
        tiles = torch.kron(signs, _bump(side, images))[..., :height, :width]
        return problem.project(images + radius * _unit(problem, tiles))

    def _propose(self, problem: Problem, states: Tensor, share: float, draws: "Draws") -> Tensor:
        images = problem.images
        _, channels, height, width = images.shape
        is_box = math.isinf(problem.norm.order)
        smallest = 1 if is_box else 3  # a bump needs room for two signs
        side = min(max(smallest, round((share * height * width) ** 0.5)), height, width)
        square, row, column = draws.square(side)
        signs = draws.signs(channels, 1, 1)
        if is_box:
            painted, opposite = (
                problem.project(torch.where(square, images + sign, states)) for sign in (signs, -signs)
            )
            idle = (painted == states).flatten(1).all(dim=1)  # half of all single grey pixels would change nothing
            return torch.where(idle[:, None, None, None], opposite, painted)
        change, (erased, _, _) = states - images, draws.square(side)
        bump = _bump(side, images)
        bump = signs * torch.where(draws.signs(1, 1, 1) > 0, bump[row, column], bump[column, row])
        bump = _unit(problem, _unit(problem, bump * square) + _unit(problem, change * square))
        # Over disjoint sets of pixels, the p-th powers of sizes add up.
        p, radius = problem.norm.order, min(self.eps, images[0].numel())
        unspent = (radius**p - _size(problem, change) ** p).clamp_min(0)
        budget = (unspent + _size(problem, change * (square | erased)) ** p) ** (1 / p)
        # In l1 the bump exceeds the budget, so the projection takes the same amount from every pixel. Small changes
        # vanish, and few pixels carry the budget. With a factor of 1, this attack breaks less than half as many digits.
        factor = 10 if problem.norm.is_sparse else 1
        return problem.project(images + torch.where(square, factor * budget * bump, change.masked_fill(erased, 0)))


@final
@dataclass(frozen=True, kw_only=True)
class SparseRS(RandomSearch):
    """Sparse random search (Sparse-RS), which sets eps pixels to channels of 0 or 1.

    Each step moves a part of these pixels to other places and gives them new colours.

    Args:
        eps: number of pixels that may change, at least 0.
        initial_share: fraction of these pixels that the first steps move, in (0, 1].

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Croce et al., "Sparse-RS: a versatile framework for query-efficient sparse black-box adversarial attacks"
        (2022).

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = SparseRS(eps=5, queries=50)(guard, images, labels)
        >>> int((attacked != images).flatten(1).sum(dim=1).max()) <= 5
        True
    """

    eps: int
    initial_share: float = 0.3

    _divisors = (1, 2, 4, 5, 6, 8, 10, 12, 15, 20)
    _lasts_until = (0, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

    @property
    def norm(self) -> str:
        """The norm of the perturbation, which is always "l0"."""
        return L0.name

    # A state holds the colours of the chosen pixels, and NaN everywhere else.

    def _begin(self, problem: Problem, draws: "Draws") -> Tensor:
        states = torch.full_like(problem.images, torch.nan)
        return self._enter(states, self._count(states), draws)

    def _propose(self, problem: Problem, states: Tensor, share: float, draws: "Draws") -> Tensor:
        count = self._count(states)
        moving = min(max(1, int(share * count)), count)
        leaving = draws.choose(~states[:, :1].isnan(), moving)
        return self._enter(states.masked_fill(leaving, torch.nan), moving, draws)

    def _show(self, problem: Problem, states: Tensor) -> Tensor:
        return torch.where(states.isnan(), problem.images, states)

    def _count(self, states: Tensor) -> int:
        return int(min(self.eps, states[0, 0].numel()))

    @staticmethod
    def _enter(states: Tensor, count: int, draws: "Draws") -> Tensor:
        entering = draws.choose(states[:, :1].isnan(), count)
        return torch.where(entering, (draws.signs(*states.shape[1:]) + 1) / 2, states)


def _ask(problem: Problem, images: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the success margin of each image, from one query."""
    evidence, thresholds = problem.detector.evidence(images), problem.detector.thresholds
    loss = problem.objective(evidence, thresholds, problem.labels, problem.targets)
    margin = success_margin(evidence, thresholds, problem.labels, problem.targets)
    return loss.to(margin.dtype), margin


def _bump(side: int, like: Tensor) -> Tensor:
    """Two stepped pyramids of opposite signs, one above the other, (side, side)."""
    row, half = torch.arange(side, device=like.device), side // 2
    peak_row = torch.where(row < half, half // 2, half + (side - half) // 2)
    rings = torch.maximum((row - peak_row).abs()[:, None], (row - half).abs())
    heights = (1 / torch.arange(1, half + 2).to(like) ** 2).flip(0).cumsum(0).flip(0)
    return heights[rings] * torch.where(row < half, 1, -1)[:, None]


def _size(problem: Problem, perturbations: Tensor) -> Tensor:
    return problem.norm.size(perturbations)[:, None, None, None]


def _unit(problem: Problem, perturbations: Tensor) -> Tensor:
    size = _size(problem, perturbations)
    return perturbations / torch.where(size > 0, size, 1)
