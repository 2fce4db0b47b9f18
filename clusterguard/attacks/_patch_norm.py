"""The size of a change as the side of the square that covers it, so that a ball is all patches of that side."""

import math
from collections.abc import Sequence
from typing import final

import torch
from clusterguard.attacks._norm_base import Norm, falls_to_the_end, per_image, rescale
from torch import Generator, Tensor
from torch.nn import functional


@final
class Patch(Norm):
    """The side of the smallest square that covers all changed pixels, so that eps bounds a patch anywhere in the image.

    Inside a patch, pixels may take any value. This is no norm in the mathematical sense, but attacks, the suite and
    `evaluate` need only what `Norm` defines.

    Reference:
        Karmon, Zoran & Goldberg, "LaVAN: localized and visible adversarial noise" (2018), for patches at any place.

    Example:
        >>> images, candidates = torch.zeros(1, 1, 1, 5), torch.tensor([[[[0.9, 0.0, 0.8, 0.0, 0.7]]]])
        >>> Patch().project(images, candidates, eps=3)
        tensor([[[[0.9000, 0.0000, 0.8000, 0.0000, 0.0000]]]])
    """

    name, symbol, order = "patch", "patch", math.nan
    grain = 1.0
    is_sparse = True
    searched_over = "patches"

    def size(self, perturbations: Tensor) -> Tensor:
        """The larger extent of the changed pixels, along rows or columns: (B, C, H, W) -> (B,)."""
        changed = (perturbations != 0).any(dim=1)
        extents = [_extent(changed.any(dim=axis)) for axis in (1, 2)]
        return torch.maximum(*extents).to(perturbations.dtype)

    def slope(self, gradient: Tensor) -> Tensor:
        """A bound on the slope in one channel: the largest absolute value times the side, (B, C, H, W) -> (B,)."""
        return max(gradient.shape[2:]) * gradient.flatten(1).abs().amax(dim=1)

    def largest(self, shape: Sequence[int]) -> float:
        """The longer side of the image."""
        return float(max(shape[1:]))

    def pixels_inside(self, eps: float, shape: Sequence[int]) -> int:
        """One pixel; two may lie far from each other."""
        return int(eps >= 1)

    def longest_step(self, eps: float | Tensor, shape: Sequence[int]) -> float | Tensor:
        """The longest useful step, C·H·W.

        A step spreads over all pixels, so only a step this long can move each of them from 0 to 1.
        """
        return float(math.prod(shape))

    def direction(self, gradient: Tensor, *, sparsity: int | Tensor | None = None) -> Tensor:
        """The gradient divided by its l1 norm, as for l0, because there is no steepest step."""
        scaled = rescale(gradient)
        return scaled / scaled.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)

    def largest_fall(self, slopes: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
        """The largest sum of falls of single pixels within one square: exact."""
        falls = falls_to_the_end(slopes, images).sum(dim=1, keepdim=True)
        return (falls * _best_window(falls, per_image(eps, images))).flatten(1).sum(dim=1)

    def random_start(self, images: Tensor, eps: float | Tensor, generator: Generator | None = None) -> Tensor:
        """The images with a patch at a random place, whose pixels have channels of 0 or 1."""
        colours = torch.empty_like(images).bernoulli_(generator=generator)
        lots = torch.empty_like(images[:, :1]).uniform_(generator=generator)
        place = torch.where(lots == lots.amax(dim=(1, 2, 3), keepdim=True), 1.0, 0.0).to(images)
        return torch.where(_best_window(place, per_image(eps, images)), colours, images)

    def _shorten(self, reach: Tensor, beyond: Tensor, radii: Tensor) -> Tensor:
        # Moving a coordinate reduces its squared distance to the candidate from (r + e)² to e².
        gain = (reach * (reach + 2 * beyond)).sum(dim=1, keepdim=True)
        return reach * _best_window(gain, radii)


def _extent(changed: Tensor) -> Tensor:
    """The distance from the first to the last true value of each row, both counted: (B, n) -> (B,)."""
    length = changed.shape[1]
    position = torch.arange(length, device=changed.device)
    last = torch.where(changed, position, -1).amax(dim=1)
    first = torch.where(changed, position, length).amin(dim=1)
    return (last - first + 1).clamp_min(0)


def _best_window(gain: Tensor, radii: Tensor) -> Tensor:
    """A mask (B, 1, H, W) of the square of side `radii` (B, 1, 1, 1) with the largest sum of gains (B, 1, H, W)."""
    _, _, height, width = gain.shape
    side = radii.clamp(0, max(height, width)).floor().long().flatten(1)
    rows, columns = (torch.arange(length, device=gain.device) for length in (height, width))
    sums = functional.pad(gain.squeeze(1).cumsum(dim=1).cumsum(dim=2), (1, 0, 1, 0))
    bottom, right = (rows + side).clamp_max(height), (columns + side).clamp_max(width)
    bands = sums.gather(1, bottom[:, :, None].expand(-1, -1, width + 1)) - sums[:, :-1]
    windows = bands.gather(2, right[:, None].expand(-1, height, -1)) - bands[:, :, :-1]
    best = windows.flatten(1).argmax(dim=1, keepdim=True) if len(gain) else side
    row, column = best // width, best % width
    inside = ((rows >= row) & (rows < row + side))[:, :, None] & ((columns >= column) & (columns < column + side))[
        :, None
    ]
    return inside[:, None]
