"""The boundary attack: from an accepted image of another class, walk towards the clean one by verdicts alone."""

from dataclasses import dataclass
from typing import final

import torch
from clusterguard.attacks.base import BuiltInAttack, check_budget
from clusterguard.attacks.norms import get_norm
from clusterguard.attacks.starts import Towards
from clusterguard.decision import Detection, Detector, decide
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Boundary(BuiltInAttack):
    """A decision-based attack: all it learns of an image is the label, and whether it is accepted.

    It starts from accepted images of other classes, for a distance detector refuses noise outright; halves the way to
    the clean image; then walks along the boundary and inwards, each image with steps of its own. An image whose
    closest success is farther than `eps`, or for which no start is found, comes back clean. So does an object's that
    has nothing but ``detect(images)``, on which this attack works too.

    Args:
        norm: "l2" or "linf", whose distance is made small.
        eps: what counts as success, at least 0.
        queries: verdicts per image at most, at least 1.
        references: where to start; None takes the images under attack themselves, those that are accepted.
        starts: how many references to try per image until one is accepted under a wrong label.

    Raises:
        ConfigurationError: an option out of its range.

    Reference:
        Brendel, Rauber & Bethge, "Decision-based adversarial attacks" (2018).

    Example:
        >>> Boundary(norm="l2", eps=2.0, queries=1000).queries
        1000
    """

    norm: str = "l2"
    eps: float
    queries: int = 5000
    references: Towards | None = None
    starts: int = 5

    def __post_init__(self) -> None:
        check_budget(eps=self.eps, batch_size=self.batch_size)
        if self.norm not in ("l2", "linf"):
            raise ConfigurationError(f"expected norm 'l2' or 'linf', got {self.norm!r}")
        if self.queries < 1 or self.starts < 1:
            raise ConfigurationError(f"expected queries and starts of at least 1, got {self.queries} and {self.starts}")

    @torch.no_grad()
    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        norm, oracle = get_norm(self.norm), _Oracle(detector, labels, targets, self.queries)
        everything = torch.arange(len(images), device=images.device)
        clean = oracle.ask(images, everything)
        closest, distance = images.clone(), images.new_full((len(images),), torch.inf)
        distance[oracle.is_success(clean, everything)] = 0

        def offer(candidates: Tensor, rows: Tensor) -> Tensor:
            """Ask about candidates, keep those that succeed and are closer; (len(rows),) successes."""
            success = oracle.is_success(oracle.ask(candidates, rows), rows)
            size = norm.size(candidates - images[rows])
            better = success & (size < distance[rows])
            closest[rows[better]], distance[rows[better]] = candidates[better], size[better]
            return success

        for start in self._starts(images, clean, labels, targets):
            rows = oracle.open((distance.isinf() & start.isfinite().flatten(1).all(dim=1)).nonzero().squeeze(1))
            offer(start[rows], rows)
        low = torch.zeros_like(distance)
        begun, found = closest.clone(), distance.clone()
        for _ in range(10):
            rows = oracle.open((distance.isfinite() & (distance > 0)).nonzero().squeeze(1))
            middle = (low[rows] + distance[rows]) / 2
            success = offer(norm.project(images[rows], begun[rows], torch.minimum(middle, found[rows])), rows)
            low[rows[~success]] = middle[~success]

        sideways, inwards = torch.full_like(distance, 0.1), torch.full_like(distance, 0.05)
        for step in range(self.queries):
            rows = oracle.open((distance.isfinite() & (distance > 0)).nonzero().squeeze(1))
            if not len(rows):
                break
            noise = torch.empty_like(images).normal_(generator=generator)
            if self.norm == "linf":  # inside a cube, steps along few coordinates keep more of what was won
                noise *= torch.empty_like(images).uniform_(generator=generator) < 0.1
            noise = noise[rows] * _wide(sideways[rows] * distance[rows] / norm.size(noise[rows]).clamp_min(1e-12))
            shrink = 1 - inwards[rows] if step % 2 else torch.ones_like(inwards[rows])
            candidates = norm.project(images[rows], closest[rows] + noise, shrink * distance[rows])
            success = offer(candidates, rows)
            # About half of the steps along the boundary should succeed, and a quarter of those inwards.
            size, share = (inwards, 0.25) if step % 2 else (sideways, 0.5)
            size[rows] *= torch.where(success, 1.3 ** (1 - share), 1.3**-share)
            size.clamp_(1e-4, 0.5)
        return torch.where(_wide(distance <= self.eps), closest, images)

    def _starts(self, images: Tensor, clean: Detection, labels: Tensor, targets: Tensor | None) -> list[Tensor]:
        """The nearest references of a fitting class, nearest first; NaN where an image has no further one."""
        if self.references is None:
            pool, own = images[~clean.is_adversarial], clean.labels[~clean.is_adversarial]
        else:
            pool, own = self.references.images.to(images), self.references.labels
        fit = own != labels[:, None] if targets is None else own == targets[:, None]
        apart = torch.cdist(images.flatten(1), pool.flatten(1), p=2.0 if self.norm == "l2" else torch.inf)
        nearest = apart.masked_fill(~fit, torch.inf).topk(min(self.starts, len(pool)), largest=False)
        return [
            torch.where(_wide(gap.isfinite()), pool[index], torch.nan)
            for gap, index in zip(nearest.values.T, nearest.indices.T, strict=True)
        ]


class _Oracle:
    """Answers with verdicts, and counts them per image."""

    def __init__(self, detector: Detector, labels: Tensor, targets: Tensor | None, queries: int) -> None:
        self._detector = detector
        self._labels = labels
        self._targets = targets
        self._left = torch.full_like(labels, queries)

    def open(self, rows: Tensor) -> Tensor:
        """Those of the rows about which another question may be asked."""
        return rows[self._left[rows] > 0]

    def ask(self, images: Tensor, rows: Tensor) -> Detection:
        """Verdicts on images that belong to these rows."""
        self._left[rows] -= 1
        if hasattr(self._detector, "detect"):
            verdict: Detection = self._detector.detect(images)
            return verdict
        return decide(self._detector.evidence(images), self._detector.thresholds)

    def is_success(self, verdict: Detection, rows: Tensor) -> Tensor:
        """Whether they are accepted under the target, or under a wrong label."""
        if self._targets is None:
            return (verdict.labels != self._labels[rows]) & ~verdict.is_adversarial
        return (verdict.labels == self._targets[rows]) & ~verdict.is_adversarial


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
