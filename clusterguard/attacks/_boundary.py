"""The boundary attack, which walks from accepted images of other classes to the clean image by verdicts alone."""

import itertools
import math
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from clusterguard._support import check_detector
from clusterguard.attacks._base import BuiltInAttack, check_budget
from clusterguard.attacks._draws import Draws
from clusterguard.attacks._norm_base import Norm
from clusterguard.attacks._norms import NORMS, get_norm
from clusterguard.attacks._starts import Towards
from clusterguard.detection import Detection, Detector, decide
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


@runtime_checkable
class VerdictSource(Protocol):
    """A detector as a decision-based attack needs it; every `DetectorModule` is one."""

    def detect(self, images: Tensor, /) -> Detection:
        """The verdict on images (B, C, H, W) in [0, 1], of which only `labels` and `is_adversarial` are used."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Boundary(BuiltInAttack):
    """The boundary attack, which walks from accepted images of other classes along the boundary to the clean image.

    It uses labels and refusals and nothing else. It returns the closest adversarial image if its distance is at most
    eps. Otherwise, and for an image without a start, it returns the clean image.

    Steps sideways keep the distance and change a random square, with small and large squares in turn. For l2, steps
    with the paper's Gaussian noise take turns with squares. On digits, squares get a fifth closer than noise with as
    many queries.

    Args:
        norm: norm of the distance, "l2" or "linf"; a sparse norm is refused.
        eps: largest distance that counts as success, at least 0; infinity returns the closest image at any distance.
        queries: largest number of queries for each image, at least 1.
        references: images to start from, with the labels under which the detector accepts them; None takes the accepted
            images of the attacked batch as starts for each other.
        starts: number of references to try for each image, the nearest first, at least 1.
        stop_early: whether images leave the batch once they are within eps, which breaks the same images with fewer
            queries.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Brendel, Rauber & Bethge, "Decision-based adversarial attacks" (2018).

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = Boundary(norm="l2", eps=1.0, queries=50)(guard, images, labels)
        >>> bool((attacked - images).flatten(1).norm(dim=1).max() <= 1)
        True
    """

    norm: str = "l2"
    eps: float
    queries: int = 5000
    references: Towards | None = None
    starts: int = 100
    stop_early: bool = False

    _needs_evidence = False

    def __post_init__(self) -> None:
        check_budget(eps=self.eps, norm=self.norm, batch_size=self.batch_size, may_be_unbounded=True)
        if get_norm(self.norm).is_sparse:
            dense = ", ".join(name for name, norm in NORMS.items() if not norm.is_sparse)
            raise ConfigurationError(f"expected a norm among {dense}, got {self.norm!r}")
        if self.queries < 1 or self.starts < 1:
            raise ConfigurationError(f"expected at least 1 query and 1 start, got {self.queries} and {self.starts}")

    @torch.no_grad()
    def _perturb(
        self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None, generator: Generator | None
    ) -> Tensor:
        if not isinstance(detector, VerdictSource):
            check_detector(detector)
        enough = self.eps if self.stop_early else 0.0
        search = _Search(detector, images, labels, targets, get_norm(self.norm), self.queries, enough)
        verdict, _ = search.ask(images, torch.arange(len(images), device=images.device))
        if self.references is None:
            pool, pool_labels = images[~verdict.is_adversarial], verdict.labels[~verdict.is_adversarial]
        else:
            pool, pool_labels = self.references.images.to(images), self.references.labels.to(labels)
        fit = pool_labels != labels[:, None] if targets is None else pool_labels == targets[:, None]
        nearest = get_norm(self.norm).distances(images, pool).masked_fill(~fit, torch.inf).sort(dim=1)
        for radius, index in zip(nearest.values.T[: self.starts], nearest.indices.T, strict=False):
            search.approach(pool, index, radius)
        search.walk(generator)
        return torch.where((search.distance <= self.eps)[:, None, None, None], search.closest, images)


class _Search:
    """The closest known adversarial image for each image of a batch, and the number of queries left.

    Attributes:
        closest: (B, C, H, W) closest adversarial images; the clean image where none is known.
        distance: (B,) distance between closest and clean image, infinite where none is known.
    """

    def __init__(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        norm: Norm,
        queries: int,
        enough: float,
    ) -> None:
        self._detector, self._images, self._labels, self._targets = detector, images, labels, targets
        self._norm, self._enough = norm, enough
        self._left = torch.full_like(labels, queries)
        self.closest = images.clone()
        self.distance = torch.full_like(images[:, 0, 0, 0], torch.inf)

    def ask(self, candidates: Tensor, rows: Tensor) -> tuple[Detection, Tensor]:
        """Verdicts on candidates (b, C, H, W) for the images in these rows, and (b,) whether they are adversarial.

        An adversarial candidate that is no farther than the closest so far replaces it.
        """
        self._left[rows] -= 1
        if isinstance(self._detector, VerdictSource):
            verdict = self._detector.detect(candidates)
        else:
            verdict = decide(self._detector.evidence(candidates), self._detector.thresholds)
        right = verdict.labels == (self._labels if self._targets is None else self._targets)[rows]
        fooled = (~right if self._targets is None else right) & ~verdict.is_adversarial
        distance = self._norm.size(candidates - self._images[rows])
        closer = fooled & (distance <= self.distance[rows])
        self.closest[rows[closer]], self.distance[rows[closer]] = candidates[closer], distance[closer]
        return verdict, fooled

    def approach(self, pool: Tensor, index: Tensor, radius: Tensor) -> None:
        """Bisect the path from starts to images.

        The path consists of the start's projections onto smaller and smaller balls. For l2 it is a straight line.

        Args:
            pool: (R, C, H, W) starts.
            index: (B,) position in the pool of each image's start.
            radius: (B,) distance of the start from the image; infinite if the start is not usable for the image.
        """
        rows = self._open(radius)
        low, radius = torch.zeros_like(radius), torch.minimum(radius, _MUCH_CLOSER * self.distance)
        for halving in range(_HALVINGS + 1):
            if not len(rows):
                break
            _, fooled = self.ask(self._norm.project(self._images[rows], pool[index[rows]], radius[rows]), rows)
            low[rows[~fooled]] = radius[rows[~fooled]]
            radius = (low + self.distance) / 2
            rows = rows[(self._left[rows] > 0) & (fooled | (halving > 0))]  # useless starts cost one query

    def walk(self, generator: Generator | None) -> None:
        """Step sideways and inwards until every image is near enough or has no queries left."""
        is_box = math.isinf(self._norm.order)
        channels, *size = self._images.shape[1:]
        octaves = min(size).bit_length()
        kinds = octaves if is_box else octaves + 1
        # In a box a square goes to the opposite faces, because shorter steps are cut off on one side.
        shortest, longest = (2.0, 2.0) if is_box else (0.01, 1.0)
        sideways = self.distance.new_full((kinds, len(self.distance)), 0.1).clamp(shortest, longest)
        inwards = torch.full_like(self.distance, 0.01)
        draws = Draws(self._images, generator)
        for step in itertools.count():
            rows = draws.rows = self._open(self.distance)
            if not len(rows):
                break
            kind, probing = step % kinds, step // kinds % 4 == 0
            if kind < octaves:
                square, *_ = draws.square(2**kind)
                noise = square * draws.signs(channels, 1, 1)
            else:
                noise = torch.empty_like(self._images).normal_(generator=generator)[rows]
            images, distance = self._images[rows], self.distance[rows]
            noise *= (sideways[kind, rows] * distance / self._norm.size(noise))[:, None, None, None]
            radius = distance if probing else distance * (1 - inwards[rows])
            _, fooled = self.ask(self._norm.project(images, self.closest[rows] + noise, radius), rows)
            if probing:
                sideways[kind, rows] = _adapt(sideways[kind, rows], fooled, share=0.2).clamp(shortest, longest)
            else:
                inwards[rows] = _adapt(inwards[rows], fooled, share=0.1).clamp(0.001, 0.5)

    def _open(self, start: Tensor) -> Tensor:
        """Rows of images that have a start at a finite distance (B,), are not near enough, and have queries left."""
        return (start.isfinite() & (self.distance > self._enough) & (self._left > 0)).nonzero().squeeze(1)


def _adapt(lengths: Tensor, succeeded: Tensor, *, share: float) -> Tensor:
    """Step lengths changed so that over time they settle where this share of steps succeeds."""
    return lengths * torch.where(succeeded, 1.3 ** (1 - share), 1.3**-share)


_HALVINGS = 8
_MUCH_CLOSER = 0.98  # a start must beat the closest image by this factor, or it is left after one query
