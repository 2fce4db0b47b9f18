"""Loads and describes guards that a user names on the command line."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from clusterguard.assurance._internal import trained_radius
from clusterguard.cli._image_folders import Part
from clusterguard.cli._options import refuse_uncalibrated
from clusterguard.cli._pictures import Pictures, check_classes, divided_by, image_options, load_part
from clusterguard.detection import Calibration, Rate
from clusterguard.detectors import ClusterGuard
from clusterguard.detectors._internal import CONFIG, describe_thresholds, read_config, read_guard
from clusterguard.errors import ConfigurationError, PersistenceError
from torch import Tensor


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


def recorded_images(training: Any) -> dict[str, Any]:
    """The record of how the images of a training were read; empty if there is none."""
    images = training.get("data") if isinstance(training, dict) else None
    return images if isinstance(images, dict) else {}


def describe_other_radius(training: Any, norm: str, eps: float) -> list[str]:
    """A list with a warning if a guard was trained against attacks of another norm or radius; empty if not."""
    trained = trained_radius(training)
    if trained is None or trained == (norm, eps):
        return []
    return [f"attacks at {norm} {eps:g}, but the guard was trained at {trained[0]} {trained[1]:g}"]


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
