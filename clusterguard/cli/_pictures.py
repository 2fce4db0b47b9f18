"""Loads the images that a user names on the command line."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clusterguard.cli._image_folders import ImageFolder, Part, listed_paths, open_folder
from clusterguard.deployment import fit_image, read_image
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.samples import load_digits
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images with labels and class names. Each image is brought to one size and number of channels when it is read.

    Args:
        items: sequence of pairs of a picture and a label.
        classes: K names in the order of the labels.
        transform: function from a picture to an image (C, H, W) in [0, 1].
        folder: folder that the images are from; None if they are not from a folder.
    """

    def __init__(
        self,
        items: Any,
        classes: Sequence[str],
        transform: Callable[[Any], Tensor],
        folder: ImageFolder | None = None,
    ) -> None:
        self.items, self.classes, self.transform, self.folder = items, tuple(classes), transform, folder

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.items[index]
        return self.transform(picture), int(label)


class ImageFiles(Sequence[tuple[Image.Image, int]]):
    """Images that are read from their files when they are accessed.

    Args:
        samples: paths and labels of the images.
    """

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        path, label = self.samples[index]
        try:
            return read_image(path).image, label
        except InputError as error:
            raise InputError(f"{error}; --skip-unreadable leaves such images out") from error


def load_part(
    data: str, part: Part, *, image_size: int, channels: int, seed: int, skip_unreadable: bool = False
) -> Pictures:
    """Load a part of a data set for `clusterguard train`, `calibrate` or `evaluate`.

    A folder holds either the parts or the classes. The parts are `train`, `calibration` and `test`, or folders with
    other usual names such as `Training` and `val`, each with one subfolder per class. If the folder holds the classes
    directly, a hash of the seed and the content of an image decides to which part the image belongs. So adding images
    does not move others from one part to another, and copies of an image stay together.

    Args:
        data: "digits", or the path of a folder.
        part: name of the part, "train", "calibration" or "test".
        image_size: side in pixels; the shorter side is scaled to it, and the middle is cut out.
        channels: number of channels, 1 or 3.
        seed: seed of the split.
        skip_unreadable: whether to read every image of the folder first, and leave out those that cannot be read.

    Returns:
        The images, as people see them. Hidden files and files that are no images are ignored.

    Raises:
        InputError: there is no such folder, it holds no image, a class has no image, or the meaning of its folders is
            not clear. Accessing an image raises it later if the image cannot be read.

    Example:
        >>> image, label = load_part("digits", "test", image_size=28, channels=1, seed=0)[0]
        >>> image.shape
        torch.Size([1, 28, 28])
    """
    from torchvision import transforms

    if data == "digits":
        fit = [transforms.Resize(image_size), transforms.CenterCrop(image_size)] if image_size != 28 else []
        spread = transforms.Lambda(lambda image: image.expand(channels, -1, -1))
        return Pictures(load_digits(part), tuple("0123456789"), transforms.Compose([*fit, spread]))
    if not Path(data).is_dir():
        raise InputError(f"expected 'digits' or a folder of images, got {data!r}, which is no folder")
    folder = open_folder(Path(data), seed, skip_unreadable=skip_unreadable)
    items = ImageFiles(folder.samples(part))
    fit_one = partial(fit_image, size=(image_size, image_size), channels=channels)
    return Pictures(items, tuple(folder.parts[part]), fit_one, folder)


def load_pair(data: str, **options: Any) -> tuple[Pictures, Pictures]:
    """Load training and calibration images, and check that they have the same classes.

    Args:
        data: name or path as for `load_part`.
        **options: options of `load_part`.

    Raises:
        InputError: as in `load_part`, or there is only one class.
        ConfigurationError: the classes of the two parts differ.
    """
    train, calibration = load_part(data, "train", **options), load_part(data, "calibration", **options)
    check_classes(calibration, train.classes)
    return train, calibration


def sample(pictures: Pictures, count: int, seed: int) -> Subset[tuple[Tensor, int]]:
    """Draw at most `count` images at random, because folders are sorted by class."""
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    return Subset(pictures, chosen.sort().values.tolist())


def shuffled(pictures: Pictures, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, int]]:
    """A loader of training batches, in another order each epoch."""
    return DataLoader(
        pictures,
        batch_size,
        shuffle=True,
        drop_last=len(pictures) % batch_size == 1,  # one image alone has no batch statistics
        generator=torch.Generator().manual_seed(seed),
    )


def image_options(data: str, image_size: int | None, channels: int | None) -> dict[str, int]:
    """The size and channels of images, with the usual values of the data where an option is None."""
    usual = (28, 1) if data == "digits" else (224, 3)
    return {"image_size": image_size or usual[0], "channels": channels or usual[1]}


def check_classes(pictures: Pictures, classes: tuple[str, ...]) -> None:
    """Check that images have the classes that were trained.

    Classes are numbered by name, so with another set of names the same class could have another number.

    Raises:
        ConfigurationError: the classes are not those that were trained.
        InputError: there is only one class.
    """
    if len(pictures.classes) < 2:
        raise InputError(f"expected images of at least two classes, one subfolder each, got {pictures.classes[0]} only")
    if pictures.classes != classes:
        raise ConfigurationError(
            f"expected images of the classes that were trained, {', '.join(classes)}; got "
            f"{', '.join(pictures.classes)}; choose the folder of images by --data"
        )


def describe_images(pictures: Pictures) -> dict[str, Any]:
    """What a training records about its images besides their size."""
    return {"classes": list(pictures.classes), "divided_by": divided_by(pictures)}


def describe_unreadable(pictures: Pictures) -> list[str]:
    """A list with a warning about images that were left out because they cannot be read; empty if there are none."""
    paths = () if pictures.folder is None else pictures.folder.unreadable
    return [f"{len(paths)} images that cannot be read are left out: {listed_paths(paths)}"] if paths else []


def divided_by(pictures: Pictures) -> str:
    """How images were divided into parts: "folders", "content", or "package" for data that ships.

    Version 0.1 divided folders by the names of files, and recorded nothing.
    """
    if pictures.folder is None:
        return "package"
    return "folders" if pictures.folder.is_divided else "content"
