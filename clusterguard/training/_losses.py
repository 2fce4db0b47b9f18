"""Training losses: the negative log-likelihood of equation 31, and terms that go beyond the paper."""

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
    """A place in representation space to which training moves attacked images that got through."""

    @abstractmethod
    def energy(
        self, head: Head, representations: Tensor, labels: Tensor, accepted_as: Tensor, thresholds: Tensor
    ) -> Tensor:
        """The energy of attacked images, which training reduces.

        Args:
            head: head of the guard, which computes distances and energies.
            representations: (B, m) representations of the attacked images.
            labels: (B,) original classes y of the images.
            accepted_as: (B,) labels ŷ that the guard gave to the images.
            thresholds: (K,) thresholds τ; a threshold that is not finite is not fitted yet.

        Returns:
            Energies (B,), on the scale of the head's energies. With the paper's head they are squared distances.
        """


@final
@dataclass(frozen=True)
class Origin(Target):
    """The head's adversarial cluster, the same for all classes, with its `adversarial_energy`.

    The paper's head has it at the origin, with the energy ‖z‖².

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
    """An adversarial cluster for each class, opposite to the cluster of the class: the energy of −z under class y.

    With the paper's head this is ‖z + u(y)‖², where u(y) is the centre of the class. With separate clusters, attacks on
    different classes need not have similar representations.

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
    """All points outside the region that is accepted as ŷ, with the energy max(0, (1 + margin) τ_ŷ − d_ŷ)².

    The distance d is the head's. A threshold τ that is not finite is replaced by the head's `packing_radius`.

    Args:
        margin: required distance beyond the threshold, as a fraction of the threshold; at least 0.

    Raises:
        ConfigurationError: the margin is negative.

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
        reach = (1 + self.margin) * torch.where(thresholds.isfinite(), thresholds, head.packing_radius)
        distance = head.distances(representations).gather(1, accepted_as[:, None].long()).squeeze(1)
        return (reach[accepted_as.long()] - distance).clamp_min(0).square()


class RelabelledBatch(NamedTuple):
    """A batch of benign and attacked images after relabelling.

    Attributes:
        images: (B, C, H, W) benign images, followed by attacked ones.
        labels: (B,) original classes of the images.
        accepted_as: (B,) labels that the guard gave to attacked images, and the classes of benign images.
        adversarial_share: (B,) share of each image, in [0, 1], that belongs to the adversarial cluster.
    """

    images: Tensor
    labels: Tensor
    accepted_as: Tensor
    adversarial_share: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class ClusterLoss:
    """The loss of the paper's training, with optional further terms.

    The loss is ``mean of ½·energy under their classes over the images that belong to them + weight · mean of ½·energy
    of the target over the adversarial images``. The energies under classes are the head's, squared distances d² for the
    paper's head. This is equation 31 as a negative log-likelihood. The likelihood itself underflows in float32 at the
    distances of an untrained network.

    Args:
        target: place to which attacked images that got through are moved: `Origin()`, the paper's choice, `Opposite()`
            or `Outside()`.
        weight: factor of the adversarial term, at least 0.
        floor: smallest number of images that the adversarial mean divides by, as a share of all attacked images in
            [0, 1]. With the paper's 0, a single successful attack weighs as much as all other images together.
        cross_entropy_weight: factor of a further term, at least 0, which is the cross-entropy of softmax(−½·energy /
            T), averaged over the images that belong to their classes. The likelihood pulls an image to its class
            however far the other classes are, whereas cross-entropy only compares the energies.
        temperature: temperature T of the cross-entropy, positive. It is not learned, because the user's optimizer does
            not hold it. At 1 the cross-entropy is that of the guard's posterior, which is almost 0 except close to the
            decision boundary.

    Raises:
        ConfigurationError: an option is out of its range.

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
        self, head: Head, representations: Tensor, batch: RelabelledBatch, thresholds: Tensor, counts: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its terms.

        Args:
            head: head of the guard, which computes distances and energies.
            representations: (B, m) representations of the batch's images.
            batch: relabelled batch.
            thresholds: (K,) present thresholds.
            counts: (2,) numbers of images as in `counts_of`; with several processes, their mean over all processes.

        Returns:
            The differentiable loss, a scalar, and its terms by name.
        """
        if self.floor:
            attacked = counts.sum() / 2
            counts = torch.stack([counts[0], counts[1].clamp_min(self.floor * attacked)])
        energy = self.target.energy(head, representations, batch.labels, batch.accepted_as, thresholds)
        by_class, adversarial = cluster_terms(
            head, representations, batch.labels, batch.adversarial_share, counts, energy
        )
        loss, terms = by_class + self.weight * adversarial, {"classes": by_class, "adversarial": adversarial}
        if self.cross_entropy_weight:
            terms["cross_entropy"] = class_cross_entropy(
                head, representations, batch.labels, batch.adversarial_share, counts, temperature=self.temperature
            )
            loss = loss + self.cross_entropy_weight * terms["cross_entropy"]
        return loss, terms


def negative_log_likelihood(
    head: Head,
    representations: Tensor,
    labels: Tensor,
    adversarial_share: Tensor,
    *,
    adversarial_weight: float = 1.0,
) -> Tensor:
    """Equation 31 as a negative log-likelihood, without its constant.

    The loss is ``adversarial_weight · mean over D_S of ½·adversarial energy + mean over the rest of ½·energy under the
    class``. With the paper's head, the energies are squared distances to the centres. D_S are the images that belong to
    the adversarial cluster. The mean over an empty set is 0.

    Args:
        head: head of the guard, which computes energies.
        representations: (B, m) representations of the images.
        labels: (B,) class of each image; it is not used for images in D_S.
        adversarial_share: (B,) whether each image belongs to D_S, or the share of it, in [0, 1], that does.
        adversarial_weight: factor of the mean over D_S.

    Returns:
        The loss, a scalar.

    Raises:
        InputError: a tensor has a wrong shape, dtype or device, or labels are out of range.

    Reference:
        arXiv 2012.03483, equation 31.

    Example:
        >>> from clusterguard.detectors import GaussianClusters
        >>> clusters = GaussianClusters(2, center_scale=2.0)
        >>> negative_log_likelihood(clusters, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([False]))
        tensor(2.)
        >>> negative_log_likelihood(clusters, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([True]))
        tensor(0.)
    """
    _check_shares(adversarial_share, len(representations), like=representations)
    by_class, adversarial = cluster_terms(
        head, representations, labels, adversarial_share, counts_of(adversarial_share)
    )
    return by_class + adversarial_weight * adversarial


def _check_shares(adversarial_share: Tensor, count: int, *, like: Tensor) -> None:
    is_share = isinstance(adversarial_share, Tensor) and adversarial_share.is_floating_point()
    check_tensor(
        adversarial_share, "adversarial_share", count, kind="floating-point" if is_share else "bool", like=like
    )


def counts_of(adversarial_share: Tensor) -> Tensor:
    """The numbers (2,) of images that belong to their classes and to the adversarial cluster, as sums of shares.

    Args:
        adversarial_share: (B,) bools, or shares in [0, 1].
    """
    separate = adversarial_share.float()
    return torch.stack([(1 - separate).sum(), separate.sum()])


def cluster_terms(
    head: Head,
    representations: Tensor,
    labels: Tensor,
    adversarial_share: Tensor,
    counts: Tensor,
    adversarial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two means of `negative_log_likelihood`: over images of their classes, and over adversarial ones.

    Args:
        head: head of the guard, which computes energies.
        representations: (B, m) representations of the images.
        labels: class labels (B,).
        adversarial_share: (B,) bools, or shares in [0, 1].
        counts: (2,) divisors of the two sums, raised to 1 if smaller; see `counts_of`.
        adversarial: (B,) energies of the second mean, see `Target.energy`; None takes the head's adversarial energy.

    Returns:
        The two means, each a scalar.
    """
    energies = head.energies(representations)
    check_tensor(labels, "labels", len(energies), kind="integer", like=representations)
    _check_shares(adversarial_share, len(energies), like=representations)
    if labels.device.type == "cpu":  # on another device the check would wait for its queue
        check_range(labels, head.num_classes)
    separate = adversarial_share.to(counts.dtype)
    by_class = energies.gather(1, labels[:, None].long()).squeeze(1)
    if adversarial is None:
        adversarial = head.adversarial_energy(representations)
    sums = [
        torch.where(share > 0, share * energy, 0).sum()
        for share, energy in ((1 - separate, by_class), (separate, adversarial))
    ]
    class_mean, adversarial_mean = 0.5 * torch.stack(sums) / counts.clamp_min(1)
    return class_mean, adversarial_mean


def class_cross_entropy(
    head: Head,
    representations: Tensor,
    labels: Tensor,
    adversarial_share: Tensor,
    counts: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """The mean cross-entropy of the head's logits over the images that belong to their classes.

    Args:
        head: head of the guard, which computes energies.
        representations: (B, m) representations of the images.
        labels: class labels (B,).
        adversarial_share: (B,) bools, or shares in [0, 1], that are left out of the mean.
        counts: (2,) numbers of images as in `counts_of`; the first, raised to 1 if smaller, divides the sum.
        temperature: divisor of the logits, positive.

    Returns:
        The mean, a scalar.
    """
    logits = head.logits(representations) / temperature
    losses = functional.cross_entropy(logits, labels.long(), reduction="none")
    share = 1 - adversarial_share.to(counts.dtype)
    return torch.where(share > 0, share * losses, 0).sum() / counts[0].clamp_min(1)
