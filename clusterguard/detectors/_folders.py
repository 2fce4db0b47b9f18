"""Saves a guard as a folder of safetensors, JSON and a model card, and loads it.

Nothing is pickled, and a folder that is incomplete is refused. Users call `ClusterGuard.save_pretrained` and
`from_pretrained`.
"""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from clusterguard._support import no_warnings
from clusterguard.detection import Calibration
from clusterguard.detectors._backbone_recipes import at_most, build_backbone
from clusterguard.detectors._base import DetectorModule
from clusterguard.detectors._guard_files import (
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    WEIGHTS,
    WeightsFile,
    check_overwritable,
    read_config,
    read_guard,
    write_guard,
)
from clusterguard.detectors._model_card import CardDetails, EvaluationForCard, model_card
from clusterguard.detectors._records import check_evaluated
from clusterguard.errors import ConfigurationError, PersistenceError, UnsupportedBackboneError, in_one_line
from safetensors.torch import save
from torch import Tensor, nn

Loaded = TypeVar("Loaded", bound=DetectorModule)

_SPARE_ROOM = 2**28  # bytes that a network may take beyond those of its saved weights
_PACKAGES = ("clusterguard", "torch", "timm", "torchvision", "safetensors")
_FLOATS = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def save_guard(
    guard: DetectorModule,
    folder: Path,
    *,
    backbone: Mapping[str, Any],
    options: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    evaluation: EvaluationForCard | None = None,
    card: CardDetails | None = None,
) -> None:
    """Write a guard; see `ClusterGuard.save_pretrained`.

    Args:
        guard: guard whose state dict is saved.
        folder: folder to write to.
        backbone: recipe that `describe_backbone` returned.
        options: further options of the guard, as plain values. `load_guard` passes them to its `build`.
        training: record of the training, saved unchanged.
        evaluation: evaluation of the guard with its present thresholds and weights.
        card: details that the publisher adds to the model card.

    Raises:
        PersistenceError: the folder holds another program's files.
        ConfigurationError: JSON cannot represent the training, thresholds are not of float32, or the evaluation is of
            other thresholds or weights.
    """
    check_overwritable(folder)
    if guard.thresholds.dtype != torch.float32:
        raise ConfigurationError(
            f"expected thresholds of float32, got {guard.thresholds.dtype}; set guard.thresholds to "
            "guard.thresholds.float()"
        )
    if evaluation is not None:
        check_evaluated(guard, evaluation)
    try:
        json.dumps(training, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"expected training to hold what JSON has, got {error}; write None for NaN and repr(...) for objects"
        ) from error
    weights = save(
        {name: value.detach().to("cpu", copy=True).contiguous() for name, value in guard.state_dict().items()}
    )
    record = guard.current_record()
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
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
    calibrated = bool(guard.thresholds.isfinite().all())
    text = model_card(config, calibrated=calibrated, calibration=record, evaluation=evaluation, details=card)
    write_guard(folder, config, weights, text)


def load_guard(
    build: Callable[[nn.Module, Mapping[str, Any]], Loaded], folder: Path, *, backbone: nn.Module | None = None
) -> Loaded:
    """Read a guard; see `ClusterGuard.from_pretrained`.

    Args:
        build: function that makes the guard from its backbone and from the options that `save_guard` wrote, such as
            `image_shape`.
        folder: folder that `save_guard` wrote.
        backbone: module that the guard was made with; None rebuilds it from its recipe.

    Raises:
        PersistenceError: the guard is missing, damaged, foreign, too new, or does not fit the backbone.

    Warns:
        UserWarning: thresholds are infinite; the guard is then not calibrated.
    """
    guard = read_guard(folder, lambda config, weights: _load(build, config, weights, folder, backbone))
    drop_infinite_thresholds(guard, folder)
    return guard


def check_saved(guard: DetectorModule, folder: Path) -> None:
    """Check that a folder holds a guard as it is now, with the same weights and thresholds.

    Args:
        guard: guard that was saved to the folder or loaded from it.
        folder: folder that `save_guard` wrote.

    Raises:
        ConfigurationError: the folder holds other weights or thresholds.
        PersistenceError: the folder holds no guard, or a damaged one.
    """
    saved = read_guard(folder, lambda _, weights: weights.read())
    now = {name: value.cpu() for name, value in guard.state_dict().items()}
    if saved.keys() != now.keys() or not all(_are_same(saved[name], value) for name, value in now.items()):
        raise ConfigurationError(
            f"expected the folder in which this guard is saved, got {folder} with other weights or thresholds, perhaps "
            "because it was saved again meanwhile; load that guard and evaluate it, or save this one"
        )


def _are_same(saved: Tensor, value: Tensor) -> bool:
    widest = torch.promote_types(saved.dtype, value.dtype)
    return saved.shape == value.shape and torch.equal(saved.to(widest), value.to(widest))


def drop_infinite_thresholds(detector: DetectorModule, path: str | Path) -> None:
    """Make a detector that was read from a file uncalibrated if one of its thresholds is infinite.

    Args:
        detector: the detector.
        path: where it was read from.

    Warns:
        UserWarning: a threshold is infinite.
    """
    if detector.thresholds.isinf().any():
        detector.reset_calibration()
        warnings.warn(
            f"expected finite thresholds in {path}, got infinite ones, which judge nothing; the detector is not "
            "calibrated, fit its thresholds with Calibrator",
            stacklevel=4,
        )


class OtherHeadError(ConfigurationError):
    """A guard was saved with another head than it is loaded with."""


def _load(
    build: Callable[[nn.Module, Mapping[str, Any]], Loaded],
    config: Mapping[str, Any],
    weights: WeightsFile,
    folder: Path,
    backbone: nn.Module | None,
) -> Loaded:
    try:
        recipe, options, blanks = config["backbone"], config["guard"], weights.blanks()
        if backbone is None and recipe["source"] == "module":
            raise PersistenceError(
                f"{folder / CONFIG} has no recipe for its backbone, a {_printable(recipe['type'])}; build that module "
                "as it was when the guard was made (its weights do not matter) and pass backbone=module"
            )
        # The random weights are overwritten, so drawing them must not change the user's random state. Warnings were
        # already given when the guard was made.
        with torch.random.fork_rng(devices=[]), no_warnings.on():
            _check_sizes(options, blanks)
            if backbone is None:
                _check_recipe(build, recipe, options, blanks)
            else:
                _check_backbone(build, backbone, options, blanks)
            guard = build(build_backbone(recipe) if backbone is None else backbone, options)
        guard = guard.to(_FLOATS[options["dtype"]])
        _take_dtypes(guard, blanks)
        guard.load_state_dict(blanks)  # checks names and shapes before the values take memory
        guard.load_state_dict(weights.read())
        guard.class_names = options.get("class_names")
        if config["calibration"] is not None:
            guard.calibration = Calibration.from_dict(config["calibration"], guard.thresholds)
    except PersistenceError:
        raise
    except OtherHeadError as error:
        weights.check_digest()  # raises another error if the file is damaged
        sentence = in_one_line(error).removeprefix(
            f"{type(error).__name__}: "
        )  # the message quotes names from the config
        raise PersistenceError(f"{folder / CONFIG}: {sentence}") from error
    except Exception as error:  # an edited config or another version of timm may raise anything
        if isinstance(error, UnsupportedBackboneError) and backbone is not None:
            raise
        weights.check_digest()  # raises another error if the file is damaged
        hint = f"backbone={type(backbone).__name__}" if backbone is not None else f"what {CONFIG} describes"
        raise PersistenceError(
            f"{folder / WEIGHTS} does not fit {hint}; pass the module that the guard was made with as backbone=, or "
            f"use the package versions that {CONFIG} lists. What went wrong: {in_one_line(error)}"
        ) from error
    return guard


def _check_sizes(options: Mapping[str, Any], blanks: Mapping[str, Tensor]) -> None:
    """Check that the numbers of classes and dimensions fit the weights, or a large number could use up the memory."""
    classes, dimensions = options["num_classes"], options.get("representation_dim")
    thresholds = blanks.get("thresholds", torch.empty(0))
    if thresholds.shape != (classes,) or thresholds.dtype != torch.float32:
        raise ConfigurationError(
            f"expected thresholds of float32 for num_classes={classes!r:.20}, got {thresholds.dtype} of "
            f"{tuple(thresholds.shape)}"
        )
    if dimensions is not None and not any(dimensions in blank.shape for blank in blanks.values()):
        raise ConfigurationError(f"expected weights for representation_dim={dimensions!r:.20}, got none")


def _check_recipe(
    build: Callable[[nn.Module, Mapping[str, Any]], DetectorModule],
    recipe: Mapping[str, Any],
    options: Mapping[str, Any],
    blanks: Mapping[str, Tensor],
) -> None:
    """Check that a recipe makes a network that the saved weights fit.

    The network is built on the meta device, where tensors take no memory.
    """
    with torch.device("meta"), at_most(1000 + 20 * len(blanks)):
        backbone = build_backbone(recipe)
        guard = build(backbone, options)
    guard.load_state_dict(blanks)
    # The file lacks the old classifier of the backbone, and tensors that can be computed, so these need some room.
    room = _SPARE_ROOM + 4 * sum(blank.nbytes for blank in blanks.values())
    for module in (backbone, guard):
        size = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
        if size > room:
            raise ConfigurationError(f"expected a network of at most {room} bytes, as its weights have, got {size}")


def _check_backbone(
    build: Callable[[nn.Module, Mapping[str, Any]], DetectorModule],
    backbone: nn.Module,
    options: Mapping[str, Any],
    blanks: Mapping[str, Tensor],
) -> None:
    """Check on the meta device that a guard of this backbone fits the saved weights, before its new layer takes memory.

    A backbone that cannot be built there, for instance because its code names a device, is not checked.
    """
    values = [*backbone.parameters(), *backbone.buffers()]
    with torch.device("meta"):
        try:
            without_values: dict[int, Any] = {
                id(value): nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
                if isinstance(value, nn.Parameter)
                else torch.empty_like(value, device="meta")
                for value in values
            }
            guard = build(copy.deepcopy(backbone, without_values), options)
        except OtherHeadError:
            raise
        except Exception:  # a user's module may raise anything
            return
    guard.load_state_dict(blanks)


def _take_dtypes(guard: nn.Module, blanks: Mapping[str, Tensor]) -> None:
    """Give each tensor of a guard the data type of its saved values, which may differ from part to part.

    Raises:
        ConfigurationError: one of the two data types is not a floating-point type.
    """
    for name, tensor in guard.state_dict(keep_vars=True).items():
        wanted = blanks[name].dtype if name in blanks else tensor.dtype
        if wanted != tensor.dtype and not (wanted.is_floating_point and tensor.is_floating_point()):
            raise ConfigurationError(f"expected {tensor.dtype} for {name}, got {wanted}")
        tensor.data = tensor.data.to(wanted)


def _printable(text: object) -> str:
    return "".join(filter(str.isprintable, str(text)[:100]))


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
        small = snapshot_download(str(name), allow_patterns=[CONFIG], **hub_options)
        read_config(Path(small) / CONFIG)  # fails before gigabytes that are no guard are downloaded
        return Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG], **hub_options))
    except PersistenceError:
        raise
    except Exception as error:  # the Hub's errors have no common base class
        raise PersistenceError(
            f"expected a folder, or a guard's id on the Hugging Face Hub, got {str(name)!r}: there is no such folder "
            f"in {Path.cwd()}, and the Hub says: {in_one_line(error)}"
        ) from error


def _may_be_on_the_hub(name: str | Path) -> bool:
    """Whether a name can be an id such as "owner/guard", and is not clearly a path."""
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith((".", "~", "/")) or text.endswith("/") or "\\" in text
    return not is_path and text.count("/") <= 1
