"""Loads images, backbones, guards and interrupted trainings that a user names on the command line."""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from clusterguard._support import check_archive, open_ordinary, previous, write_atomically
from clusterguard.assurance._internal import trained_radius
from clusterguard.cli._image_folders import ImageFolder, Part, listed_paths, open_folder
from clusterguard.cli._options import refuse_uncalibrated
from clusterguard.deployment import fit_image, read_image
from clusterguard.detection import Calibration, Rate
from clusterguard.detectors import ClusterGuard, make_encoder
from clusterguard.detectors._internal import CONFIG, check_overwritable, describe_thresholds, read_config, read_guard
from clusterguard.errors import ConfigurationError, InputError, PersistenceError, in_one_line
from clusterguard.samples import load_digits
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn
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


def make_backbone(name: str, *, num_classes: int, channels: int, pretrained: bool) -> nn.Module:
    """Make a classifier of timm or torchvision.

    Args:
        name: name such as "timm:resnet18" or "torchvision:resnet50".
        num_classes: number K of classes.
        channels: number of channels of the images; torchvision's models take 3.
        pretrained: whether to download weights instead of drawing random ones.

    Raises:
        ConfigurationError: the library does not know the name, or the model cannot have this number of channels.

    Example:
        >>> type(make_backbone("timm:test_resnet", num_classes=10, channels=1, pretrained=False)).__name__
        'ResNet'
    """
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        if not timm.is_model(model):
            raise ConfigurationError(f"expected a model of timm, got {model!r}; timm.list_models() lists them")
        with _explained_downloads(name) if pretrained else nullcontext():
            return timm.create_model(model, pretrained=pretrained, num_classes=num_classes, in_chans=channels)
    if library != "torchvision":
        raise ConfigurationError(f"expected a backbone such as timm:resnet18 or torchvision:resnet50, got {name!r}")
    from torchvision import models

    if model not in models.list_models(module=models):
        raise ConfigurationError(f"expected a classifier of torchvision, got {model!r}; torchvision.models lists them")
    if channels != 3:
        raise ConfigurationError(f"torchvision's models take 3 channels, got {channels}; pass --channels 3")
    if pretrained:  # the downloaded classifier has other classes
        with _explained_downloads(name):
            return make_encoder(models.get_model(model, weights="DEFAULT"), num_classes)
    return models.get_model(model, weights=None, num_classes=num_classes)  # type: ignore[no-any-return]


@contextmanager
def _explained_downloads(name: str) -> Iterator[None]:
    """Context in which a download that fails becomes an error that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # those of urllib and of the Hub are OSErrors
        raise ConfigurationError(
            f"the weights of {name} cannot be downloaded ({in_one_line(error)}); go online, or leave out --pretrained "
            "(`clusterguard guard` takes --weights FILE)"
        ) from error


_STATE_DICTS = ("state_dict", "model_state_dict", "model")  # names under which checkpoints hold a state dict
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # what wrappers put before the names of all weights


def _read_weights(file: Path) -> Any:
    with open_ordinary(file) as stream:
        if file.suffix == ".safetensors":
            return load(stream.read())
        if zipfile.is_zipfile(stream):  # torch has written archives since version 1.6
            check_archive(stream, file)
        stream.seek(0)
        return torch.load(stream, "cpu", weights_only=True)


def load_weights(network: nn.Module, file: Path) -> None:
    """Give a network the weights in a file. Nothing in the file is run, and checksums of `torch.save` are verified.

    Args:
        network: network whose weights are replaced.
        file: file of safetensors, or a state dict that `torch.save` wrote, perhaps under the name "state_dict",
            "model_state_dict" or "model" in a checkpoint, or with the prefix of a wrapper before all names, such as
            "module." of a parallel training, "_orig_mod." of a compiled model or "model." of a Lightning module.

    Raises:
        PersistenceError: the file is damaged, holds no state dict, or does not fit the network.
    """
    try:
        content = _read_weights(file)
        weights = next((content[key] for key in _STATE_DICTS if isinstance(content.get(key), dict)), content)
        while weights and (prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in weights)), "")):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        network.load_state_dict(weights)
    except UnpicklingError as error:
        raise PersistenceError(
            f"{file} holds other things than tensors, such as a whole model, which could run code; save "
            "model.state_dict() instead"
        ) from error
    except PersistenceError as error:
        raise PersistenceError(f"{error}; save the weights again") from error
    except Exception as error:  # safetensors and torch have errors of many kinds
        raise PersistenceError(
            f"{file} does not fit {type(network).__name__} with as many classes as the images have; name the model "
            f"that was trained. What went wrong: {in_one_line(error)}"
        ) from error


def open_guard(
    folder: Path,
    data: str,
    part: Part,
    *,
    image_size: int | None,
    channels: int | None,
    device: torch.device,
    skip_unreadable: bool = False,
) -> tuple[ClusterGuard, dict[str, Any], Pictures]:
    """Load a saved guard, its config, and images in the form that it was trained on.

    Args:
        folder: folder of the guard.
        data: name or path as for `load_part`; the seed of the split is that of the training.
        part: name of the part, as for `load_part`.
        image_size: side in pixels; None takes that of the training, if `clusterguard train` recorded it.
        channels: number of channels; None takes that of the training, if `clusterguard train` recorded it.
        device: device to put the guard on.
        skip_unreadable: whether to leave out images that cannot be read, as for `load_part`.

    Raises:
        PersistenceError: there is no guard, or it is damaged.
        NotCalibratedError: the guard is to be tested, and has no thresholds.
        InputError: there are no images.
        ConfigurationError: the classes of the images are not those of the guard, or an older version of clusterguard
            split the folder by other rules.
    """
    guard, config = load_named_guard(folder)
    if part == "test":
        refuse_uncalibrated(guard, folder, data)
    recorded = recorded_images(config["training"])
    guard = guard.to(device)
    options = image_options(data, image_size or recorded.get("image_size"), channels or recorded.get("channels"))
    pictures = load_part(data, part, **options, seed=recorded.get("seed", 0), skip_unreadable=skip_unreadable)
    check_classes(pictures, guard.class_names or pictures.classes)
    if "seed" in recorded and "divided_by" not in recorded and divided_by(pictures) == "content":
        raise ConfigurationError(
            f"expected folders of parts in {data}: an older version of clusterguard divided it for the training of "
            f"{folder} by other rules, so it may have been trained on some of the {part} images; sort the images into "
            "train, calibration and test, or train again"
        )
    if len(pictures.classes) != guard.num_classes:
        raise ConfigurationError(f"expected {guard.num_classes} classes, as the guard has, got {pictures.classes}")
    return guard, config, pictures


def load_named_guard(folder: Path) -> tuple[ClusterGuard, dict[str, Any]]:
    """Load a guard and its config. A guard of an older version gets its class names from the record of its training."""
    config = read_config(folder / CONFIG)
    guard = ClusterGuard.from_pretrained(folder)
    if guard.class_names is None:
        guard.class_names = recorded_images(config["training"]).get("classes")
    return guard, config


def describe_images(pictures: Pictures) -> dict[str, Any]:
    """What a training records about its images besides their size."""
    return {"classes": list(pictures.classes), "divided_by": divided_by(pictures)}


def describe_unreadable(pictures: Pictures) -> list[str]:
    """A list with a warning about images that were left out because they cannot be read; empty if there are none."""
    paths = () if pictures.folder is None else pictures.folder.unreadable
    return [f"{len(paths)} images that cannot be read are left out: {listed_paths(paths)}"] if paths else []


def describe_other_radius(training: Any, norm: str, eps: float) -> list[str]:
    """A list with a warning if a guard was trained against attacks of another norm or radius; empty if not."""
    trained = trained_radius(training)
    if trained is None or trained == (norm, eps):
        return []
    return [f"attacks at {norm} {eps:g}, but the guard was trained at {trained[0]} {trained[1]:g}"]


def divided_by(pictures: Pictures) -> str:
    """How images were divided into parts: "folders", "content", or "package" for data that ships.

    Version 0.1 divided folders by the names of files, and recorded nothing.
    """
    if pictures.folder is None:
        return "package"
    return "folders" if pictures.folder.is_divided else "content"


def recorded_images(training: Any) -> dict[str, Any]:
    """The record of how the images of a training were read; empty if there is none."""
    images = training.get("data") if isinstance(training, dict) else None
    return images if isinstance(images, dict) else {}


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


def describe_guard(folder: Path) -> tuple[dict[str, Any], str]:
    """Describe what a guard's folder holds, without building the backbone.

    Args:
        folder: folder that `save_pretrained` wrote.

    Returns:
        The configuration together with the thresholds, and the same as text.

    Raises:
        PersistenceError: there is no guard, or it is damaged.
    """
    try:
        return read_guard(folder, lambda config, weights: _describe(folder, config, weights.read_thresholds()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PersistenceError(
            f"{folder / CONFIG} was edited; save the guard again. What went wrong: {error!r}"
        ) from error


def _describe(folder: Path, config: dict[str, Any], thresholds: Tensor) -> tuple[dict[str, Any], str]:
    calibrated = bool(thresholds.isfinite().all())
    fitted = config["calibration"] and Calibration.from_dict(config["calibration"], thresholds)
    backbone, measured = config["backbone"], config.get("evaluation")
    names = config["guard"].get("class_names") or recorded_images(config["training"]).get("classes")
    named, names = names, names or range(len(thresholds))
    is_of_digits = recorded_images(config["training"]).get("divided_by") == "package"
    data = "" if is_of_digits else " --data FOLDER"
    missing = f"none, so every image is refused; run: clusterguard calibrate {folder}{data}"
    lines = [
        f"guard       {folder}, format {config['format_version']}",
        f"backbone    {backbone['source']}:{backbone.get('name', backbone.get('type'))}",
        f"classes     {len(thresholds)}: {', '.join(map(str, names[:20]))}{', …' if len(names) > 20 else ''}",
        f"thresholds  {describe_thresholds(calibrated, fitted, named) if calibrated else missing}",
    ]
    if calibrated:
        counts = fitted.counts if fitted else ("unknown",) * len(thresholds)
        rows = zip(names, thresholds.tolist(), counts, strict=True)
        lines += [f"  {name!s:10}{threshold:.4f}, examples: {count}" for name, threshold, count in islice(rows, 20)]
        lines += ["  and so on; --json shows all"] if len(thresholds) > 20 else []
    training = config["training"]
    if isinstance(training, dict):
        training = ", ".join(f"{key} {value}" for key, value in training.items() if key != "data")
    lines.append(f"training    {training or 'not recorded'}")
    if measured:
        rates = {name: measured[name] for name in ("accuracy", "false_positives")}
        rates |= {result["name"]: result["success"] for result in measured["results"]}
        figures = "; ".join(f"{name} {Rate(rate['count'], rate['total'])}" for name, rate in rates.items())
        lines.append(f"measured    on {measured['images']} images: {figures}")
    else:
        lines.append(f"measured    nothing recorded; run: clusterguard evaluate {folder}{data} --record")
    lines.append(f"versions    {', '.join(f'{name} {number}' for name, number in config['versions'].items())}")
    text = "\n".join(line.replace("\n", "\\n") for line in lines)  # no name makes a line of its own
    return {**config, "is_calibrated": calibrated, "thresholds": thresholds.tolist()}, text


def begin_run(folder: Path, options: dict[str, Any], *, resume: bool) -> Path:
    """Check that a training neither overwrites another one nor continues one that had other options.

    Args:
        folder: folder of the guard and its checkpoint.
        options: all options that decide what is trained. They are written to `training.json`, and compared with it when
            a training is resumed.
        resume: whether to continue from the checkpoint, if there is one.

    Returns:
        The path of the checkpoint.

    Raises:
        ConfigurationError: there is an earlier training and `resume` is off, or its options were different.
        PersistenceError: the folder holds files of another program.
    """
    check_overwritable(folder)
    checkpoint, record = folder / "checkpoint.pt", folder / "training.json"
    guard, is_begun = folder / "config.json", checkpoint.exists() or previous(checkpoint).exists()
    if is_begun and not resume:
        raise ConfigurationError(
            f"{checkpoint} belongs to an earlier training; go on with --resume, or choose another folder"
        )
    if guard.exists() and not is_begun:
        raise ConfigurationError(
            f"{folder} holds a guard already and no checkpoint to go on from; choose another folder"
        )
    if not is_begun and not _tells_a_training(record):
        check_output(folder)
    if is_begun:
        try:
            with open_ordinary(record) as file:
                before = json.loads(file.read())
            changed = [name for name in options if before.get(name) != options[name]]
        except (OSError, PersistenceError, ValueError, RecursionError, AttributeError) as error:
            raise ConfigurationError(
                f"{record}, the record of {checkpoint}, is damaged or cannot be read ({in_one_line(error)}); "
                "choose another folder, or delete both to start anew"
            ) from error
        if changed:
            differences = ", ".join(f"{name} {before.get(name)} (got {options[name]})" for name in changed)
            raise ConfigurationError(
                f"expected the options that {checkpoint} was trained with, by {record.name}: {differences}; use these, "
                "or choose another folder"
            )
    write_atomically(record, lambda file: file.write_text(json.dumps(options, indent=2) + "\n"))
    return checkpoint


def check_output(folder: Path, *ours: str) -> None:
    """Check that a folder for results holds no other files.

    Args:
        folder: folder for results.
        *ours: names of results, which may be there and are overwritten.

    Raises:
        PersistenceError: it is a file, or holds other files than these and hidden ones.
    """
    if folder.exists() and not folder.is_dir():
        raise PersistenceError(f"expected a folder, got the file {folder}; choose another name")
    there = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    others = sorted(name for name in there if name not in ours and not name.startswith("."))
    if others:
        raise PersistenceError(
            f"expected an empty folder{', or one that this command wrote' if ours else ''}, got {folder} with "
            f"{others[0]!a} in it; "
            "choose another folder"
        )


def _tells_a_training(record: Path) -> bool:
    """Whether `begin_run` wrote this file."""
    try:
        with open_ordinary(record) as file:
            return "calibrator" in json.loads(file.read())
    except (OSError, PersistenceError, ValueError, RecursionError, TypeError):
        return False
