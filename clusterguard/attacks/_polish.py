"""A last search around images that other attacks have left close to success."""

from dataclasses import dataclass, replace
from typing import final

import torch
from clusterguard.attacks._base import BuiltInAttack, check_budget
from clusterguard.attacks._descent import Problem, backpropagate, descend
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._objectives import margin as margin_objective
from clusterguard.attacks._pgd import SteepestDescent
from clusterguard.attacks._search_precision import InBfloat16, Precision, check_precision, choose_precision
from clusterguard.attacks._starts import Start, get_start
from clusterguard.detection import Detector, class_margins
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor

_STEP_SHARES = (1 / 4, 1 / 16)  # lengths of the gradient steps in the two runs, as shares of the radius
_PAINTS = 4  # 0, 1, the clean value, and a corner of the ball


@final
@dataclass(frozen=True, kw_only=True)
class Polish(BuiltInAttack):
    """A local search that alternates random rectangles with short gradient steps, always from the best image so far.

    Other attacks start anew each time, although the images that they leave are often close to success. A proposal
    paints a random rectangle of the best image with 0, 1, the clean value or a corner of the ball. Half of the
    proposals also restore the clean value in a second rectangle, to free budget for the first. Every proposal is
    projected onto the ball. Then two short runs of gradient steps aim at the nearest wrong classes, one after the
    other.

    After the first rounds, the half of the images that is nearest to success gets twice as many rounds more, and so on.

    Args:
        norm: norm of the ball, a name of `clusterguard.attacks.NORMS`.
        eps: radius of the ball, at least 0.
        rounds: number of alternations that every image gets, at least 1.
        halvings: number of times that the nearer half of the images goes on, at least 0.
        tries: number of times that each round proposes rectangles.
        proposals: number of rectangles to choose from each time.
        steps: number of gradient steps of each run.
        max_targets: number of wrong classes that each round aims at.
        start: first image, as in `IteratedAttack`.
        precision: precision of the gradient steps, as in `IteratedAttack`.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Andriushchenko et al., "Square Attack" (2020), for random search over squares; Jamieson & Talwalkar,
        "Non-stochastic best arm identification" (2016), for the halving. The alternation is ours.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = Polish(norm="l2", eps=1.0, rounds=2)(guard, images, labels)
        >>> bool((attacked - images).flatten(1).norm(dim=1).max() <= 1 + 1e-6)
        True
    """

    norm: str = "linf"
    eps: float
    rounds: int = 5
    halvings: int = 3
    tries: int = 8
    proposals: int = 16
    steps: int = 8
    max_targets: int = 3
    start: str | Start = "image"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_budget(eps=self.eps, norm=self.norm, steps=self.steps, batch_size=self.batch_size)
        get_norm(self.norm)
        get_start(self.start)
        check_precision(self.precision)
        counts = {name: getattr(self, name) for name in ("rounds", "tries", "proposals", "max_targets")}
        if min(counts.values()) < 1 or self.halvings < 0:
            raise ConfigurationError(
                "expected rounds, tries, proposals and max_targets of at least 1 and halvings of at least 0, got "
                f"{counts} and halvings {self.halvings}"
            )

    def _perturb(
        self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None, generator: Generator | None
    ) -> Tensor:
        precision = choose_precision(detector, images, labels) if self.precision == "auto" else self.precision
        search = InBfloat16(detector) if precision == "bf16" else None
        norm = get_norm(self.norm)
        problem = Problem(detector, images, labels, targets, norm, self.eps, margin_objective, generator, search)
        best = get_start(self.start)(problem).clone()
        margins = problem.margin(best)
        chosen = torch.arange(len(best), device=best.device)
        for halving in range(self.halvings + 1):
            for _ in range(self.rounds * 2**halving):
                chosen = chosen[~(margins[chosen] <= 0)]
                if not len(chosen):
                    return best
                best[chosen], margins[chosen] = self._go_on(problem.select(chosen), best[chosen], margins[chosen])
            chosen = chosen[margins[chosen].argsort()[: -(-len(chosen) // 2)]]
        return best

    def _go_on(self, problem: Problem, states: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The best images (B, C, H, W) and their margins (B,) after one more round."""
        for _ in range(self.tries):
            states, losses = self._paint(problem, states, losses)
        return self._descend(problem, states, losses)

    @torch.no_grad()
    def _paint(self, problem: Problem, states: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The states and margins after the best of the proposals has replaced each state with a larger margin.

        States are (B, C, H, W), and losses are their margins (B,).
        """
        count = len(states)
        wide = problem.select(torch.arange(count, device=states.device).repeat_interleave(self.proposals))
        proposed = states.repeat_interleave(self.proposals, dim=0)
        paint, restore = (self._rectangles(wide) for _ in range(2))
        restore = restore & (_uniform(wide, 1, 1, 1) < 0.5)
        proposed = torch.where(restore, wide.images, proposed)
        proposed = wide.project(torch.where(paint, self._colours(wide), proposed))
        parts = torch.arange(len(proposed), device=states.device).split(self.batch_size or len(proposed))
        judged = torch.cat([wide.select(part).margin(proposed[part]) for part in parts])
        by_state = judged.unflatten(0, (count, self.proposals)).nan_to_num(torch.inf)
        least, chosen = by_state.min(dim=1)
        fell = least < losses
        candidates = proposed.unflatten(0, (count, self.proposals))[torch.arange(count, device=states.device), chosen]
        return torch.where(fell[:, None, None, None], candidates, states), torch.where(fell, least, losses)

    def _rectangles(self, problem: Problem) -> Tensor:
        """A mask (B, 1, H, W) of a random rectangle for each image; small ones are as likely as large ones."""
        _, _, height, width = problem.images.shape

        def along(length: int) -> Tensor:
            side = (_uniform(problem, 1) * torch.tensor(max(1.0, length / 3)).log()).exp().floor()
            first = (_uniform(problem, 1) * (length - side + 1)).floor()
            position = torch.arange(length, device=problem.images.device)
            return (position >= first) & (position < first + side)

        return (along(height)[:, :, None] & along(width)[:, None, :])[:, None]

    def _colours(self, problem: Problem) -> Tensor:
        """Draw a colour for each image and channel: 0, 1, the clean value, or that plus or minus the radius."""
        images = problem.images
        paint = (_uniform(problem, 1, 1, 1) * _PAINTS).floor()
        signs = torch.where(_uniform(problem, images.shape[1], 1, 1) < 0.5, -1.0, 1.0).to(images)
        corner = images + signs * min(self.eps, 1.0)
        return torch.where(paint < 2, (signs + 1) / 2, torch.where(paint < 3, images, corner))

    def _descend(self, problem: Problem, states: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Take gradient steps; shapes as in `_paint`.

        Images whose margin falls take the new state, and the others keep the old one.
        """
        wrong = len(problem.detector.thresholds) - 1
        for rank in range(min(self.max_targets, wrong) if problem.targets is None else 1):
            aimed = replace(problem, targets=_nearest(problem, states, rank)) if problem.targets is None else problem
            for share in _STEP_SHARES:
                rule = SteepestDescent(max(share * self.eps, 1e-6), sparsity=0.05)
                moved = descend(aimed, states, rule, gradient=backpropagate, steps=self.steps)
                margins = problem.margin(moved)
                fell = margins < losses
                states = torch.where(fell[:, None, None, None], moved, states)
                losses = torch.where(fell, margins, losses)
        return states, losses


def _uniform(problem: Problem, *shape: int) -> Tensor:
    """Random numbers (B, *shape) in [0, 1)."""
    return problem.images.new_empty(len(problem.images), *shape).uniform_(generator=problem.generator)


@torch.no_grad()
def _nearest(problem: Problem, states: Tensor, rank: int) -> Tensor:
    """The wrong class (B,) with the smallest margin, for rank 0, or the one after it, and so on."""
    margins = class_margins(problem.detector.evidence(states), problem.detector.thresholds)
    order = margins.scatter(1, problem.labels[:, None], torch.inf).argsort(dim=1)
    return order[:, rank]
