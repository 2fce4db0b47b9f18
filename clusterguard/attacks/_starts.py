"""Starts of attacks; around a plateau, only a good start tells a robust guard from one with masked gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from clusterguard._support import check_detector, check_images, check_labels, check_tensor, evaluation_mode, look_up
from clusterguard.attacks._descent import Problem, backpropagate
from clusterguard.detection import Detector, Evidence, decide, full_precision
from clusterguard.errors import ConfigurationError
from torch import Tensor

Start = Callable[[Problem], Tensor]
"""A function from a problem to the first iterates (B, C, H, W), inside ball and box."""


def at_image(problem: Problem) -> Tensor:
    """The clean images of the problem."""
    return problem.images


def at_random(problem: Problem) -> Tensor:
    """A random point of ball ∩ box for each of the problem's images."""
    return problem.norm.random_start(problem.images, problem.eps, problem.generator)


@final
@dataclass(frozen=True)
class RandomWithin:
    """A start at a random point of a smaller ball around each image.

    Args:
        share: radius of the smaller ball as a share of the attack's radius, in [0, 1].
    """

    share: float

    def __call__(self, problem: Problem) -> Tensor:
        """A random point of the smaller ball ∩ box for each of the problem's images."""
        return problem.norm.random_start(problem.images, self.share * problem.eps, problem.generator)


def output_diversified(problem: Problem) -> Tensor:
    """The points after three steps of length eps along a random direction of the class scores.

    The steps begin at a random start for each image of the problem.

    Reference:
        Tashiro, Song & Ermon, "Diversity can be transferred: output diversification" (2020).
    """
    shape = len(problem.images), len(problem.detector.thresholds)
    weights = torch.empty(shape, device=problem.images.device).uniform_(-1, 1, generator=problem.generator)

    def along(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        return (evidence.class_scores * weights.to(evidence.class_scores.dtype)).sum(dim=1)

    diversified = replace(problem, objective=along)
    iterates = at_random(problem)
    size = torch.as_tensor(problem.eps, dtype=iterates.dtype, device=iterates.device).view(-1, 1, 1, 1)
    for _ in range(3):
        gradient = backpropagate(diversified, iterates).gradient
        iterates = problem.project(iterates - size * problem.norm.direction(gradient))
    return iterates


@torch.no_grad()
def is_accepted(detector: Detector, images: Tensor, labels: Tensor, *, batch_size: int) -> Tensor:
    """Whether a detector accepts images under their labels, (B,).

    Args:
        detector: calibrated detector.
        images: (B, C, H, W) benign images in [0, 1], which have been checked.
        labels: (B,) true labels.
        batch_size: number of images to judge at a time, at least 1.
    """
    if not len(images):
        return torch.zeros(0, dtype=torch.bool, device=images.device)
    with evaluation_mode(detector) as detector, full_precision():
        verdicts = [decide(detector.evidence(part), detector.thresholds) for part in images.split(batch_size)]
    predicted = torch.cat([verdict.labels for verdict in verdicts])
    refused = torch.cat([verdict.is_adversarial for verdict in verdicts])
    return ~refused & (predicted == labels)


@final
@dataclass(frozen=True, eq=False)
class Towards:
    """A start at an accepted benign image of a wrong class, or of the target, projected onto the ball.

    An adversarial cluster makes a plateau that gradients from the clean image do not leave. These starts lie inside the
    accepted region or close to it. Of the nearest images of each class, the one with the smallest success margin after
    the projection is taken, because the nearest one may lose what makes its class on the way.

    Args:
        images: (R, C, H, W) benign images that the detector accepts.
        labels: (R,) labels that the detector gives to the images.
        tries: number of the nearest images of each class to choose from, at least 1, by one query each; with 1, the
            nearest image of all is taken without a query.

    Example:
        >>> import torch
        >>> references = Towards(torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0]))
        >>> references
        Towards(5 images of 3 classes)
    """

    images: Tensor
    labels: Tensor
    tries: int = 1

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ConfigurationError(f"expected tries of at least 1, got {self.tries}")

    @classmethod
    def accepted(cls, detector: Detector, images: Tensor, labels: Tensor, *, batch_size: int = 500) -> "Towards":
        """A start from those images that the detector accepts under their labels.

        Args:
            detector: calibrated detector.
            images: (R, C, H, W) benign images in [0, 1].
            labels: (R,) true labels.
            batch_size: number of images to judge at a time, at least 1.

        Returns:
            The start with the accepted images.

        Raises:
            InputError: images or labels have a wrong shape, dtype, range or device.
            ConfigurationError: `batch_size` is below 1.
        """
        check_detector(detector)
        check_images(images)
        check_labels(labels, images, len(detector.thresholds))
        if batch_size < 1:
            raise ConfigurationError(f"expected a batch_size of at least 1, got {batch_size}")
        usable = is_accepted(detector, images, labels, batch_size=batch_size)
        return cls(images[usable], labels[usable])

    def __call__(self, problem: Problem) -> Tensor:
        """The projected references of a problem's images, or the clean image if no reference has a fitting class."""
        if not len(self.images):
            return problem.images
        distances = torch.cdist(problem.images.flatten(1), self.images.flatten(1).to(problem.images.dtype))
        if problem.targets is None:
            fits = self.labels != problem.labels[:, None]
        else:
            fits = self.labels == problem.targets[:, None]
        distances = distances.masked_fill(~fits, torch.inf)
        if self.tries == 1:
            return self._place(problem, *distances.min(dim=1))
        start, least = problem.images, torch.full_like(distances[:, 0], torch.inf)
        for label in self.labels.unique() if problem.targets is None else (None,):
            chosen = distances if label is None else distances.masked_fill(self.labels != label, torch.inf)
            nearest = chosen.topk(min(self.tries, chosen.shape[1]), dim=1, largest=False)
            for distance, index in zip(nearest.values.T, nearest.indices.T, strict=True):
                placed = self._place(problem, distance, index)
                margin = problem.margin(placed).to(least.dtype).masked_fill(distance.isinf(), torch.inf)
                better = margin < least
                start = torch.where(better[:, None, None, None], placed, start)
                least = torch.where(better, margin, least)
        return start

    def _place(self, problem: Problem, distance: Tensor, index: Tensor) -> Tensor:
        """The projections of these references (B,), or the clean images where the distances (B,) are infinite."""
        candidates = self.images[index].to(problem.images.dtype)
        return problem.project(torch.where(distance.isfinite()[:, None, None, None], candidates, problem.images))

    def __repr__(self) -> str:
        return f"Towards({len(self.images)} images of {len(self.labels.unique())} classes)"


@final
@dataclass(frozen=True, eq=False)
class AtPoints:
    """A start at given points, such as what another attack has returned, projected onto the ball.

    Args:
        points: (B, C, H, W) in [0, 1], one for each image of the attack. The attack's `batch_size` must not be smaller
            than B, because this start does not know which part of the images it is asked for.

    Example:
        >>> AtPoints(torch.rand(5, 1, 2, 2))
        AtPoints(5 images)
    """

    points: Tensor

    def __call__(self, problem: Problem) -> Tensor:
        """The points, projected onto the balls of the problem's images.

        Raises:
            InputError: there are not as many points as images, or they have another shape, dtype or device.
        """
        check_tensor(self.points, "points, one for each image of a batch,", *problem.images.shape, like=problem.images)
        return problem.project(self.points)

    def __repr__(self) -> str:
        return f"AtPoints({len(self.points)} images)"


def towards_batch(problem: Problem) -> Tensor:
    """The nearest image of a wrong class, or of the target, in a problem's own batch, projected onto the ball.

    This start is meant for training against an adversarial cluster, because gradients from the clean image do not reach
    the accepted regions behind the cluster.
    """
    return Towards(problem.images, problem.labels)(problem)


STARTS: dict[str, Start] = {
    "image": at_image,
    "random": at_random,
    "output_diversified": output_diversified,
    "towards_batch": towards_batch,
}


def get_start(start: str | Start) -> Start:
    """The start with this name, or the callable itself.

    Raises:
        ConfigurationError: the name is unknown.
    """
    return look_up(start, STARTS, "a start") if isinstance(start, str) else start
