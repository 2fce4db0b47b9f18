"""What people put in front of a training: balanced classes, random crops, and transforms of single images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from clusterguard.errors import ConfigurationError, InputError
from torch import Generator, Tensor
from torch.nn import functional
from torch.utils.data import ConcatDataset, Subset, TensorDataset, WeightedRandomSampler


def balanced_sampler(labels: Any, *, generator: Generator | None = None) -> WeightedRandomSampler:
    """A sampler that draws all classes equally often, for a training set in which some classes are rare.

    It draws as many images as there are, with replacement. Calibrate and evaluate on all images, without it.

    Args:
        labels: (n,) class labels, or a data set that tells them: with the attribute `targets`, as torchvision's have, a
            `TensorDataset`, or a `Subset` or `ConcatDataset` of such.
        generator: randomness; None takes torch's global one.

    Returns:
        The sampler, for `DataLoader(data, batch_size, sampler=...)`.

    Raises:
        InputError: the data set tells no labels, or there are none, or they are no whole numbers from 0.

    Example:
        >>> sampler = balanced_sampler([0, 0, 0, 0, 0, 0, 0, 1], generator=Generator().manual_seed(0))
        >>> len(sampler), set(sampler) == {7}  # half of what it draws is the last image
        (8, False)
    """
    try:
        class_labels = torch.as_tensor(_labels_of(labels))
    except (TypeError, ValueError) as error:
        raise InputError(f"expected whole numbers as labels, got others; number the classes from 0 ({error})") from None
    if not class_labels.numel():
        raise InputError("expected labels of at least one image, got none")
    if class_labels.ndim != 1 or class_labels.is_floating_point() or class_labels.min() < 0:
        got = f"{class_labels.dtype} of shape {tuple(class_labels.shape)}, the smallest {class_labels.min()}"
        raise InputError(f"expected whole numbers from 0 as labels, one an image, got {got}")
    class_labels = class_labels.long()
    weights = 1 / torch.bincount(class_labels).double()[class_labels]
    return WeightedRandomSampler(weights.tolist(), len(class_labels), replacement=True, generator=generator)


def _labels_of(data: Any) -> Any:
    if isinstance(data, Tensor | Sequence) or type(data).__module__ == "numpy":
        return data
    if isinstance(data, Subset):
        return torch.as_tensor(_labels_of(data.dataset))[torch.as_tensor(list(data.indices))]
    if isinstance(data, ConcatDataset):
        return torch.cat([torch.as_tensor(_labels_of(part)) for part in data.datasets])
    if isinstance(data, TensorDataset):
        return data.tensors[1]
    if hasattr(data, "targets"):
        return data.targets
    raise InputError(
        f"expected labels, or a data set with targets, got {type(data).__name__}; pass a list of the labels"
    )


def augmented(augment: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The images (B, C, H, W) that a function makes of a batch.

    Raises:
        ConfigurationError: it returns something else than as many images.
    """
    with torch.no_grad():
        changed: Any = augment(images)
    if not isinstance(changed, Tensor) or changed.ndim != 4 or len(changed) != len(images):
        got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise ConfigurationError(f"expected augment to return {len(images)} images (B, C, H, W), got {got}")
    return changed.as_subclass(Tensor)  # transforms of torchvision may return a subclass


def crop_and_flip(images: Tensor, *, padding: int = 4, generator: Generator | None = None) -> Tensor:
    """The images cropped and mirrored at random, each in its own way.

    Images are padded with zeros and cropped to their size at a random place, and about half of them are mirrored. Pass
    the function itself as `TrainingOptions(augment=crop_and_flip)`. The random numbers then come from torch's global
    generator of the CPU, which checkpoints keep, so that a resumed training sees the same crops.

    Args:
        images: (B, C, H, W) on any device.
        padding: number of pixels that are added at each side, at least 0.
        generator: randomness on the CPU; None takes torch's global one.

    Returns:
        Images (B, C, H, W).

    Raises:
        ConfigurationError: `padding` is negative.

    Example:
        >>> crop_and_flip(torch.rand(8, 3, 32, 32)).shape
        torch.Size([8, 3, 32, 32])
        >>> from functools import partial
        >>> from clusterguard import TrainingOptions
        >>> options = TrainingOptions(augment=partial(crop_and_flip, padding=2))
    """
    if padding < 0:
        raise ConfigurationError(f"expected padding of at least 0 pixels, got {padding}")
    count, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    is_mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    padded = functional.pad(images, [padding] * 4)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    columns = torch.where(is_mirrored[:, None], columns.flip(1), columns)
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@final
@dataclass(frozen=True)
class EachImage:
    """A function of a batch that calls a transform for each image, so that each gets random numbers of its own.

    The transforms of `torchvision.transforms.v2` take a whole batch, but then all of its images are flipped, or none.

    Args:
        transform: function from an image (C, H, W) to an image, such as ``v2.RandomHorizontalFlip()``.

    Raises:
        ConfigurationError: it is no function.

    Example:
        >>> EachImage(lambda image: image.flip(2))(torch.rand(4, 1, 8, 8)).shape
        torch.Size([4, 1, 8, 8])
    """

    transform: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.transform):
            raise ConfigurationError(f"expected a function of an image, got {type(self.transform).__name__}")

    def __call__(self, images: Tensor) -> Tensor:
        """The changed images (B, C, H, W)."""
        return torch.stack([self.transform(image) for image in images])
