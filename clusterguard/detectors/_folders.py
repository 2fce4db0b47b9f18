"""A guard as a folder of safetensors, JSON and a model card: nothing is pickled, nothing is loaded by halves.

`ClusterGuard.save_pretrained` and `from_pretrained` are the way in.
"""

import hashlib
import inspect
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from clusterguard.detection import Calibration
from clusterguard.detectors._backbones import make_encoder
from clusterguard.detectors._base import DetectorModule
from clusterguard.detectors._layers import build_layers, describe_layers
from clusterguard.detectors._model_card import MARK, Measured, model_card
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
) -> None:
    """Write a guard; see `ClusterGuard.save_pretrained`.

    Args:
        guard: its state dict is saved.
        folder: where to.
        backbone: the recipe of `describe_backbone`.
        options: what else makes such a guard, as plain values; `load_guard` hands them to its `build`.
        training: recorded as it is.
        evaluation: at the guard's thresholds.
    """
    refuse_foreign(folder)
    thresholds = guard.thresholds.tolist()
    if evaluation is not None and str(list(evaluation.thresholds)) != str(thresholds):  # as text, for NaN
        raise ConfigurationError("expected an evaluation at this guard's thresholds, got another's; evaluate it again")
    try:
        json.dumps(training, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"expected training to hold what JSON has, got {error}; write None for NaN, repr(...) for objects"
        ) from error
    weights = save({name: own.detach().to("cpu", copy=True).contiguous() for name, own in guard.state_dict().items()})
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
    files = {
        WEIGHTS: weights,
        CARD: model_card(config, calibrated=guard.is_calibrated, calibration=record, evaluation=evaluation).encode(),
        CONFIG: json.dumps(config, indent=2, allow_nan=False).encode() + b"\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content)
        for name in files:  # the config last: it tells the weights it belongs to, so halves never load
            (Path(staging) / name).replace(folder / name)


def load_guard(
    build: Callable[[nn.Module, Mapping[str, Any]], Guard], folder: Path, *, backbone: nn.Module | None = None
) -> Guard:
    """Read a guard; see `ClusterGuard.from_pretrained`.

    Args:
        build: makes the guard of its backbone and of the options that `save_guard` wrote, `image_shape` among them.
        folder: that was written.
        backbone: None rebuilds it from its recipe.
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
        # The random weights are overwritten, so they shall not cost randomness; and what there is to warn of was said
        # when the guard was made.
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
    except Exception as error:  # whatever a config that was edited, or another version of timm, leads to
        if isinstance(error, UnsupportedBackboneError) and backbone is not None:
            raise
        hint = f"backbone={type(backbone).__name__}" if backbone is not None else f"what {CONFIG} describes"
        raise PersistenceError(
            f"{folder / WEIGHTS} does not fit {hint}; pass the module that the guard was made with as backbone=, or "
            f"use the package versions that {CONFIG} lists. What went wrong: {in_one_line(error)}"
        ) from error
    return guard


def find_folder(name: str | Path, **hub_options: Any) -> Path:
    """A folder as it is, or the copy of a guard on the Hugging Face Hub."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise PersistenceError(f"expected a folder that save_pretrained wrote, got the file {name}; name its folder")
    if not _may_be_on_the_hub(name):
        raise PersistenceError(
            f"expected a folder that save_pretrained wrote, got {name}, which does not exist; mend the path, which is "
            f"taken from {Path.cwd()} unless it is absolute"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG], **hub_options))
    except Exception as error:  # the Hub's errors have no base class of their own
        raise PersistenceError(
            f"expected a folder, or a guard's id on the Hugging Face Hub, got {str(name)!r}: there is no such folder, "
            f"and the Hub says: {in_one_line(error)}"
        ) from error


def _may_be_on_the_hub(name: str | Path) -> bool:
    """Whether it can be an id such as "owner/guard" at all, or is a path."""
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith((".", "~", "/")) or text.endswith("/") or "\\" in text
    return not is_path and text.count("/") <= 1


def describe_backbone(
    encoder: nn.Module, representation_dim: int, image_shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """The recipe for the backbone of an encoder, tried out on the meta device.

    Args:
        encoder: what `make_encoder` made of the backbone.
        representation_dim: m, its outputs.
        image_shape: (C, H, W) of the images that it takes; None if that is not known.

    Returns:
        "source" is "timm", "torchvision" or "layers", with the "name" and "arguments" that rebuild the encoder, equal
        in every module, attribute and shape; or it is "module", if no recipe does.
    """
    model, structure = _inner(encoder), _structure(encoder)
    near_misses = []
    for recipe in _recipes(model):
        for _ in range(2):
            try:
                with torch.device("meta"):
                    rebuilt = make_encoder(build_backbone(recipe), representation_dim, image_shape=image_shape)
            except Exception as error:  # whatever a library raises at arguments that it does not take
                near_misses.append((0, f"{recipe['name']}: {error}"))
                break
            twin = _structure(rebuilt)
            different = [name for name in {**structure, **twin} if structure.get(name) != twin.get(name)]
            if not different:
                return recipe
            place = different[0] or type(model).__name__
            near_misses.append((len(structure) - len(different), f"{recipe['name']} differs at {place}"))
            # Constructors keep some arguments under their own names; those are worth a second try.
            usual, changeable = _attributes(_inner(rebuilt)), inspect.signature(type(model)).parameters
            changed = {k: v for k, v in _attributes(model).items() if k in changeable and v != usual.get(k, v)}
            if not changed:
                break
            recipe = _recipe(recipe["source"], recipe["name"], {**recipe["arguments"], **changed})
    if near_misses and recipe["source"] != "layers":  # of a module of one's own nothing was promised
        warnings.warn(
            f"no recipe rebuilds this backbone ({max(near_misses)[1]}); from_pretrained will need backbone=, the "
            "module that the guard was made with",
            stacklevel=3,
        )
    return {"source": "module", "type": f"{type(model).__module__}.{type(model).__qualname__}"}


def build_backbone(recipe: Mapping[str, Any]) -> nn.Module:
    """The backbone of a recipe, with random weights; nothing is downloaded and no checkpoint is read."""
    name, arguments = recipe["name"], recipe["arguments"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initial weights and old names
        if recipe["source"] == "torchvision":
            from torchvision.models import get_model_builder

            return get_model_builder(name)(weights=None, **arguments)  # type: ignore[no-any-return]
        if recipe["source"] == "layers":
            return build_layers(arguments)
        import timm

        if ":" in name:
            raise ValueError(f"{name!r} is no name of a timm model")
        # What fetches or unpickles files is stated here, so that a foreign config.json cannot state it too.
        off: dict[str, Any] = {"pretrained": False, "checkpoint_path": "", "pretrained_cfg": None}
        return timm.create_model(name, **off, pretrained_cfg_overlay=None, **arguments)


def _recipes(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What may have built a model."""
    settings = getattr(model, "pretrained_cfg", None)
    if isinstance(settings, dict) and settings.get("architecture"):
        name = ".".join(filter(None, (settings["architecture"], settings.get("tag"))))
        yield _recipe("timm", name, getattr(model, "_model_args", {}))  # newer versions of timm keep them
    elif type(model).__module__.startswith("torchvision.models."):
        from torchvision import models

        for name in models.list_models(module=models):
            if inspect.signature(models.get_model_builder(name)).return_annotation is type(model):
                yield _recipe("torchvision", name, {})
    elif (layers := describe_layers(model)) is not None:
        yield {"source": "layers", "name": type(model).__name__, "arguments": json.loads(json.dumps(layers))}


def _recipe(source: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in arguments.items() if _is_plain(value)}
    return {"source": source, "name": name, "arguments": json.loads(json.dumps(plain))}  # as it will be read


def _inner(encoder: nn.Module) -> nn.Module:
    """The model that got a layer on top, or the encoder itself."""
    return encoder[0] if type(encoder) is nn.Sequential else encoder


def _structure(module: nn.Module) -> dict[str, object]:
    """All that decides what a module computes, but for the values of its tensors."""
    return {
        **{name: (type(part), _attributes(part)) for name, part in module.named_modules()},
        **{name: own.shape for name, own in [*module.named_parameters(), *module.named_buffers()]},
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Its settings; of functions and other objects their names."""
    return {
        key: value if _is_plain(value) else getattr(value, "__qualname__", type(value).__name__)
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training"
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def refuse_foreign(folder: Path) -> None:
    """Nothing that clusterguard did not write is overwritten."""
    if folder.exists() and not folder.is_dir():
        raise PersistenceError(f"expected a folder, got the file {folder}; choose another name")
    for name, mark in ((CARD, MARK), (CONFIG, f'"format": "{_FORMAT}"')):
        file = folder / name
        if file.exists() and not (file.is_file() and mark in file.read_text(errors="replace")):
            raise PersistenceError(f"{file} is not clusterguard's; choose another folder, or remove that file")


def read_config(file: Path) -> dict[str, Any]:
    """What `config.json` holds, if it is a guard's and of a format that is known."""
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
    """The tensors of `model.safetensors`, if it is the file that this config was saved with."""
    again = "download it or save the guard again"
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise PersistenceError(f"expected {file.name} in {file.parent}, found none; {again}") from error
    except (OSError, MemoryError) as error:
        raise PersistenceError(f"{file} cannot be read ({in_one_line(error)}); {again}") from error
    if hashlib.sha256(content).hexdigest() != config.get("weights_sha256"):
        raise PersistenceError(
            f"{file} is not the file that {CONFIG} was saved with: damaged, cut off, replaced, or from an interrupted "
            f"save; {again}"
        )
    try:
        return load(content)
    except Exception as error:  # safetensors has an error of its own, and passes on Python's
        raise PersistenceError(f"{file} is no safetensors file ({in_one_line(error)}); {again}") from error
