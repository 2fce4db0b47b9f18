"""What a norm is, and what all norms share.

Shapes use B images, C channels and H x W pixels. All functions are batched, keep the input's device and dtype (float32
or float64), and do not wait for the device. They are not meant to be differentiated.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from clusterguard._support import check_tensor
from clusterguard.errors import ConfigurationError, InputError
from einops import rearrange
from torch import Generator, Tensor


class Norm(ABC):
    """A norm of perturbations, whose balls around images are cut by the box [0, 1].

    Everything that attacks do differently for different norms is an attribute or a method of the norm.

    Attributes:
        name: name that attacks use.
        symbol: name in tables for people.
        order: p of the lp norm. The p-th powers of the sizes of changes of disjoint pixels add up; with an infinite
            order, the largest of these sizes counts. NaN if neither holds.
        limit: largest size of a change of an image in [0, 1], however large the image is; infinite if it grows.
        grain: smallest difference between two radii; 0 where radii are continuous.
        is_sparse: whether good perturbations change few coordinates, each as far as it may go.
        takes_sparsity: whether `direction` changes as many coordinates as it is told to.
        searched_over: what the random search that fits this norm changes, "squares", "pixels" or "patches".

    Example:
        >>> from clusterguard.attacks import get_norm
        >>> images, candidates = torch.full((1, 1, 1, 2), 0.9), torch.tensor([[[[0.2, 1.2]]]])
        >>> get_norm("linf").project(images, candidates, eps=0.5)
        tensor([[[[0.4000, 1.0000]]]])
    """

    name: ClassVar[str]
    symbol: ClassVar[str]
    order: ClassVar[float]
    limit: ClassVar[float] = math.inf
    grain: ClassVar[float] = 0.0
    is_sparse: ClassVar[bool] = False
    takes_sparsity: ClassVar[bool] = False
    searched_over: ClassVar[Literal["squares", "pixels", "patches"]] = "squares"

    def round_radius(self, eps: float) -> float:
        """A radius that the norm can have, `eps` or a little less: at least one grain."""
        return max(self.grain, eps // self.grain * self.grain) if self.grain else eps

    def longest_step(self, eps: float | Tensor, shape: Sequence[int]) -> float | Tensor:
        """The length beyond which a step gains nothing.

        Args:
            eps: radius, one number or (B,).
            shape: (C, H, W) of the images.
        """
        return eps

    def step_size(self, eps: float, shape: Sequence[int], *, share: float) -> float | Tensor:
        """A length for steps of equal length.

        Args:
            eps: radius.
            shape: (C, H, W) of the images.
            share: fraction of the radius; sparse norms take the longest step instead.
        """
        return self.longest_step(eps, shape) if self.is_sparse else share * eps

    @abstractmethod
    def size(self, perturbations: Tensor) -> Tensor:
        """The norm of each perturbation: (B, C, H, W) -> (B,)."""

    def distances(self, images: Tensor, others: Tensor) -> Tensor:
        """The size of the change from each image to each of the others.

        Args:
            images: (B, C, H, W).
            others: (R, C, H, W).

        Returns:
            Sizes (B, R).
        """
        distances = images.new_empty(len(images), len(others))
        for index, other in enumerate(others):
            distances[:, index] = self.size(images - other)
        return distances

    def slope(self, gradient: Tensor) -> Tensor:
        """How fast a function of this gradient can rise along a step of length 1: (B, C, H, W) -> (B,)."""
        return (gradient * self.direction(gradient)).flatten(1).sum(dim=1)

    @abstractmethod
    def largest(self, shape: Sequence[int]) -> float:
        """The largest size that a change of an image in [0, 1] can have.

        Args:
            shape: (C, H, W) of the image.
        """

    def pixels_inside(self, eps: float, shape: Sequence[int]) -> int:
        """The largest number of pixels that may change in any way, in all channels, without leaving the ball.

        Args:
            eps: radius.
            shape: (C, H, W) of the images.

        Example:
            >>> from clusterguard.attacks import get_norm
            >>> get_norm("l2").pixels_inside(2.0, (3, 32, 32)), get_norm("linf").pixels_inside(0.3, (3, 32, 32))
            (1, 0)
        """
        channels, height, width = shape
        counts = range(1, height * width + 1)
        return bisect_right(counts, eps, key=lambda count: self.largest((channels, 1, count)))

    @abstractmethod
    def direction(self, gradient: Tensor, *, sparsity: int | Tensor | None = None) -> Tensor:
        """The step along which a function of this gradient rises fastest: (B, C, H, W) -> (B, C, H, W).

        Args:
            gradient: (B, C, H, W) of any scale. The step has length 1, or 0 for a gradient of exactly 0.
            sparsity: number of coordinates that an l1 step changes, at least 1, one number or (B,); None means 1.
                The other norms ignore it.
        """

    def largest_fall(self, slopes: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
        """How far a linear function of the image can fall within the ball, which certificates ask for.

        Args:
            slopes: (B, C, H, W) slopes of the functions, of any values.
            images: (B, C, H, W) in [0, 1].
            eps: radius, at least 0, one number or (B,).

        Returns:
            (B,) an upper bound on the sum of slope times (image - other), over all others in ball ∩ box.

        Raises:
            ConfigurationError: the norm does not define this method.
        """
        raise ConfigurationError(f"no certificates are known in the norm {self.name!r}, which defines no largest_fall")

    def shrink(self, perturbations: Tensor, amount: float | Tensor) -> Tensor:
        """The perturbations z that minimise ``‖z − perturbation‖² / 2 + amount · size(z)``, each the proximal point.

        Args:
            perturbations: (B, C, H, W) of any values.
            amount: price of one unit of size, at least 0, one number or (B,).

        Returns:
            Perturbations (B, C, H, W), which are 0 where the amount is large.

        Raises:
            ConfigurationError: the norm does not define this method.
        """
        raise ConfigurationError(f"expected a norm that defines shrink, got {self.name!r}")

    @abstractmethod
    def random_start(self, images: Tensor, eps: float | Tensor, generator: Generator | None = None) -> Tensor:
        """A random point of ball ∩ box around each image: (B, C, H, W) -> (B, C, H, W).

        Args:
            images: (B, C, H, W) in [0, 1].
            eps: radius, at least 0, one number or (B,).
            generator: randomness, on the images' device; None takes torch's global one.
        """

    def projection(self, images: Tensor, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
        """The function `project` for fixed images (B, C, H, W) and `eps`, whose bounds are computed only once."""
        return lambda candidates: self.project(images, candidates, eps)

    @torch.no_grad()
    def project(self, images: Tensor, candidates: Tensor, eps: float | Tensor) -> Tensor:
        """The point of ball ∩ box nearest to each candidate in Euclidean distance: (B, C, H, W) in [0, 1].

        A candidate inside comes back unchanged. A point that would be rounded out of the ball is rounded towards the
        image, so `size` of the result minus the image is at most eps.

        Args:
            images: (B, C, H, W) in [0, 1].
            candidates: (B, C, H, W), any values.
            eps: radius, at least 0, one number or (B,); for l0 the number of pixels.

        Raises:
            InputError: images and candidates have different shapes, or eps is a tensor that is not (B,).
            ConfigurationError: eps is a number below 0.
        """
        check_tensor(images, "images", "B", "C", "H", "W", kind="float32 or float64")
        check_tensor(candidates, "candidates", *images.shape, like=images)
        radii = per_image(eps, images)
        boxed = candidates.clamp(0, 1)
        change = boxed - images
        reach = change.abs()
        beyond = (candidates - boxed).abs_().clamp_max_(1e15)  # keeps sums of squares finite in float32
        inside = rearrange(self.size(reach), "b -> b 1 1 1") <= radii
        lengths = torch.where(inside, reach, self._shorten(reach, beyond, radii))
        size = rearrange(self.size(lengths), "b -> b 1 1 1")
        lengths *= torch.where(size > radii, just_inside(radii) / size, 1)
        moved = images + change.sign_().mul_(lengths)
        moved = torch.where((moved - images).abs_() > lengths, torch.nextafter(moved, images), moved)
        return torch.where(lengths >= reach, boxed, moved).clamp_(0, 1)

    @abstractmethod
    def _shorten(self, reach: Tensor, beyond: Tensor, radii: Tensor) -> Tensor:
        """The distance (B, C, H, W) by which each coordinate moves towards a candidate outside the ball.

        The candidate's distance in a coordinate is `reach`, the part inside the box, plus `beyond`, the part outside.
        """


def rescale(gradient: Tensor) -> Tensor:
    """The gradient divided by its largest absolute value, so that its norms are at least 1 and nothing underflows."""
    peak = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    return gradient / torch.where(peak > 0, peak, 1)


def spread(directions: Tensor, eps: float | Tensor, generator: Generator | None) -> Tensor:
    """Directions on the unit sphere, spread over the ball; its volume grows with the C·H·W-th power of length."""
    share = torch.empty_like(directions[:, :1, :1, :1]).uniform_(generator=generator)
    return directions * share.pow(1 / directions.shape[1:].numel()) * per_image(eps, directions)


def move_at_most(images: Tensor, reach: Tensor) -> Tensor:
    """Images moved by `reach`, and rounded towards the image where rounding would move them further."""
    moved = images + reach
    return torch.where((moved - images).abs() > reach.abs(), torch.nextafter(moved, images), moved)


def falls_to_the_end(slopes: Tensor, images: Tensor) -> Tensor:
    """How far a linear function falls if each value of images in [0, 1] alone moves to the end of the box."""
    return torch.maximum(slopes * images, slopes * (images - 1))


def room_to_fall(slopes: Tensor, images: Tensor) -> Tensor:
    """How far each value of images in [0, 1] can move in the direction in which a linear function falls."""
    return torch.where(slopes > 0, images, torch.where(slopes < 0, 1 - images, 0))


def mask_largest(scores: Tensor, count: Tensor) -> Tensor:
    """A mask (B, n) of the `count` (B, 1) largest scores (B, n) of each row, with the first ones on ties."""
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    whole = count.clamp(0, scores.shape[1]).long()
    # A CPU sorts only as far as it must. On an accelerator the largest count is not waited for.
    most = max(1, int(whole.max())) if scores.device.type == "cpu" else scores.shape[1]
    last = scores.topk(most, dim=1).values.gather(1, (whole - 1).clamp_min(0))
    is_above, is_tied = scores > last, scores == last
    left = whole - is_above.sum(dim=1, keepdim=True)
    return (is_above | (is_tied & (is_tied.cumsum(dim=1) <= left))) & (whole > 0)


def just_inside(radii: Tensor) -> Tensor:
    """Radii reduced by a few units in the last place, as room for the rounding of sums over all coordinates."""
    return radii * (1 - 8 * torch.finfo(radii.dtype).eps)


def per_image(value: float | Tensor, images: Tensor) -> Tensor:
    """One number, or one for each image (B,), as (B, 1, 1, 1) in the images' dtype and on their device."""
    if isinstance(value, Tensor):
        if value.shape != images.shape[:1]:
            raise InputError(f"expected a number or shape ({len(images)},), got shape {tuple(value.shape)}")
        if value.device.type == "cpu" and (value < 0).any():  # elsewhere the check would wait for it
            raise InputError(f"expected numbers of at least 0, got {value.tolist()}")
        radii = value.to(images)  # with a radius of NaN the image must not move
        return rearrange(radii.masked_fill(radii.isnan(), 0), "b -> b 1 1 1")
    if not value >= 0:
        raise ConfigurationError(f"expected a number of at least 0, got {value}")
    largest = torch.finfo(images.dtype).max
    return images.new_full((len(images), 1, 1, 1), value if value <= largest else torch.inf)
