"""Random numbers that stay the same for an image when others leave the batch."""

import torch
from torch import Generator, Tensor


class Draws:
    """Random numbers for the images that are still in a batch, drawn for the whole batch.

    So the numbers of an image do not depend on which other images have left.
    """

    def __init__(self, images: Tensor, generator: Generator | None) -> None:
        self.rows = torch.arange(len(images), device=images.device)
        self._like = images
        self._generator = generator

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers (B, *shape) in [0, 1)."""
        return self._like.new_empty(len(self._like), *shape).uniform_(generator=self._generator)[self.rows]

    def signs(self, *shape: int) -> Tensor:
        """Random signs (B, *shape), -1 or 1."""
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0).to(self._like)

    def square(self, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """A mask (B, 1, H, W) of a random square, and the positions of rows and columns within it.

        Positions of rows (B, 1, H, 1) and columns (B, 1, 1, W) outside the square are clamped to its border.
        """

        def along(length: int) -> Tensor:
            shape, device = (len(self._like), 1, 1, 1), self._like.device
            first = torch.randint(length - side + 1, shape, generator=self._generator, device=device)
            return torch.arange(length, device=device) - first[self.rows]

        row, column = along(self._like.shape[2]).mT, along(self._like.shape[3])
        inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
        return inside, row.clamp(0, side - 1), column.clamp(0, side - 1)

    def choose(self, among: Tensor, count: int) -> Tensor:
        """A mask of `count` random pixels of those in the mask `among` (B, 1, H, W)."""
        lots = torch.where(among, self.uniform(*among.shape[1:]), -1).flatten(1)
        chosen = torch.zeros_like(lots, dtype=torch.bool).scatter(1, lots.topk(count, dim=1).indices, True)
        return chosen.reshape(among.shape)
