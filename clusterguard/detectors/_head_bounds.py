"""Bounds of a head on the distances of all representations in a box, which certificates use."""

from typing import NamedTuple, Protocol

from clusterguard.detection import Arithmetic
from torch import Tensor
from torch.nn.functional import one_hot


class RepresentationBox(Protocol):
    """A box of representations, as certificates pass it to a head; `clusterguard.certification.Interval` is one."""

    @property
    def lower(self) -> Tensor:
        """Smallest exact values (B, m)."""
        ...

    @property
    def upper(self) -> Tensor:
        """Largest exact values (B, m)."""
        ...

    @property
    def error(self) -> Tensor | None:
        """Largest distance (B, m) from a computed representation to the box; None for exact numbers."""
        ...

    @property
    def arithmetic(self) -> Arithmetic | None:
        """Arithmetic in which the guard computes, while bounds are in float64; None for exact numbers."""
        ...

    def lowest(self, directions: Tensor) -> Tensor:
        """The smallest exact ⟨direction, z⟩ over z in the box, for directions (B, S, m): (B, S).

        It is often larger than what `lower` and `upper` tell, because the network's last layer is taken into account.
        """
        ...

    def lowest_above(self, places: Tensor) -> Tensor:
        """The smallest computed z_i − z_p of every coordinate i, for the coordinate p in `places` (B,): (B, m)."""
        ...

    def slack(self, directions: Tensor) -> Tensor:
        """How far rounding may take ⟨direction, z⟩ below `lowest`, for directions (B, S, m): (B, S)."""
        ...


class Bounds(NamedTuple):
    """Bounds on a guard's distances for all images within a radius of an image.

    Attributes:
        nearest: (B, K) lower bound of the distance to each class.
        leads: (B, K) lower bound of the squared distance to each class minus that to the label's class; 0 for the
            label.
        farthest: (B,) upper bound of the distance to the label's class.
    """

    nearest: Tensor
    leads: Tensor
    farthest: Tensor

    @classmethod
    def between(cls, nearest: Tensor, farthest: Tensor, labels: Tensor) -> "Bounds":
        """Bounds that follow from separate bounds on each distance.

        Args:
            nearest: (B, K) lower bounds of the distances, at least 0.
            farthest: (B, K) upper bounds of the distances.
            labels: (B,) class labels.

        Returns:
            Bounds whose leads are differences of squared distances.

        Example:
            >>> import torch
            >>> Bounds.between(torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 5.0]]), torch.tensor([0])).leads
            tensor([[ 0., 12.]])
        """
        label_farthest = farthest.gather(1, labels[:, None].long())
        leads = nearest.square() - label_farthest.square()
        is_label = one_hot(labels.long(), nearest.shape[1]).bool()
        return cls(nearest, leads.masked_fill(is_label, 0), label_farthest.squeeze(1))
