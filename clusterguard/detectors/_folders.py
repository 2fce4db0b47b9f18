"""Saves a guard as a folder of safetensors, JSON and a model card, and loads it.

Nothing is pickled, and a folder that is incomplete is refused. Users call `ClusterGuard.save_pretrained` and
`from_pretrained`.
"""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from clusterguard.detection import Calibration
from clusterguard.detectors._backbone_recipes import build_backbone
from clusterguard.detectors._base import DetectorModule
from clusterguard.detectors._model_card import MARK, CardDetails, Measured, model_card
from clusterguard.errors import ConfigurationError, PersistenceError, UnsupportedBackboneError, in_one_line
from safetensors.torch import load, save
from torch import Tensor, nn

Guard = TypeVar("Guard", bound=DetectorModule)

FORMAT_VERSION = 1
WEIGHTS, CARD, CONFIG = "model.safetensors", "README.md", "config.json"
_FORMAT = "clusterguard"
_PACKAGES = ("clusterguard", "torch", "timm", "torchvision", "safetensors")


def save_guard(
    guard: DetectorModule,
    folder: Path,
    *,
    backbone: Mapping[str, Any],
    options: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    evaluation: Measured | None = None,
    card: CardDetails | None = None,
) -> None:
    """Write a guard; see `ClusterGuard.save_pretrained`.

    Args:
        guard: guard whose state dict is saved.
        folder: folder to write to.
        backbone: recipe that `describe_backbone` returned.
        options: further options of the guard, as plain values. `load_guard` passes them to its `build`.
        training: record of the training, saved unchanged.
        evaluation: evaluation at the guard's thresholds.
        card: details that the publisher adds to the model card.
    """
    refuse_foreign(folder)
    thresholds = guard.thresholds.tolist()
    if evaluation is not None and str(list(evaluation.thresholds)) != str(thresholds):  # as text, as NaN != NaN
        raise ConfigurationError("expected an evaluation at this guard's thresholds, got another's; evaluate it again")
    try:
        json.dumps(training, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"expected training to hold what JSON has, got {error}; write None for NaN and repr(...) for objects"
        ) from error
    weights = save(
        {name: value.detach().to("cpu", copy=True).contiguous() for name, value in guard.state_dict().items()}
    )
    record = guard.calibration if guard.calibration and guard.calibration.describes(guard.thresholds) else None
    config = {
        "format": _FORMAT,
        "format_version": FORMAT_VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "backbone": backbone,
        "guard": {
            **options,
            "image_shape": guard.image_shape,
            "dtype": str(list(guard.parameters())[-1].dtype).removeprefix("torch."),
            "class_names": guard.class_names,
        },
        "calibration": record.to_dict() if record else None,
        "training": training,
        "evaluation": None if evaluation is None else evaluation.to_dict(),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    text = model_card(config, calibrated=guard.is_calibrated, calibration=record, evaluation=evaluation, details=card)
    files = {
        WEIGHTS: weights,
        CARD: text.encode(),
        CONFIG: json.dumps(config, indent=2, allow_nan=False).encode() + b"\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content)
        for name in files:  # the config last: it holds the hash of its weights, so a mixture is refused
            (Path(staging) / name).replace(folder / name)


def load_guard(
    build: Callable[[nn.Module, Mapping[str, Any]], Guard], folder: Path, *, backbone: nn.Module | None = None
) -> Guard:
    """Read a guard; see `ClusterGuard.from_pretrained`.

    Args:
        build: function that makes the guard from its backbone and from the options that `save_guard` wrote, such as
            `image_shape`.
        folder: folder that `save_guard` wrote.
        backbone: module that the guard was made with; None rebuilds it from its recipe.
    """
    config = read_config(folder / CONFIG)
    state = read_weights(folder / WEIGHTS, config)
    try:
        recipe, options = config["backbone"], config["guard"]
        if backbone is None and recipe["source"] == "module":
            raise PersistenceError(
                f"{folder / CONFIG} has no recipe for its backbone, a {recipe['type']}; build that module as it was "
                "when the guard was made (its weights do not matter) and pass backbone=module"
            )
        # The random weights are overwritten, so drawing them must not change the user's random state. Warnings were
        # already given when the guard was made.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guard = build(build_backbone(recipe) if backbone is None else backbone, options)
            guard = guard.to(getattr(torch, options["dtype"]))
        for name, tensor in guard.state_dict(keep_vars=True).items():
            if name in state:  # parts may differ in dtype
                tensor.data = tensor.data.to(state[name].dtype)
        guard.load_state_dict(state)
        guard.class_names = options.get("class_names")
        if config["calibration"] is not None:
            guard.calibration = Calibration.from_dict(config["calibration"], guard.thresholds)
    except PersistenceError:
        raise
    except Exception as error:  # an edited config or another version of timm may raise anything
        if isinstance(error, UnsupportedBackboneError) and backbone is not None:
            raise
        hint = f"backbone={type(backbone).__name__}" if backbone is not None else f"what {CONFIG} describes"
        raise PersistenceError(
            f"{folder / WEIGHTS} does not fit {hint}; pass the module that the guard was made with as backbone=, or "
            f"use the package versions that {CONFIG} lists. What went wrong: {in_one_line(error)}"
        ) from error
    return guard


def find_folder(name: str | Path, **hub_options: Any) -> Path:
    """The local folder of a guard, downloaded from the Hugging Face Hub if the name is an id there."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise PersistenceError(f"expected a folder that save_pretrained wrote, got the file {name}; name its folder")
    if not _may_be_on_the_hub(name):
        raise PersistenceError(
            f"expected a folder that save_pretrained wrote, got {name}, which does not exist; mend the path, which is "
            f"relative to {Path.cwd()} unless it is absolute"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG], **hub_options))
    except Exception as error:  # the Hub's errors have no common base class
        raise PersistenceError(
            f"expected a folder, or a guard's id on the Hugging Face Hub, got {str(name)!r}: there is no such folder, "
            f"and the Hub says: {in_one_line(error)}"
        ) from error


def _may_be_on_the_hub(name: str | Path) -> bool:
    """Whether a name can be an id such as "owner/guard", and is not clearly a path."""
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith((".", "~", "/")) or text.endswith("/") or "\\" in text
    return not is_path and text.count("/") <= 1


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder in which files that clusterguard did not write would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise PersistenceError(f"expected a folder, got the file {folder}; choose another name")
    for name, mark in ((CARD, MARK), (CONFIG, f'"format": "{_FORMAT}"')):
        file = folder / name
        if file.exists() and not (file.is_file() and mark in file.read_text(errors="replace")):
            raise PersistenceError(f"{file} is not clusterguard's; choose another folder, or remove that file")


def read_config(file: Path) -> dict[str, Any]:
    """Read the `config.json` of a guard, and refuse one of another program or of an unknown format."""
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise PersistenceError(f"expected {file.name} in {file.parent}, found none; save the guard there") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise PersistenceError(
            f"{file} is damaged or cannot be read ({in_one_line(error)}); download it or save the guard again"
        ) from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise PersistenceError(f"{file} describes no guard; choose a folder that save_pretrained wrote")
    version_there = config.get("format_version")
    if type(version_there) is not int or not 1 <= version_there <= FORMAT_VERSION:
        raise PersistenceError(
            f"expected format version {FORMAT_VERSION} or older in {file}, got {repr(version_there)[:50]}; "
            "upgrade clusterguard"
        )
    return config


def read_weights(file: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of `model.safetensors`, and refuse a file that the config was not saved with."""
    again = "download it or save the guard again"
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise PersistenceError(f"expected {file.name} in {file.parent}, found none; {again}") from error
    except (OSError, MemoryError) as error:
        raise PersistenceError(f"{file} cannot be read ({in_one_line(error)}); {again}") from error
    if hashlib.sha256(content).hexdigest() != config.get("weights_sha256"):
        raise PersistenceError(
            f"{file} is not the file that {CONFIG} was saved with: it is damaged, cut off, replaced, or from an "
            f"interrupted save; {again}"
        )
    try:
        return load(content)
    except Exception as error:  # safetensors raises its own errors and Python's
        raise PersistenceError(f"{file} is no safetensors file ({in_one_line(error)}); {again}") from error
