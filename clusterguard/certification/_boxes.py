"""Boxes: lower and upper bounds of a network's numbers, with a bound on its rounding errors."""

from dataclasses import dataclass

import torch
from clusterguard.detection import Arithmetic
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Box:
    """All tensors between a lower and an upper one, elementwise, with a bound on rounding errors; immutable.

    Args:
        lower: smallest values, (B, …).
        upper: largest values, (B, …).
        error: largest distance from a computed number to the numbers in the box, (B, …); None without an arithmetic.
        arithmetic: arithmetic in which the network computes, while the bounds are float64; None means exact numbers.
        source: linear layer that produced the box, or None.
        error_above: tighter rounding error for values that are known to end above 0; None uses `error`.
    """

    lower: Tensor
    upper: Tensor
    error: Tensor | None = None
    arithmetic: Arithmetic | None = None
    source: "Linear | None" = None
    error_above: Tensor | None = None

    @property
    def center(self) -> Tensor:
        """The midpoint of lower and upper bound."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half the distance between lower and upper bound."""
        return (self.upper - self.lower) / 2

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute values, rounding errors included."""
        exact = torch.maximum(self.lower.abs(), self.upper.abs())
        return exact if self.error is None else exact + self.error

    @property
    def dtype(self) -> torch.dtype:
        """The data type in which the network computes."""
        return self.arithmetic.dtype if self.arithmetic else self.lower.dtype

    @property
    def device(self) -> torch.device:
        """The device of the bounds."""
        return self.lower.device

    def lowest(self, directions: Tensor) -> Tensor:
        """The smallest exact value of ⟨direction, z⟩ over z (B, m), for directions (B, S, m): (B, S)."""
        if self.source is None:
            along = torch.einsum("bsm,bm->bs", directions, self.center)
            return along - torch.einsum("bsm,bm->bs", directions.abs(), self.radius)
        lowest = self.source.inside.lowest(directions @ self.source.weight)
        return lowest if self.source.bias is None else lowest + directions @ self.source.bias

    def lowest_above(self, places: Tensor) -> Tensor:
        """The smallest computed value of z_i − z_p over z (B, m), for all i and a place p for each z (B,): (B, m)."""
        rows, column = torch.arange(len(places), device=places.device), places[:, None]
        if self.source is None:
            lowest = self.lower - self.upper.gather(1, column)
        else:
            lowest = self.source.inside.lowest(self.source.weight - self.source.weight[places][:, None])
            if self.source.bias is not None:
                lowest = lowest + self.source.bias - self.source.bias[places][:, None]
        if self.error is not None:
            lowest = lowest - self.error - self.error.gather(1, column)
        return lowest.index_put((rows, places), lowest.new_zeros(()))

    def slack(self, directions: Tensor) -> Tensor:
        """How far rounding may take ⟨direction, z⟩ below `lowest` for a computed z (B, m): (B, S)."""
        if self.error is None:
            return torch.zeros_like(directions[..., 0])
        if self.source is None or self.source.rounding is None:
            return torch.einsum("bsm,bm->bs", directions.abs(), self.error)
        inside = self.source.inside.slack(directions @ self.source.weight)
        return inside + torch.einsum("bsm,bm->bs", directions.abs(), self.source.rounding)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer with the box of its inputs.

    It is kept because a difference of two outputs has a tighter bound than the two outputs taken separately.

    Args:
        inside: box of the layer's inputs.
        weight: (m, D).
        bias: (m,), or None.
        rounding: largest error from the layer's own rounding, (B, m); None without an arithmetic.
    """

    inside: Box
    weight: Tensor
    bias: Tensor | None
    rounding: Tensor | None


def hull(one: Box, other: Box) -> Box:
    """The smallest box that contains both boxes."""
    lower, upper = torch.minimum(one.lower, other.lower), torch.maximum(one.upper, other.upper)
    error = None if one.error is None or other.error is None else torch.maximum(one.error, other.error)
    return Box(lower, upper, error, one.arithmetic)


def move(box: Box, start: Tensor, end: Tensor) -> Box:
    """The numbers of a box, rearranged from one view of a memory into another.

    `start` holds the memory position of each number of the box. `end` holds the positions to read, in the order and
    shape of the result.
    """
    order = start.flatten().argsort()
    lower, upper, error = (
        part if part is None else part.flatten()[order][end] for part in (box.lower, box.upper, box.error)
    )
    return Box(lower, upper, error, box.arithmetic)  # type: ignore[arg-type]
