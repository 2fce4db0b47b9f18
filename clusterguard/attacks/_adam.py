"""The optimizer Adam for batches of images, whose rows can leave the batch."""

from torch import Tensor, zeros_like

_MEAN_DECAY, _SQUARE_DECAY, _SMALLEST = 0.9, 0.999, 1e-8


class Adam:
    """Adam with its usual decay factors; each image has its own state, so images do not affect each other.

    Args:
        like: (B, C, H, W) tensor with the shape, dtype and device of the gradients.
        per_image: whether the coordinates of an image share one scale; by default each has its own.

    Attributes:
        scale: root of the mean squares of the gradients so far, by which the last direction was divided; (B, C, H, W),
            or (B, 1, 1, 1) if it is shared.

    Reference:
        Kingma & Ba, "Adam: a method for stochastic optimization" (2015).

    Example:
        >>> import torch
        >>> Adam(torch.zeros(1, 1, 1, 2)).direction(torch.tensor([[[[3.0, -0.5]]]]))
        tensor([[[[ 1., -1.]]]])
    """

    def __init__(self, like: Tensor, *, per_image: bool = False) -> None:
        self._mean, self._per_image, self._steps = zeros_like(like), per_image, 0
        self.scale = self._square = zeros_like(like[:, :1, :1, :1] if per_image else like)

    def direction(self, gradient: Tensor) -> Tensor:
        """The step to subtract at a learning rate of 1, after a gradient (B, C, H, W)."""
        self._steps += 1
        self._mean = self._mean.lerp(gradient, 1 - _MEAN_DECAY)
        square = gradient.square()
        if self._per_image:
            square = square.mean(dim=(1, 2, 3), keepdim=True)
        self._square = self._square.lerp(square, 1 - _SQUARE_DECAY)
        self.scale = (self._square / (1 - _SQUARE_DECAY**self._steps)).sqrt() + _SMALLEST
        return self._mean / (1 - _MEAN_DECAY**self._steps) / self.scale

    def select(self, index: Tensor) -> None:
        """Keep the state of a part of the images; the index is (b,) integers or (B,) bools."""
        self.scale, self._mean, self._square = self.scale[index], self._mean[index], self._square[index]
