"""What training minimises: the negative log-likelihood of equation 31, and terms that go beyond the paper."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from clusterguard._support import check_numbers, check_range, check_tensor
from clusterguard.detectors import Head
from clusterguard.errors import ConfigurationError
from torch import Tensor
from torch.nn import functional


class Target(ABC):
    """Where training sends attacked images that got through."""

    @abstractmethod
    def energy(
        self, head: Head, representations: Tensor, labels: Tensor, accepted_as: Tensor, thresholds: Tensor
    ) -> Tensor:
        """How far attacked images are from there, squared: 0 where they have arrived.

        Args:
            head: says how far representations are from each class.
            representations: (B, m).
            labels: (B,) their original classes y.
            accepted_as: (B,) the labels ŷ that the guard gave them.
            thresholds: (K,) τ; one that is not finite does not bound anything yet.

        Returns:
            (B,).
        """


@final
@dataclass(frozen=True)
class Origin(Target):
    """The paper's adversarial centre, one for all: ‖z‖².

    Example:
        >>> from clusterguard.detectors import GaussianClusters
        >>> z, label = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
        >>> Origin().energy(GaussianClusters(2, center_scale=2.0), z, label, 1 - label, torch.full((2,), 2.0))
        tensor([1.])
    """

    def energy(
        self, head: Head, representations: Tensor, labels: Tensor, accepted_as: Tensor, thresholds: Tensor
    ) -> Tensor:
        """As in `Target`."""
        return head.adversarial_energy(representations)


@final
@dataclass(frozen=True)
class Opposite(Target):
    """A centre for every class, across the origin from its own: ‖z + u(y)‖².

    So attacks on different classes need not look alike.

    Example:
        >>> from clusterguard.detectors import GaussianClusters
        >>> z, label = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
        >>> Opposite().energy(GaussianClusters(2, center_scale=2.0), z, label, 1 - label, torch.full((2,), 2.0))
        tensor([5.])
    """

    def energy(
        self, head: Head, representations: Tensor, labels: Tensor, accepted_as: Tensor, thresholds: Tensor
    ) -> Tensor:
        """As in `Target`."""
        return head.energies(-representations).gather(1, labels[:, None].long()).squeeze(1)  # ‖z + u‖ = ‖−z − u‖


@final
@dataclass(frozen=True)
class Outside(Target):
    """No centre, just out of the region that is accepted as ŷ: max(0, (1 + margin) τ_ŷ − d_ŷ)².

    Half the distance between centres takes the place of a τ that is not finite.

    Args:
        margin: how far beyond the threshold, as a share of it; at least 0.

    Raises:
        ConfigurationError: a negative margin.

    Example:
        >>> from clusterguard.detectors import GaussianClusters
        >>> z, label = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
        >>> outside = Outside(margin=0.5)
        >>> outside.energy(GaussianClusters(2, center_scale=2.0), z, label, 1 - label, torch.full((2,), 2.0))
        tensor([4.])
    """

    margin: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(margin=self.margin)
        if not 0 <= self.margin < math.inf:
            raise ConfigurationError(f"expected a margin of at least 0, got {self.margin}")

    def energy(
        self, head: Head, representations: Tensor, labels: Tensor, accepted_as: Tensor, thresholds: Tensor
    ) -> Tensor:
        """As in `Target`."""
        reach = (1 + self.margin) * torch.where(thresholds.isfinite(), thresholds, head.half_way)
        distance = head.distances(representations).gather(1, accepted_as[:, None].long()).squeeze(1)
        return (reach[accepted_as.long()] - distance).clamp_min(0).square()


class Relabelled(NamedTuple):
    """A batch when it has been attacked.

    Attributes:
        images: (B, C, H, W) benign ones, then attacked ones.
        labels: (B,) their original classes.
        accepted_as: (B,) the labels that the guard gave to attacked ones; of benign ones their classes.
        is_separate: (B,) the share of each, in [0, 1], that does not belong to its class.
    """

    images: Tensor
    labels: Tensor
    accepted_as: Tensor
    is_separate: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class ClusterLoss:
    """What the paper's training minimises, and what may stand beside it.

    ``mean over the images of their classes of ½d² + weight · mean over the adversarial ones of ½·energy``: equation 31
    as a negative log-likelihood. The likelihood itself underflows in float32 at the distances of an untrained network.

    Args:
        target: where attacked images that got through are sent: `Origin()`, the paper's, `Opposite()` or `Outside()`.
        weight: factor of their term, at least 0.
        floor: share of the attacked images, in [0, 1]: the mean over successes is taken over at least so many. With the
            paper's 0 a single success weighs as much as all other images together.
        cross_entropy_weight: factor of a further term, at least 0: the cross-entropy of softmax(−½d² / T), averaged
            over the images that belong to their classes. The likelihood pulls an image to its own centre however far
            the others are; cross-entropy only cares which is closest.
        temperature: T, positive. It is fixed: the optimizer is yours, and would not know of a learned one. At 1 the
            cross-entropy is that of the guard's own posterior, which is all but 0 a little off the boundary.

    Raises:
        ConfigurationError: an option out of its range.

    Reference:
        arXiv 2012.03483, equation 31.

    Example:
        >>> ClusterLoss(target=Outside(margin=0.2), weight=0.1)
        ClusterLoss(target=Outside(margin=0.2), weight=0.1, floor=0.0, cross_entropy_weight=0.0, temperature=1.0)
    """

    target: Target = Origin()
    weight: float = 1.0
    floor: float = 0.0
    cross_entropy_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.target, Target):
            raise ConfigurationError(f"expected target Origin(), Opposite() or Outside(), got {self.target!r}")
        names = ("weight", "floor", "cross_entropy_weight", "temperature")
        check_numbers(**{name: getattr(self, name) for name in names})
        for name in ("weight", "cross_entropy_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"expected {name} of at least 0, got {getattr(self, name)}")
        if not 0 <= self.floor <= 1:
            raise ConfigurationError(f"expected floor in [0, 1], got {self.floor}")
        if not 0 < self.temperature < math.inf:
            raise ConfigurationError(f"expected a positive temperature, got {self.temperature}")

    def __call__(
        self, head: Head, representations: Tensor, batch: Relabelled, thresholds: Tensor, counts: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what it is made of.

        Args:
            head: says how far representations are from each class.
            representations: (B, m) of the batch's images.
            batch: what is known of them.
            thresholds: (K,).
            counts: (2,) as `counts_of` has them; with several processes, of all their images.

        Returns:
            A scalar with its gradient, and its terms by name.
        """
        if self.floor:
            attacked = counts.sum() / 2
            counts = torch.stack([counts[0], counts[1].clamp_min(self.floor * attacked)])
        energy = self.target.energy(head, representations, batch.labels, batch.accepted_as, thresholds)
        own, adversarial = cluster_terms(head, representations, batch.labels, batch.is_separate, counts, energy)
        loss, terms = own + self.weight * adversarial, {"own": own, "adversarial": adversarial}
        if self.cross_entropy_weight:
            terms["cross_entropy"] = class_cross_entropy(
                head, representations, batch.labels, batch.is_separate, counts, temperature=self.temperature
            )
            loss = loss + self.cross_entropy_weight * terms["cross_entropy"]
        return loss, terms


def cluster_loss(
    head: Head,
    representations: Tensor,
    labels: Tensor,
    is_separate: Tensor,
    *,
    adversarial_weight: float = 1.0,
) -> Tensor:
    """Equation 31 as a negative log-likelihood, without its constant.

    ``adversarial_weight · mean over D_S of ½d²(adversarial centre) + mean over the rest of ½d²(own centre)``; an
    empty set counts 0.

    Args:
        head: says how far representations are from each class.
        representations: (B, m).
        labels: (B,) the class each belongs to, where it belongs to one.
        is_separate: (B,) True for D_S, the images that belong to the adversarial cluster; or the share of each, in
            [0, 1], that does.
        adversarial_weight: factor of the first mean.

    Returns:
        A scalar.

    Raises:
        InputError: tensors of a wrong shape, dtype or device, or labels out of range.

    Reference:
        arXiv 2012.03483, equation 31.

    Example:
        >>> from clusterguard.detectors import GaussianClusters
        >>> clusters = GaussianClusters(2, center_scale=2.0)
        >>> cluster_loss(clusters, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([False]))
        tensor(2.)
        >>> cluster_loss(clusters, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([True]))
        tensor(0.)
    """
    _check_shares(is_separate, len(representations), like=representations)
    own, adversarial = cluster_terms(head, representations, labels, is_separate, counts_of(is_separate))
    return own + adversarial_weight * adversarial


def _check_shares(is_separate: Tensor, count: int, *, like: Tensor) -> None:
    is_share = isinstance(is_separate, Tensor) and is_separate.is_floating_point()
    check_tensor(is_separate, "is_separate", count, kind="floating-point" if is_share else "bool", like=like)


def counts_of(is_separate: Tensor) -> Tensor:
    """How many images belong to their classes and how many to the adversarial cluster, (2,), shares added up.

    Args:
        is_separate: (B,) bools, or shares in [0, 1].
    """
    separate = is_separate.float()
    return torch.stack([(1 - separate).sum(), separate.sum()])


def cluster_terms(
    head: Head,
    representations: Tensor,
    labels: Tensor,
    is_separate: Tensor,
    counts: Tensor,
    adversarial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two means of `cluster_loss`: over images of their classes, and over those of the adversarial cluster.

    Args:
        head: says how far representations are from each class.
        representations: (B, m).
        labels: (B,).
        is_separate: (B,) bools, or shares in [0, 1].
        counts: (2,) what the two sums are divided by, unless it is less than 1; see `counts_of`.
        adversarial: (B,) twice what the second mean is of, see `Target.energy`; None takes the head's.

    Returns:
        Two scalars.
    """
    energies = head.energies(representations)
    check_tensor(labels, "labels", len(energies), kind="integer", like=representations)
    _check_shares(is_separate, len(energies), like=representations)
    if labels.device.type == "cpu":  # elsewhere looking waits for the device
        check_range(labels, head.num_classes)
    separate = is_separate.to(counts.dtype)
    own = energies.gather(1, labels[:, None].long()).squeeze(1)
    if adversarial is None:
        adversarial = head.adversarial_energy(representations)
    sums = [
        torch.where(share > 0, share * energy, 0).sum()
        for share, energy in ((1 - separate, own), (separate, adversarial))
    ]
    own_mean, adversarial_mean = 0.5 * torch.stack(sums) / counts.clamp_min(1)
    return own_mean, adversarial_mean


def class_cross_entropy(
    head: Head,
    representations: Tensor,
    labels: Tensor,
    is_separate: Tensor,
    counts: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Mean cross-entropy of softmax(−½d² / temperature) over the images that belong to their classes.

    Args:
        head: says how far representations are from each class.
        representations: (B, m).
        labels: (B,).
        is_separate: (B,) bools, or shares in [0, 1] that do not count.
        counts: (2,) the first is what the sum is divided by, unless it is less than 1; see `counts_of`.
        temperature: positive.

    Returns:
        A scalar.
    """
    logits = head.logits(representations) / temperature  # −½d² up to a constant per row
    losses = functional.cross_entropy(logits, labels.long(), reduction="none")
    share = 1 - is_separate.to(counts.dtype)
    return torch.where(share > 0, share * losses, 0).sum() / counts[0].clamp_min(1)
