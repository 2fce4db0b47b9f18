"""What training minimises: the negative log-likelihood of equation 31, and terms that go beyond the paper."""

from typing import Literal

import torch
from clusterguard._support import check_range, check_tensor
from clusterguard.detectors import GaussianClusters
from torch import Tensor
from torch.nn import functional

AdversarialTarget = Literal["origin", "opposite", "outside"]


def cluster_loss(
    clusters: GaussianClusters,
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
        clusters: the mixture.
        representations: (B, m).
        labels: (B,) the class each belongs to, where it belongs to one.
        is_separate: (B,) True for D_S, the images that belong to the adversarial cluster; or the share of each, in
            [0, 1], that does.
        adversarial_weight: of the first mean.

    Returns:
        A scalar.

    Raises:
        InputError: tensors of a wrong shape, dtype or device, or labels out of range.

    Reference:
        arXiv 2012.03483, equation 31.

    Example:
        >>> clusters = GaussianClusters(2, center_scale=2.0)
        >>> cluster_loss(clusters, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([False]))
        tensor(2.)
        >>> cluster_loss(clusters, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([True]))
        tensor(0.)
    """
    _check_shares(is_separate, len(representations), like=representations)
    own, adversarial = cluster_terms(clusters, representations, labels, is_separate, counts_of(is_separate))
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
    clusters: GaussianClusters,
    representations: Tensor,
    labels: Tensor,
    is_separate: Tensor,
    counts: Tensor,
    adversarial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two means of `cluster_loss`: over images of their classes, and over those of the adversarial cluster.

    Args:
        clusters: the mixture.
        representations: (B, m).
        labels: (B,).
        is_separate: (B,) bools, or shares in [0, 1].
        counts: (2,) what the two sums are divided by, unless it is less than 1; see `counts_of`.
        adversarial: (B,) twice what the second mean is of, see `adversarial_energy`; None takes the squared distance
            to the origin.

    Returns:
        Two scalars.
    """
    squared = clusters.squared_distances(representations)
    check_tensor(labels, "labels", len(squared), kind="integer", like=representations)
    _check_shares(is_separate, len(squared), like=representations)
    if labels.device.type == "cpu":  # elsewhere looking waits for the device
        check_range(labels, clusters.num_classes)
    separate = is_separate.to(counts.dtype)
    own = squared.gather(1, labels[:, None].long()).squeeze(1)
    if adversarial is None:
        adversarial = clusters.adversarial_squared_distance(representations)
    sums = [
        torch.where(share > 0, share * squared, 0).sum()
        for share, squared in ((1 - separate, own), (separate, adversarial))
    ]
    own_mean, adversarial_mean = 0.5 * torch.stack(sums) / counts.clamp_min(1)
    return own_mean, adversarial_mean


def adversarial_energy(
    clusters: GaussianClusters,
    representations: Tensor,
    labels: Tensor,
    found: Tensor,
    thresholds: Tensor,
    *,
    target: AdversarialTarget = "origin",
    margin: float = 0.1,
) -> Tensor:
    """How far attacked images are from where training sends them, squared: 0 where they have arrived.

    Args:
        clusters: the mixture.
        representations: (B, m).
        labels: (B,) their original classes y.
        found: (B,) the labels ŷ under which they got through.
        thresholds: (K,) τ; where it is not finite, "outside" takes half the distance between centres.
        target: "origin", the paper's adversarial centre: ‖z‖². "opposite", a centre for every class, across the
            origin from its own: ‖z + u(y)‖². "outside", no centre, just out of the region that is accepted as ŷ:
            max(0, (1 + margin) τ_ŷ − ‖z − u(ŷ)‖)².
        margin: at least 0, for "outside".

    Returns:
        (B,).

    Example:
        >>> clusters, label = GaussianClusters(2, center_scale=2.0), torch.tensor([0])
        >>> z, found, thresholds = torch.tensor([[0.0, 1.0]]), torch.tensor([1]), torch.tensor([2.0, 2.0])
        >>> [adversarial_energy(clusters, z, label, found, thresholds, target=target, margin=0.5).item()
        ...  for target in ("origin", "opposite", "outside")]
        [1.0, 5.0, 4.0]
    """
    if target == "origin":
        return clusters.adversarial_squared_distance(representations)
    if target == "opposite":  # ‖z + u‖ = ‖−z − u‖
        return clusters.squared_distances(-representations).gather(1, labels[:, None].long()).squeeze(1)
    reach = (1 + margin) * torch.where(thresholds.isfinite(), thresholds, clusters.half_way)
    distance = clusters.distances(representations).gather(1, found[:, None].long()).squeeze(1)
    return (reach[found.long()] - distance).clamp_min(0).square()


def class_cross_entropy(
    clusters: GaussianClusters,
    representations: Tensor,
    labels: Tensor,
    is_separate: Tensor,
    counts: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Mean cross-entropy of softmax(−½d² / temperature) over the images that belong to their classes.

    Args:
        clusters: the mixture.
        representations: (B, m).
        labels: (B,).
        is_separate: (B,) bools, or shares in [0, 1] that do not count.
        counts: (2,) the first is what the sum is divided by, unless it is less than 1; see `counts_of`.
        temperature: positive.

    Returns:
        A scalar.
    """
    logits = clusters.logits(representations) / temperature  # −½d² up to a constant per row
    losses = functional.cross_entropy(logits, labels.long(), reduction="none")
    share = 1 - is_separate.to(counts.dtype)
    return torch.where(share > 0, share * losses, 0).sum() / counts[0].clamp_min(1)
