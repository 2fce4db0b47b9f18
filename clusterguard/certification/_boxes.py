"""Boxes: lower and upper bounds of a network's numbers, with what its arithmetic may be off."""

from dataclasses import dataclass

import torch
from clusterguard.detection import Arithmetic
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Box:
    """All tensors between two others, elementwise, and how far computed numbers may lie off them; it never changes.

    Args:
        lower: smallest values, (B, …).
        upper: largest values, (B, …).
        error: how far a computed number may lie off all of them, (B, …); None without an arithmetic.
        arithmetic: what the network computes in, while bounds are float64; None takes its numbers to be exact.
        error_above: the same for all numbers above 0, exact or computed ones; None where it is no smaller.
        source: the linear layer that it comes out of.
    """

    lower: Tensor
    upper: Tensor
    error: Tensor | None = None
    arithmetic: Arithmetic | None = None
    source: "Linear | None" = None
    error_above: Tensor | None = None

    @property
    def center(self) -> Tensor:
        """The middle."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half the width."""
        return (self.upper - self.lower) / 2

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute values, of computed numbers too."""
        exact = torch.maximum(self.lower.abs(), self.upper.abs())
        return exact if self.error is None else exact + self.error

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.arithmetic.dtype if self.arithmetic else self.lower.dtype

    @property
    def device(self) -> torch.device:
        """Where the bounds are."""
        return self.lower.device

    def lowest(self, directions: Tensor) -> Tensor:
        """The smallest exact value of ⟨direction, z⟩ over z (B, m), for directions (B, S, m): (B, S)."""
        if self.source is None:
            along = torch.einsum("bsm,bm->bs", directions, self.center)
            return along - torch.einsum("bsm,bm->bs", directions.abs(), self.radius)
        lowest = self.source.inside.lowest(directions @ self.source.weight)
        return lowest if self.source.bias is None else lowest + directions @ self.source.bias

    def slack(self, directions: Tensor) -> Tensor:
        """How far ⟨direction, z⟩ of a computed z (B, m) may lie below the lowest exact value: (B, S)."""
        if self.error is None:
            return torch.zeros_like(directions[..., 0])
        if self.source is None or self.source.rounding is None:
            return torch.einsum("bsm,bm->bs", directions.abs(), self.error)
        inside = self.source.inside.slack(directions @ self.source.weight)
        return inside + torch.einsum("bsm,bm->bs", directions.abs(), self.source.rounding)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer, with what it was applied to: differences of its outputs have tighter bounds than its outputs.

    Args:
        inside: what it was applied to.
        weight: (m, D).
        bias: (m,), or None.
        rounding: how far the layer's own arithmetic may be off, (B, m); None without an arithmetic.
    """

    inside: Box
    weight: Tensor
    bias: Tensor | None
    rounding: Tensor | None


def hull(one: Box, other: Box) -> Box:
    """The smallest box that holds both."""
    lower, upper = torch.minimum(one.lower, other.lower), torch.maximum(one.upper, other.upper)
    error = None if one.error is None or other.error is None else torch.maximum(one.error, other.error)
    return Box(lower, upper, error, one.arithmetic)


def move(box: Box, start: Tensor, end: Tensor) -> Box:
    """The numbers of a box, which lie at positions `start` of a memory, in the order and shape of positions `end`."""
    order = start.flatten().argsort()
    lower, upper, error = (
        part if part is None else part.flatten()[order][end] for part in (box.lower, box.upper, box.error)
    )
    return Box(lower, upper, error, box.arithmetic)  # type: ignore[arg-type]
