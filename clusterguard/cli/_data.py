"""What the command line finds by name: images, backbones, guards, and trainings to go on with."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from clusterguard._support import write_atomically
from clusterguard.cli._image_folders import ImageFolder, Part, listed_paths, open_folder
from clusterguard.deployment import fit_image, read_image
from clusterguard.detection import Calibration, Rate
from clusterguard.detectors import (
    CONFIG,
    WEIGHTS,
    ClusterGuard,
    describe_thresholds,
    make_encoder,
    read_config,
    read_weights,
    refuse_foreign,
)
from clusterguard.errors import ConfigurationError, InputError, PersistenceError, in_one_line
from clusterguard.samples import load_digits
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images with their classes' names, each brought to one size and number of channels when it is asked for.

    Args:
        items: pairs of a picture and a label.
        classes: K names, in the order of the labels.
        transform: picture -> image (C, H, W) in [0, 1].
        folder: that they are from, if they are from one.
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
    """Images that are read when they are asked for.

    Args:
        samples: their paths and labels.
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
    """A part of a data set for `clusterguard train`, `calibrate` or `evaluate`.

    Args:
        data: "digits", or a folder that holds `train`, `calibration` and `test`, or folders of other usual names for
            these such as `Training` and `val`, with one subfolder a class each; or one with the classes directly, of
            which each image belongs to one part for good: a hash of the seed and its content decides, so adding images
            moves none from one part to another, and copies stay together.
        part: "train", "calibration" or "test".
        image_size: side in pixels; the shorter side is scaled to it and the middle cut out.
        channels: 1 or 3.
        seed: of the split.
        skip_unreadable: read every image of the folder first, and leave out those that cannot be read.

    Returns:
        The images, as people see them; hidden files and those that are no images do not count.

    Raises:
        InputError: no such folder, or no image in it, or a class without one, or folders whose meaning is not clear;
            later, an image that cannot be read.

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
    """The training and calibration images of the same classes.

    Args:
        data: as for `load_part`.
        **options: of `load_part`.

    Raises:
        InputError: as in `load_part`, or there is only one class.
        ConfigurationError: their classes differ.
    """
    train, calibration = load_part(data, "train", **options), load_part(data, "calibration", **options)
    check_classes(calibration, train.classes)
    return train, calibration


def sample(pictures: Pictures, count: int, seed: int) -> Subset[tuple[Tensor, int]]:
    """At most `count` images drawn without order, for folders are sorted by class."""
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    return Subset(pictures, chosen.sort().values.tolist())


def shuffled(pictures: Pictures, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, int]]:
    """Batches to train on, in another order each epoch."""
    return DataLoader(
        pictures,
        batch_size,
        shuffle=True,
        drop_last=len(pictures) % batch_size == 1,  # one image has no batch statistics; another one each epoch
        generator=torch.Generator().manual_seed(seed),
    )


def make_backbone(name: str, *, num_classes: int, channels: int, pretrained: bool) -> nn.Module:
    """A classifier of timm or torchvision.

    Args:
        name: such as "timm:resnet18" or "torchvision:resnet50".
        num_classes: K.
        channels: of its images; torchvision's models take 3.
        pretrained: download weights, or take random ones.

    Raises:
        ConfigurationError: a name that the library does not know, or channels it cannot have.

    Example:
        >>> type(make_backbone("timm:test_resnet", num_classes=10, channels=1, pretrained=False)).__name__
        'ResNet'
    """
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        if not timm.is_model(model):
            raise ConfigurationError(f"expected a model of timm, got {model!r}; timm.list_models() lists them")
        return timm.create_model(model, pretrained=pretrained, num_classes=num_classes, in_chans=channels)
    if library != "torchvision":
        raise ConfigurationError(f"expected a backbone such as timm:resnet18 or torchvision:resnet50, got {name!r}")
    from torchvision import models

    if model not in models.list_models(module=models):
        raise ConfigurationError(f"expected a classifier of torchvision, got {model!r}; torchvision.models lists them")
    if channels != 3:
        raise ConfigurationError(f"torchvision's models take 3 channels, got {channels}; pass --channels 3")
    if pretrained:  # its weights come with a classifier of other classes
        return make_encoder(models.get_model(model, weights="DEFAULT"), num_classes)
    return models.get_model(model, weights=None, num_classes=num_classes)  # type: ignore[no-any-return]


def open_guard(
    folder: Path,
    data: str,
    part: Part,
    *,
    image_size: int | None,
    channels: int | None,
    device: torch.device,
    skip_unreadable: bool = False,
) -> tuple[ClusterGuard, dict[str, Any] | None, Pictures]:
    """A saved guard, the record of its training, and images as it was trained on.

    Args:
        folder: of the guard.
        data: as for `load_part`; the split's seed is that of the training.
        part: as for `load_part`.
        image_size: None takes what the guard was trained with, if `clusterguard train` recorded it.
        channels: likewise.
        device: of the guard.
        skip_unreadable: as for `load_part`.

    Raises:
        PersistenceError: no guard, or a damaged one.
        InputError: no images.
        ConfigurationError: the images' classes are not the guard's, or an older version divided its folder otherwise.
    """
    guard, training = load_named_guard(folder)
    recorded = recorded_images(training)
    guard = guard.to(device)
    options = image_options(data, image_size or recorded.get("image_size"), channels or recorded.get("channels"))
    pictures = load_part(data, part, **options, seed=recorded.get("seed", 0), skip_unreadable=skip_unreadable)
    check_classes(pictures, guard.class_names or pictures.classes)
    if "seed" in recorded and "divided_by" not in recorded and divided_by(pictures) == "content":
        raise ConfigurationError(
            f"expected folders of parts in {data}: an older version of clusterguard divided it for the training of "
            f"{folder}, by other rules, so {part} images might be ones that were trained on; sort them into train, "
            "calibration and test, or train again"
        )
    if len(pictures.classes) != guard.num_classes:
        raise ConfigurationError(f"expected {guard.num_classes} classes, as the guard has, got {pictures.classes}")
    return guard, training, pictures


def load_named_guard(folder: Path) -> tuple[ClusterGuard, Any]:
    """A saved guard and the record of its training, from which one of an older version has its classes' names."""
    training = read_config(folder / CONFIG)["training"]
    guard = ClusterGuard.from_pretrained(folder)
    if guard.class_names is None:
        guard.class_names = recorded_images(training).get("classes")
    return guard, training


def describe_images(pictures: Pictures) -> dict[str, Any]:
    """What a training records of its images besides their size."""
    return {"classes": list(pictures.classes), "divided_by": divided_by(pictures)}


def describe_unreadable(pictures: Pictures) -> list[str]:
    """A warning of the images that were left out because they cannot be read; none if there are none."""
    paths = () if pictures.folder is None else pictures.folder.unreadable
    return [f"{len(paths)} images that cannot be read are left out: {listed_paths(paths)}"] if paths else []


def divided_by(pictures: Pictures) -> str:
    """What decides which part an image belongs to; version 0.1 recorded nothing, and went by names of files."""
    if pictures.folder is None:
        return "package"
    return "folders" if pictures.folder.is_divided else "content"


def recorded_images(training: Any) -> dict[str, Any]:
    """How the images of a training were read, if `clusterguard train` recorded it."""
    found = training.get("data") if isinstance(training, dict) else None
    return found if isinstance(found, dict) else {}


def image_options(data: str, image_size: int | None, channels: int | None) -> dict[str, int]:
    """Size and channels of images, where they are not given those usual for the data."""
    usual = (28, 1) if data == "digits" else (224, 3)
    return {"image_size": image_size or usual[0], "channels": channels or usual[1]}


def check_classes(pictures: Pictures, classes: tuple[str, ...]) -> None:
    """Classes are numbered by name, so another set of names would give other numbers to the same class.

    Raises:
        ConfigurationError: they are not the ones that were trained.
        InputError: there is only one.
    """
    if len(pictures.classes) < 2:
        raise InputError(f"expected images of at least two classes, one subfolder each, got {pictures.classes[0]} only")
    if pictures.classes != classes:
        raise ConfigurationError(
            f"expected images of the classes that were trained, {', '.join(classes)}; got {', '.join(pictures.classes)}"
        )


def describe_guard(folder: Path) -> tuple[dict[str, Any], str]:
    """What is in a guard's folder, without building its backbone.

    Args:
        folder: that `save_pretrained` wrote.

    Returns:
        Its configuration with the thresholds, None where there are none; and the same as text.

    Raises:
        PersistenceError: no guard, or a damaged one.
    """
    config = read_config(folder / CONFIG)
    state = read_weights(folder / WEIGHTS, config)
    try:
        return _describe(folder, config, state["thresholds"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PersistenceError(
            f"{folder / CONFIG} was edited; save the guard again. What went wrong: {error!r}"
        ) from error


def _describe(folder: Path, config: dict[str, Any], thresholds: Tensor) -> tuple[dict[str, Any], str]:
    calibrated = not bool(thresholds.isnan().any())
    fitted = config["calibration"] and Calibration.from_dict(config["calibration"], thresholds)
    backbone, measured = config["backbone"], config.get("evaluation")
    names = config["guard"].get("class_names") or recorded_images(config["training"]).get("classes")
    names = names or range(len(thresholds))
    lines = [
        f"guard       {folder}, format {config['format_version']}",
        f"backbone    {backbone['source']}:{backbone.get('name', backbone.get('type'))}",
        f"classes     {len(thresholds)}: {', '.join(map(str, names[:20]))}{', …' if len(names) > 20 else ''}",
        f"thresholds  {describe_thresholds(calibrated, fitted)}",
    ]
    if calibrated:
        counts = fitted.counts if fitted else ("unknown",) * len(thresholds)
        rows = zip(names, thresholds.tolist(), counts, strict=True)
        lines += [f"  {name!s:10}{threshold:.4f}, examples: {count}" for name, threshold, count in islice(rows, 20)]
        lines += ["  and so on; --json shows all"] if len(thresholds) > 20 else []
    training = config["training"]
    if isinstance(training, dict):
        training = ", ".join(f"{key} {own}" for key, own in training.items() if key != "data")
    lines.append(f"training    {training or 'not recorded'}")
    if measured:
        rates = {name: measured[name] for name in ("accuracy", "false_positives")}
        rates |= {own["name"]: own["success"] for own in measured["results"]}
        figures = "; ".join(f"{name} {Rate(own['count'], own['total'])}" for name, own in rates.items())
        lines.append(f"measured    on {measured['images']} images: {figures}")
    else:
        lines.append("measured    nothing recorded; run: clusterguard evaluate --record")
    lines.append(f"versions    {', '.join(f'{name} {own}' for name, own in config['versions'].items())}")
    return {**config, "is_calibrated": calibrated, "thresholds": thresholds.tolist()}, "\n".join(lines)


def begin_run(folder: Path, options: dict[str, Any], *, resume: bool) -> Path:
    """Make sure that a training neither overwrites nor mixes with another one.

    Args:
        folder: of the guard and its checkpoint.
        options: all that decides what is trained; written to `training.json`, and compared when resuming.
        resume: go on from the checkpoint, if there is one.

    Returns:
        The checkpoint's path.

    Raises:
        ConfigurationError: there is an earlier run and `resume` is off, or its options were others.
        PersistenceError: the folder holds another program's files, which the guard would overwrite at the end.
    """
    refuse_foreign(folder)
    checkpoint, record = folder / "checkpoint.pt", folder / "training.json"
    guard = folder / "config.json"
    if checkpoint.exists() and not resume:
        raise ConfigurationError(
            f"{checkpoint} is of an earlier training; go on with --resume, or choose another folder"
        )
    if guard.exists() and not checkpoint.exists():
        raise ConfigurationError(
            f"{folder} holds a guard already and no checkpoint to go on from; choose another folder"
        )
    if checkpoint.exists():
        try:
            before = json.loads(record.read_text())
            changed = [name for name in options if before.get(name) != options[name]]
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            raise ConfigurationError(
                f"{record}, which says what {checkpoint} is of, is damaged or cannot be read ({in_one_line(error)}); "
                "choose another folder, or delete both to start anew"
            ) from error
        if changed:
            told = ", ".join(f"{name} {before.get(name)} (got {options[name]})" for name in changed)
            raise ConfigurationError(
                f"expected the options that {checkpoint} was trained with, by {record.name}: {told}; use these, or "
                "choose another folder"
            )
    write_atomically(record, lambda file: file.write_text(json.dumps(options, indent=2) + "\n"))
    return checkpoint
