"""Four norms on batches of images, each with its exact projection, steepest step and random start.

To add a norm, write a subclass of `Norm` in a new file and enter it in `NORMS`.
"""

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from clusterguard._support import look_up
from clusterguard.attacks._multipliers import l1_lengths, l2_lengths
from clusterguard.attacks._norm_base import (
    Norm,
    falls_to_the_end,
    just_inside,
    mask_largest,
    move_at_most,
    per_image,
    rescale,
    room_to_fall,
    spread,
)
from clusterguard.attacks._patch_norm import Patch
from torch import Generator, Tensor


@final
class LInf(Norm):
    """The l∞ norm, which is the largest absolute change of a coordinate."""

    name, symbol, order, limit = "linf", "ℓ∞", math.inf, 1.0

    def size(self, perturbations: Tensor) -> Tensor:
        """Largest absolute value: (B, C, H, W) -> (B,)."""
        return perturbations.flatten(1).abs().amax(dim=1)

    def distances(self, images: Tensor, others: Tensor) -> Tensor:
        """The largest absolute differences (B, R) of images (B, C, H, W) and others (R, C, H, W)."""
        return torch.cdist(images.flatten(1), others.flatten(1), p=math.inf)

    def slope(self, gradient: Tensor) -> Tensor:
        """The l1 norm of the gradient: (B, C, H, W) -> (B,)."""
        return gradient.flatten(1).abs().sum(dim=1)

    def largest(self, shape: Sequence[int]) -> float:
        """The size 1 of a change from 0 to 1, or back."""
        return 1.0

    def direction(self, gradient: Tensor, *, sparsity: int | Tensor | None = None) -> Tensor:
        """The signs of the gradient."""
        return gradient.sign()

    def projection(self, images: Tensor, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
        """A clamp between bounds that are computed only once, because attacks project at every step."""
        radii = per_image(eps, images)
        low, high = (move_at_most(images, reach).clamp(0, 1) for reach in (-radii, radii))
        return lambda candidates: candidates.clamp(low, high)

    def shrink(self, perturbations: Tensor, amount: float | Tensor) -> Tensor:
        """The perturbations less their projections onto an l1 ball with the amount as its radius."""
        lengths, radii = perturbations.flatten(1).abs(), per_image(amount, perturbations).flatten(1)
        nearest = l1_lengths(lengths, torch.zeros_like(lengths), radii)
        removed = torch.where(lengths.sum(dim=1, keepdim=True) > radii, nearest, lengths)
        return perturbations.sign() * (lengths - removed).clamp_min(0).view_as(perturbations)

    def largest_fall(self, slopes: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
        """The sum of all absolute slopes, each times `eps` or what is left of the box: exact."""
        return (
            (slopes.abs() * torch.minimum(room_to_fall(slopes, images), per_image(eps, images))).flatten(1).sum(dim=1)
        )

    def random_start(self, images: Tensor, eps: float | Tensor, generator: Generator | None = None) -> Tensor:
        """A point from the uniform distribution on ball ∩ box."""
        radii = per_image(eps, images)
        low, high = (images - radii).clamp_min(0), (images + radii).clamp_max(1)
        share = torch.empty_like(images).uniform_(generator=generator)
        return self.project(images, low + (high - low) * share, eps)

    def _shorten(self, reach: Tensor, beyond: Tensor, radii: Tensor) -> Tensor:
        return torch.minimum(reach, radii)


@final
class L2(Norm):
    """The l2 norm, which is the Euclidean length of the change.

    Example:
        >>> images = torch.tensor([[[[0.5, 0.9]]]])
        >>> L2().project(images, images + 4.0, eps=0.5)  # the box stops one, so the other goes further
        tensor([[[[0.9899, 1.0000]]]])
    """

    name, symbol, order = "l2", "ℓ2", 2

    def size(self, perturbations: Tensor) -> Tensor:
        """Root of the sum of squares: (B, C, H, W) -> (B,)."""
        return perturbations.flatten(1).square().sum(dim=1).sqrt()

    def distances(self, images: Tensor, others: Tensor) -> Tensor:
        """The Euclidean distances (B, R) of images (B, C, H, W) and others (R, C, H, W)."""
        return torch.cdist(images.flatten(1), others.flatten(1), p=2.0)

    def slope(self, gradient: Tensor) -> Tensor:
        """The Euclidean length of the gradient: (B, C, H, W) -> (B,)."""
        return self.size(gradient)

    def largest(self, shape: Sequence[int]) -> float:
        """The size √(C·H·W) of a change of all coordinates by 1."""
        return math.sqrt(math.prod(shape))

    def direction(self, gradient: Tensor, *, sparsity: int | Tensor | None = None) -> Tensor:
        """The gradient divided by its Euclidean length."""
        scaled = rescale(gradient)
        return scaled / scaled.square().sum(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1)

    def shrink(self, perturbations: Tensor, amount: float | Tensor) -> Tensor:
        """The perturbations, made shorter by the amount."""
        sizes = self.size(perturbations)[:, None, None, None]
        left = (sizes - per_image(amount, perturbations)).clamp_min(0)
        return perturbations * (left / torch.where(sizes > 0, sizes, 1))

    def largest_fall(self, slopes: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
        """The norm of those slopes along which there is room, times `eps`; at most the fall to the end of the box."""
        usable = torch.where(room_to_fall(slopes, images) > 0, slopes, 0)
        radii = per_image(eps, images).flatten()
        # `Norm.slope` rescales, so that squares of tiny slopes do not become 0.
        return torch.minimum(radii * super().slope(usable), falls_to_the_end(slopes, images).flatten(1).sum(dim=1))

    def random_start(self, images: Tensor, eps: float | Tensor, generator: Generator | None = None) -> Tensor:
        """A point from the uniform distribution on the ball, projected onto the box."""
        noise = torch.empty_like(images).normal_(generator=generator)
        return self.project(images, images + spread(self.direction(noise), eps, generator), eps)

    def _shorten(self, reach: Tensor, beyond: Tensor, radii: Tensor) -> Tensor:
        return l2_lengths(reach.flatten(1), beyond.flatten(1), just_inside(radii).flatten(1)).view_as(reach)


@final
class L1(Norm):
    """The l1 norm, which is the sum of the absolute changes.

    Reference:
        Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (2021).

    Example:
        >>> L1().direction(torch.tensor([[[[3.0, -4.0, 1.0]]]]), sparsity=2)
        tensor([[[[ 0.5000, -0.5000,  0.0000]]]])
    """

    name, symbol, order = "l1", "ℓ1", 1
    is_sparse = takes_sparsity = True

    def size(self, perturbations: Tensor) -> Tensor:
        """Sum of absolute values: (B, C, H, W) -> (B,)."""
        return perturbations.flatten(1).abs().sum(dim=1)

    def slope(self, gradient: Tensor) -> Tensor:
        """The largest absolute value of the gradient: (B, C, H, W) -> (B,)."""
        return gradient.flatten(1).abs().amax(dim=1)

    def largest(self, shape: Sequence[int]) -> float:
        """The size C·H·W of a change of all coordinates by 1."""
        return float(math.prod(shape))

    def direction(self, gradient: Tensor, *, sparsity: int | Tensor | None = None) -> Tensor:
        """The signs of the `sparsity` largest coordinates, divided by their number; with 1 it is the steepest step."""
        count = per_image(1 if sparsity is None else sparsity, gradient).flatten(1).clamp_min(1)
        signs = gradient.flatten(1).sign() * mask_largest(gradient.flatten(1).abs(), count)
        return (signs / signs.abs().sum(dim=1, keepdim=True).clamp_min(1)).reshape(gradient.shape)

    def shrink(self, perturbations: Tensor, amount: float | Tensor) -> Tensor:
        """The perturbations with each coordinate moved towards 0 by the amount."""
        return perturbations.sign() * (perturbations.abs() - per_image(amount, perturbations)).clamp_min(0)

    def largest_fall(self, slopes: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
        """The fall when `eps` is spent on the steepest values first, each to the end of the box: exact."""
        steepness, order = slopes.abs().flatten(1).sort(dim=1, descending=True)
        room = room_to_fall(slopes, images).flatten(1).gather(1, order)
        spent = room.cumsum(dim=1)
        return (steepness * torch.minimum(room, (per_image(eps, images).flatten(1) - (spent - room)).clamp_min(0))).sum(
            dim=1
        )

    def random_start(self, images: Tensor, eps: float | Tensor, generator: Generator | None = None) -> Tensor:
        """A point from the uniform distribution on the ball, projected onto the box."""
        first, second = (torch.empty_like(images).exponential_(generator=generator) for _ in range(2))
        laplace = dense_l1_direction(first - second)
        return self.project(images, images + spread(laplace, eps, generator), eps)

    def _shorten(self, reach: Tensor, beyond: Tensor, radii: Tensor) -> Tensor:
        return l1_lengths(reach.flatten(1), beyond.flatten(1), just_inside(radii).flatten(1)).view_as(reach)


@final
class L0(Norm):
    """The number of changed pixels; a pixel counts once, however many of its channels change."""

    name, symbol, order = "l0", "ℓ0", 0
    grain = 1.0
    is_sparse = True
    searched_over = "pixels"

    def longest_step(self, eps: float | Tensor, shape: Sequence[int]) -> float | Tensor:
        """The longest useful step, C·H·W.

        A step spreads over all pixels, so only a step this long can move each of them from 0 to 1.
        """
        return float(math.prod(shape))

    def size(self, perturbations: Tensor) -> Tensor:
        """The number of pixels with a channel other than 0: (B, C, H, W) -> (B,), in the input's dtype."""
        return (perturbations != 0).any(dim=1).flatten(1).sum(dim=1, dtype=perturbations.dtype)

    def slope(self, gradient: Tensor) -> Tensor:
        """The largest absolute value of the gradient, so the slope in one channel of a pixel: (B, C, H, W) -> (B,)."""
        return gradient.flatten(1).abs().amax(dim=1)

    def largest(self, shape: Sequence[int]) -> float:
        """The number H·W of all pixels."""
        return float(math.prod(shape[1:]))

    def direction(self, gradient: Tensor, *, sparsity: int | Tensor | None = None) -> Tensor:
        """The gradient divided by its l1 norm, as in PGD0 (Croce & Hein 2019), because l0 has no steepest step."""
        return dense_l1_direction(gradient)

    def largest_fall(self, slopes: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
        """The sum of the `eps` largest falls of one pixel, with all its channels: exact."""
        falls = falls_to_the_end(slopes, images).sum(dim=1).flatten(1)
        counts = per_image(eps, images).flatten(1)
        most = min(int(counts.max()), falls.shape[1]) if len(counts) else 0
        places = torch.arange(1, most + 1, device=falls.device)
        return torch.where(places <= counts, falls.topk(most, dim=1).values, 0).sum(dim=1)

    def random_start(self, images: Tensor, eps: float | Tensor, generator: Generator | None = None) -> Tensor:
        """The images with eps random pixels set to random corners of the colour cube, so to channels of 0 or 1."""
        colours = torch.empty_like(images).bernoulli_(generator=generator)
        lots = torch.empty_like(images[:, 0]).uniform_(generator=generator).flatten(1)
        chosen = mask_largest(lots, per_image(eps, images).flatten(1)).reshape(images[:, :1].shape)
        return torch.where(chosen, colours, images)

    def _shorten(self, reach: Tensor, beyond: Tensor, radii: Tensor) -> Tensor:
        # Moving a coordinate reduces its squared distance to the candidate from (r + e)² to e².
        gain = (reach * (reach + 2 * beyond)).sum(dim=1)
        return reach * mask_largest(gain.flatten(1), radii.flatten(1)).reshape(reach[:, :1].shape)


NORMS: dict[str, Norm] = {norm.name: norm for norm in (LInf(), L2(), L1(), L0(), Patch())}


def get_norm(name: str) -> Norm:
    """The norm with this name in `clusterguard.attacks.NORMS`.

    Raises:
        ConfigurationError: the name is unknown.
    """
    return look_up(name, NORMS, "a norm")


def dense_l1_direction(gradient: Tensor) -> Tensor:
    """The gradient divided by its l1 norm, which is the paper's l1 step; along `L1.direction` a function rises faster.

    Example:
        >>> dense_l1_direction(torch.tensor([[[[3.0, -1.0]]]]))
        tensor([[[[ 0.7500, -0.2500]]]])
    """
    scaled = rescale(gradient)
    return scaled / scaled.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)
