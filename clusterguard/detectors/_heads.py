"""Heads, which compare representations with classes. The paper's head is a mixture of Gaussians with fixed centres."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from clusterguard._support import check_tensor
from clusterguard.detection import Arithmetic
from clusterguard.detectors._head_bounds import Bounds, RepresentationBox
from clusterguard.errors import ConfigurationError
from einops import rearrange, reduce, repeat
from torch import Tensor, nn


class Head(nn.Module, ABC):
    """Base class of heads. A head gives every class, and adversarial images, a region of the representation space.

    To use another head, write a subclass and pass it to `ClusterGuard(backbone, head=...)`. Training, calibration,
    attacks, saving and export all work with it. Its parameters are trained together with those of the backbone. Every
    tensor that a detection depends on must be in the state dict. Certificates also work if the class defines
    `bound_distances`.

    Args:
        num_classes: number K of classes, at least 2.
        representation_dim: width m of the representation, positive.

    Raises:
        ConfigurationError: there are too few classes or dimensions.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> class Medians(Head):  # the centre of class i has i on every coordinate; distances are l1
        ...     def distances(self, representations):
        ...         centers = torch.arange(self.num_classes)[:, None].expand(-1, self.representation_dim)
        ...         return torch.cdist(representations, centers.to(representations), p=1)
        ...     def energies(self, representations):
        ...         return 2 * self.distances(representations)
        ...     def adversarial_energy(self, representations):
        ...         return 2 * (representations + 1).abs().sum(dim=1)
        ...     @property
        ...     def packing_radius(self):
        ...         return torch.tensor(self.representation_dim / 2)
        >>> guard = ClusterGuard(nn.Flatten(), head=Medians(2, 3), example=torch.rand(1, 1, 2, 2))
        >>> guard.distances(torch.rand(5, 1, 2, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, num_classes: int, representation_dim: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigurationError(f"expected num_classes of at least 2, got {num_classes}")
        if representation_dim < 1:
            raise ConfigurationError(f"expected representation_dim of at least 1, got {representation_dim}")
        self.num_classes = num_classes
        self.representation_dim = representation_dim

    @abstractmethod
    def distances(self, representations: Tensor) -> Tensor:
        """The distance of representations to every class: (B, m) -> (B, K), at least 0, differentiable.

        Distances decide. An image gets the label of the class with the smallest distance. It is accepted if this
        distance is at most the threshold of the label. Energies serve the training and the logits.
        """

    @abstractmethod
    def energies(self, representations: Tensor) -> Tensor:
        """The energy under every class: (B, m) -> (B, K), −2 times the log-likelihood up to a constant."""

    @abstractmethod
    def adversarial_energy(self, representations: Tensor) -> Tensor:
        """The energy as an adversarial image: (B, m) -> (B,), −2 times the log-likelihood up to a constant."""

    @property
    @abstractmethod
    def packing_radius(self) -> Tensor:
        """Half the distance between two classes, () or (K,). Within this distance of a class, no other is closer."""

    def bound_distances(self, box: RepresentationBox, labels: Tensor) -> Bounds:
        """Bounds on the distances of all representations in a box, which certificates and their training ask for.

        If the box has an arithmetic, the bounds must hold for distances that are computed in it from any representation
        within `error` of the box. A lead above 0 then means that the computed distance of the class is larger than that
        of the label. Without an arithmetic, the bounds are on exact distances, and should be differentiable.

        A class that changes `distances` must define this method itself; certificates refuse a head that inherits it.

        Args:
            box: box of B representations.
            labels: (B,) class labels.

        Returns:
            Bounds; where they are not finite, nothing is proved.

        Raises:
            ConfigurationError: no bounds are known for this head.
        """
        raise ConfigurationError(
            f"no bounds are known for the head {type(self).__name__}; certificates need a head whose class defines "
            "bound_distances, as GaussianClusters does"
        )

    def logits(self, representations: Tensor) -> Tensor:
        """Half the energies with a minus sign, which are log-likelihoods up to a constant per row: (B, m) -> (B, K).

        Their softmax is the posterior. The largest logit is that of the label if energies grow with distances in the
        same way for all classes.
        """
        return -0.5 * self.energies(representations)

    def options(self) -> dict[str, Any]:
        """The options that rebuild this head, except for K, as values that JSON has. A saved guard keeps them."""
        return {"representation_dim": self.representation_dim}

    def describe(self) -> str:
        """The head in a few words, for model cards."""
        return f"{type(self).__name__} in {self.representation_dim} dimensions"


class GaussianClusters(Head):
    """A Gaussian with unit covariance per class in a representation space of m = K·l dimensions.

    The centre of class i is `center_scale` on the i-th block of l coordinates and 0 elsewhere. The centre of
    adversarial representations is the origin. Nothing is learned. Because the centres are so sparse, the distances to
    all K of them cost O(m) operations and O(K) memory per image, instead of O(K·m). Everything is computed at least in
    float32, under autocast too.

    Args:
        num_classes: number K of classes, at least 2.
        representation_dim: width m of the representation, a multiple of K; None means K (l = 1).
        center_scale: positive scale M of the centres, which are M·√(2l) apart and M·√l from the adversarial centre.

    Raises:
        ConfigurationError: m is no positive multiple of K, K < 2, or M is not positive and finite.

    Reference:
        arXiv 2012.03483, equations 11 to 16.

    Example:
        >>> clusters = GaussianClusters(num_classes=3, center_scale=10.0)
        >>> clusters.distances(torch.tensor([[10.0, 0.0, 0.0]])).round(decimals=2)
        tensor([[ 0.0000, 14.1400, 14.1400]])
    """

    center_scale: Tensor

    def __init__(self, num_classes: int, representation_dim: int | None = None, *, center_scale: float = 10.0) -> None:
        dim = num_classes if representation_dim is None else representation_dim
        super().__init__(num_classes, max(1, dim))
        if dim < num_classes or dim % num_classes:
            raise ConfigurationError(
                f"expected representation_dim to be a positive multiple of num_classes={num_classes}, got {dim}; "
                f"try {max(1, round(dim / num_classes)) * num_classes}"
            )
        if not (center_scale > 0 and math.isfinite(center_scale)):
            raise ConfigurationError(f"expected a positive, finite center_scale, got {center_scale}")
        self.register_buffer("center_scale", torch.tensor(float(center_scale)))

    def extra_repr(self) -> str:
        """The values of K, m and M, which are shown when the module is printed."""
        return f"num_classes={self.num_classes}, representation_dim={self.representation_dim}, M={self.center_scale:g}"

    @property
    def centers(self) -> Tensor:
        """The class centres u(i) of equation 13, (K, m)."""
        block = self.representation_dim // self.num_classes
        identity = torch.eye(self.num_classes, device=self.center_scale.device) * self.center_scale
        return repeat(identity, "k j -> k (j l)", l=block)

    def squared_distances(self, representations: Tensor) -> Tensor:
        """The squared Euclidean distance to every class centre: (B, m) -> (B, K).

        It is the squared distance in the block of the class, plus the squared norm of all other blocks. Near a centre
        this loses less precision than expanding the square.
        """
        blocks = self._blocks(representations)
        energy = reduce(blocks.square(), "b k l -> b k", "sum")
        within = reduce((blocks - self.center_scale).square(), "b k l -> b k", "sum")
        return (energy.sum(dim=1, keepdim=True) - energy).clamp_min(0) + within

    def distances(self, representations: Tensor) -> Tensor:
        """The Euclidean distance to every class centre: (B, m) -> (B, K). Its gradient is finite at the centre too."""
        squared = self.squared_distances(representations)
        return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()

    def energies(self, representations: Tensor) -> Tensor:
        """The squared distances: representations (B, m) -> (B, K)."""
        return self.squared_distances(representations)

    def adversarial_energy(self, representations: Tensor) -> Tensor:
        """The squared Euclidean distance to the adversarial centre, the origin: (B, m) -> (B,)."""
        return reduce(self._blocks(representations).square(), "b k l -> b", "sum")

    @property
    def packing_radius(self) -> Tensor:
        """Half the distance between two class centres, (). Within this distance of a centre, no other is closer."""
        return self.center_scale * math.sqrt(0.5 * self.representation_dim / self.num_classes)

    def logits(self, representations: Tensor) -> Tensor:
        """The log-likelihoods up to a constant per row, M times the sum of each block: (B, m) -> (B, K).

        Their softmax is the posterior of the mixture, so any tool that expects the logits of a classifier can use them.
        """
        return self.center_scale * reduce(self._blocks(representations), "b k l -> b k", "sum")

    def options(self) -> dict[str, Any]:
        """The width m and the scale M."""
        return {"representation_dim": self.representation_dim, "center_scale": float(self.center_scale)}

    def describe(self) -> str:
        """The width m and the scale M in words."""
        return f"representation of {self.representation_dim} dimensions, center scale {float(self.center_scale):g}"

    def bound_distances(self, box: RepresentationBox, labels: Tensor) -> Bounds:
        """Bounds on computed or exact distances; the leads take the network's last layer into account.

        Args:
            box: box of B representations.
            labels: (B,) class labels.
        """
        error = torch.zeros_like(box.lower) if box.error is None else box.error
        lower, upper = box.lower - error, box.upper + error
        centers = self.centers.to(lower)
        label_centers = centers[labels.long()]
        # One bound along the direction between two centres is tighter than the difference of two bounds.
        directions = label_centers[:, None] - centers
        along = box.lowest(directions) - box.slack(directions)
        # All centres are equally far from 0, so their squared distances to z differ by
        # 2⟨z, label's centre − other centre⟩.
        leads = 2 * along
        gaps = torch.maximum(lower[:, None] - centers, centers - upper[:, None]).clamp_min(0)
        to_box = reduce(gaps.square(), "b k m -> b k", "sum").clamp_min(torch.finfo(gaps.dtype).tiny).sqrt()
        lengths = directions.norm(dim=2).clamp_min(torch.finfo(gaps.dtype).tiny)
        to_half_space = (along - reduce(directions * centers, "b k m -> b k", "sum")) / lengths
        reach = torch.maximum((lower - label_centers).abs(), (upper - label_centers).abs())
        exact = Bounds(torch.maximum(to_box, to_half_space), leads, reach.norm(dim=1))
        if box.arithmetic is None:
            return exact
        size = torch.maximum(box.lower.abs(), box.upper.abs()) + error
        return self._with_rounding(exact, size, labels, box.arithmetic)

    def _with_rounding(self, exact: Bounds, size: Tensor, labels: Tensor, arithmetic: Arithmetic) -> Bounds:
        """Bounds on computed distances, from those on exact ones and the largest absolute representations (B, m)."""
        energy = reduce(size.square(), "b m -> b 1", "sum")
        # A squared distance is computed as that within the class's block, plus the energy of all blocks, less the
        # energy of this block. Before rounding, the sum of these terms is at most `squares`.
        blocks = rearrange(size + self.center_scale.to(size), "b (k l) -> b k l", k=self.num_classes)
        squares = 2 * energy + reduce(blocks.square(), "b k l -> b k", "sum")
        # A term is a sum over a block and over blocks. Differences, squares and roots of both sides round a few times
        # more, so a lead above 0 also holds after the square root.
        block = self.representation_dim // self.num_classes
        rounding = arithmetic.gamma(self.num_classes + block + 12) * squares + arithmetic.smallest
        rounding = torch.where(squares < arithmetic.largest, rounding, torch.inf)
        label_rounding = rounding.gather(1, labels[:, None].long())
        room = 16 * arithmetic.unit * (size.norm(dim=1, keepdim=True) + blocks.flatten(1).norm(dim=1, keepdim=True))
        nearest = ((exact.nearest - room).clamp_min(0).square() - rounding).clamp_min(0).sqrt()
        farthest = (exact.farthest.square() + label_rounding.squeeze(1)).sqrt()
        return Bounds(
            nearest * (1 - 4 * arithmetic.unit),
            exact.leads - rounding - label_rounding,
            farthest * (1 + 4 * arithmetic.unit),
        )

    def log_likelihood(self, representations: Tensor) -> Tensor:
        """The log-likelihood log N(z; u(i), I) of every class i: (B, m) -> (B, K)."""
        constant = 0.5 * self.representation_dim * math.log(2 * math.pi)
        return -0.5 * self.squared_distances(representations) - constant

    def posterior(self, representations: Tensor) -> Tensor:
        """The posterior p(class | z) for equal priors: (B, m) -> (B, K). Each row sums to 1."""
        return self.logits(representations).softmax(dim=1)

    def _blocks(self, representations: Tensor) -> Tensor:
        check_tensor(representations, "representations", "B", self.representation_dim)
        wide = representations.to(torch.promote_types(representations.dtype, torch.float32))
        return rearrange(wide, "b (k l) -> b k l", k=self.num_classes)
