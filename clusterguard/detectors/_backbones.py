"""Turns an image classifier into an encoder, images (B, C, H, W) -> (B, out_features), and keeps its weights.

The classifier of timm, torchvision and transformers models is replaced. Any other module that returns (B, D) gets a
linear layer on top. `_families` tells what differs between these kinds of modules, and `_wrappers` removes wrappers
around a model.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from clusterguard._support import check_numbers, copy_backbone, refuse_unusable
from clusterguard.detectors._dense_layers import is_in_users_module, last_parameter, take_over
from clusterguard.detectors._families import family_of
from clusterguard.detectors._family import Replacement
from clusterguard.detectors._outputs import PASS_EXAMPLE, find_output, run_once
from clusterguard.detectors._wrappers import Normalization, unwrap, warn_of_graph
from clusterguard.errors import ConfigurationError, UnsupportedBackboneError
from einops import repeat
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_AS_THEY_ARE: Normalization = ((0.0,), (1.0,))


def find_num_classes(backbone: nn.Module) -> int | None:
    """Find how many classes a backbone distinguishes now.

    Args:
        backbone: timm model, torchvision classification model, such a model in wrappers that compute the same, or any
            other module.

    Returns:
        The number K of classes, which is the width of the classifier; None for a model without a classifier and for any
        other module.

    Example:
        >>> from torchvision.models import resnet18
        >>> find_num_classes(resnet18(num_classes=10))
        10
    """
    model = unwrap(backbone, _is_model).module
    return family_of(model).num_classes(model)


def find_class_names(backbone: nn.Module, num_classes: int) -> list[str] | None:
    """The names of the classes of a backbone.

    Args:
        backbone: module as in `find_num_classes`.
        num_classes: number K of classes of the guard.

    Returns:
        K names; None if the backbone has none, or has another number of them.
    """
    model = unwrap(backbone, _is_model).module
    names = family_of(model).class_names(model)
    return names if names and len(names) == num_classes else None


def choose_num_classes(backbone: nn.Module, num_classes: int | None, *, consequence: str) -> int:
    """The number of classes that the user asked for, or else the number that the backbone has.

    Args:
        backbone: module as in `find_num_classes`.
        num_classes: number K of classes; None takes the number that the backbone has.
        consequence: part of the warning that says what happens if the two numbers differ.

    Raises:
        ConfigurationError: num_classes is no whole number, or it is None and cannot be found in the backbone either.
        UnsupportedBackboneError: the backbone is not a module.

    Warns:
        UserWarning: num_classes differs from the number that the backbone has.

    Example:
        >>> choose_num_classes(nn.Flatten(), 10, consequence="")
        10
    """
    check_module(backbone)
    built_in = find_num_classes(backbone)
    if num_classes is None:
        if built_in is not None:
            return built_in
        model = next((part for part in _models_inside(backbone) if find_num_classes(part)), None)
        where = "" if model is None else f", or the {type(model).__name__} inside it as the backbone"
        raise ConfigurationError(f"this backbone does not tell its number of classes; pass num_classes{where}")
    check_numbers(whole=True, num_classes=num_classes)
    if built_in not in (None, num_classes):
        warnings.warn(
            f"expected num_classes={built_in}, as the backbone's own classifier has, got {num_classes}; {consequence}",
            stacklevel=3,
        )
    return num_classes


def check_module(backbone: object) -> None:
    """Check that a backbone is a module.

    Raises:
        UnsupportedBackboneError: it is something else, such as a class or a function that makes a module.
    """
    if not isinstance(backbone, nn.Module):
        advice = (
            "call it if it makes a model, such as resnet18()" if callable(backbone) else "pass the module inside it"
        )
        raise UnsupportedBackboneError(
            f"expected a torch.nn.Module that maps images to (B, D), got {type(backbone).__name__}; {advice}"
        )


def find_normalization(backbone: nn.Module) -> Normalization:
    """Find the mean and standard deviation with which a backbone expects pixels in [0, 1] to be normalised.

    Args:
        backbone: timm model, torchvision classification model, such a model in wrappers that compute the same, or any
            other module.

    Returns:
        Mean and standard deviation, one value per channel. A model rebuilt for one channel gets the averages of the
        three values it was trained with. An `nn.Sequential` of a normalisation and a model gives the values of this
        normalisation, which `make_encoder` leaves out. Any other module is assumed to take pixels as they are, with
        mean 0 and standard deviation 1.

    Warns:
        UserWarning: a model inside the backbone expects a normalisation, but the module around this model may do more
            than call it; or the backbone is a graph that was recorded from a model.

    Example:
        >>> find_normalization(nn.Flatten())
        ((0.0,), (1.0,))
    """
    core = unwrap(backbone, _is_model)
    normalization = core.normalization or _normalization_of(core.module)
    if normalization is not None:
        return normalization
    inside = ((model, _normalization_of(model)) for model in _models_inside(core.module))
    lost = next(((model, trained) for model, trained in inside if trained is not None), None)
    if lost is not None:
        mean, std = lost[1]
        _warn_of_loss(
            "normalisation",
            backbone,
            lost[0],
            f"images reach it as they are. Pass mean={list(mean)} and std={list(std)}, or mean=[0.0] and std=[1.0] if "
            "the backbone normalises images itself",
        )
    else:
        what_to_do = "pass the mean= and std= that it expects, [0.0] and [1.0] if it normalises images itself"
        warn_of_graph("normalisation", core.module, f"images reach it as they are; {what_to_do}")
    return _AS_THEY_ARE


def choose_normalization(
    backbone: nn.Module,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    *,
    keep: bool = False,
) -> tuple[Sequence[float], Sequence[float]]:
    """The normalisation that the user asked for, or else the one that the backbone expects.

    Args:
        backbone: module as in `find_normalization`.
        mean: mean, one value or one per channel; None takes what the backbone expects.
        std: standard deviation, one value or one per channel; None takes what the backbone expects.
        keep: whether the backbone is used unchanged, including a normalisation inside it. False means that
            `make_encoder` will remove that normalisation.

    Returns:
        Mean and standard deviation.

    Raises:
        ConfigurationError: mean or std differs from the normalisation in front of the model in an `nn.Sequential`.

    Warns:
        UserWarning: as in `find_normalization`, unless both mean and std are passed; or one of them is passed, and the
            other one is that of the library.

    Example:
        >>> choose_normalization(nn.Flatten(), [0.5], None)
        ([0.5], (1.0,))
    """
    mean, std = ([value] if isinstance(value, int | float) else value for value in (mean, std))
    built_in = unwrap(backbone, _is_model).normalization
    if built_in is None or keep:
        is_settled = built_in is not None or (mean is not None and std is not None)
        usual = _AS_THEY_ARE if is_settled else find_normalization(backbone)
        _warn_of_half(mean, std, usual)
        return usual[0] if mean is None else mean, usual[1] if std is None else std
    for usual in (built_in, _AS_THEY_ARE):
        if all(asked is None or _are_close(asked, values) for asked, values in zip((mean, std), usual, strict=True)):
            return built_in
    raise ConfigurationError(
        f"expected no mean and std for a {type(backbone).__name__} that normalises its images itself (mean "
        f"{list(built_in[0])}, std {list(built_in[1])}), got {mean} and {std}; leave them out, or pass the model "
        "without its normalisation"
    )


def make_encoder(
    backbone: nn.Module,
    out_features: int,
    *,
    example: Tensor | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Copy a backbone into a module that maps images to representations through a new last layer.

    Args:
        backbone: timm model, torchvision classification model, such a model in wrappers that compute the same, or any
            module that maps images to (B, D). It is not changed. The copy keeps every weight except those of the
            classifier. It leaves out the wrappers, and the normalisation that `find_normalization` finds in them.
        out_features: width m of the representation.
        example: (B, C, H, W) images that the backbone takes, to find out what it returns for them. They are needed only
            for a module whose D depends on the image size, or that cannot run on torch's meta device.
        image_shape: (C, H, W) of the images if there is no example. A blank image of this shape is used instead.

    Returns:
        A module that maps (B, C, H, W) to (B, m), in train mode too. Its last layer has the device, dtype and mode of
        the layer that it replaces. Its weight is a plain parameter, even if the replaced weight was reparametrised.

    Raises:
        ConfigurationError: out_features is not positive.
        UnsupportedBackboneError: the backbone returns no (B, D) tensor, D cannot be found without an example, or the
            weights are quantised, spread over processes, or not initialised.

    Warns:
        UserWarning: a model inside the backbone has a classifier, but the module around this model may do more than
            call it; or the backbone is a graph that was recorded from a model.

    Example:
        >>> encoder = make_encoder(nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU()), 10)
        >>> encoder(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return adapt_backbone(backbone, out_features, example=example, image_shape=image_shape).encoder


class KeptLogits(NamedTuple):
    """The initial outputs of a new last layer, which are the logits of the backbone times a scale.

    An offset that all logits share is left out. With l·K outputs, each of the K logits is repeated l times.
    """

    num_classes: int
    scale: float


class Adapted(NamedTuple):
    """An encoder, whether its backbone had a classifier, and whether it returns the logits of that classifier."""

    encoder: nn.Module
    had_classifier: bool
    keeps_logits: bool


def adapt_backbone(
    backbone: nn.Module,
    out_features: int,
    *,
    keep: KeptLogits | None = None,
    example: Tensor | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Adapted:
    """Copy a backbone into an encoder, as `make_encoder` does, and let it return the old logits if that is possible.

    Args:
        backbone: module as in `make_encoder`.
        out_features: width m of the representation.
        keep: logits that the new layer returns at first; None draws its weights.
        example: images as in `make_encoder`.
        image_shape: shape as in `make_encoder`.

    Returns:
        The encoder. A module that belongs to no family is taken for a classifier if it returns K numbers.

    Raises:
        ConfigurationError: as in `make_encoder`.
        UnsupportedBackboneError: as in `make_encoder`.

    Warns:
        UserWarning: as in `make_encoder`.

    Example:
        >>> classifier, images = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), torch.rand(2, 1, 28, 28)
        >>> encoder = adapt_backbone(classifier, 10, keep=KeptLogits(10, scale=2.0)).encoder
        >>> torch.equal(encoder(images).argmax(dim=1), classifier(images).argmax(dim=1))
        True
    """
    if out_features < 1:
        raise ConfigurationError(f"expected a positive out_features, got {out_features}")
    refuse_unusable(backbone)
    encoder = copy_backbone(unwrap(backbone, _is_model).module)
    if any(map(is_lazy, encoder.parameters())):
        _initialize(encoder, example)
    family = family_of(encoder)
    family.keep_main_output(encoder)
    classes = family.num_classes(encoder)
    replaced = family.replace_classifier(encoder, out_features)
    if replaced is None:
        layered = _append_layer(encoder, out_features, _blank(image_shape) if example is None else example)
        last = layered[-1]
        if keep is not None and isinstance(last, nn.Linear) and last.in_features == keep.num_classes:
            _repeat_inputs(last, keep.scale)
            return Adapted(layered, had_classifier=True, keeps_logits=True)
        _warn_of_classifier(backbone, encoder)
        return Adapted(layered, had_classifier=False, keeps_logits=False)
    keeps = keep is not None and classes == keep.num_classes and _take_over_all(encoder, replaced, keep.scale)
    encoder = family.as_function(encoder)
    if example is not None:
        run_once(encoder, example)
    return Adapted(encoder, had_classifier=True, keeps_logits=keeps)


def _take_over_all(encoder: nn.Module, replaced: Replacement, scale: float) -> bool:
    """Let new layers compute what the old ones did, times a scale. Those in a user's head must not change at all."""
    return bool(replaced) and all(
        take_over(old, new, scale, exactly=is_in_users_module(new, encoder)) for old, new in replaced
    )


def _repeat_inputs(layer: nn.Linear, scale: float) -> None:
    """Set a linear layer to return (inputs − their mean) · scale, with each input repeated to fill the outputs."""
    with torch.no_grad():
        identity = torch.eye(layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
        layer.weight.copy_(
            scale
            * repeat(identity - 1 / layer.in_features, "k j -> (k l) j", l=layer.out_features // layer.in_features)
        )
        layer.bias.zero_()


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a whole model of a family, not one of the blocks that models are made of."""
    return family_of(module).is_model(module)


def _normalization_of(model: nn.Module) -> Normalization | None:
    """The normalisation that a model was trained with; None if it is unknown."""
    return family_of(model).normalization(model)


def _warn_of_half(
    mean: float | Sequence[float] | None, std: float | Sequence[float] | None, usual: Normalization
) -> None:
    """Warn if one of mean and std was passed and is not the library's, while the other one stays the library's."""
    passed, default = (mean, usual[0]) if std is None else (std, usual[1])
    if (mean is None) is (std is None) or usual == _AS_THEY_ARE or _are_close(passed, default):  # type: ignore[arg-type]
        return
    names, kept = (("mean", "std"), usual[1]) if std is None else (("std", "mean"), usual[0])
    warnings.warn(
        f"{names[0]} was passed without {names[1]}, so {names[1]} stays that of the library, {list(kept)}; pass "
        "both as the model was trained with",
        stacklevel=4,
    )


def _are_close(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two sequences are the same normalisation. A single value stands for all channels."""
    length = max(len(values), len(others))
    if {len(values), len(others)} - {1, length}:
        return False
    stretched = (side if len(side) == length else side * length for side in (tuple(values), tuple(others)))
    return all(math.isclose(*pair, rel_tol=1e-6, abs_tol=1e-6) for pair in zip(*stretched, strict=True))


def _models_inside(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if part is not module and _is_model(part))


def _warn_of_classifier(backbone: nn.Module, core: nn.Module) -> None:
    lost = next(((model, classes) for model in _models_inside(core) if (classes := find_num_classes(model))), None)
    if lost is not None:
        _warn_of_loss(
            "classifier",
            backbone,
            lost[0],
            f"its classifier of {lost[1]} classes stays inside, and a new layer follows it. Pass the "
            f"{type(lost[0]).__name__} itself, or remove that classifier",
        )
    else:
        warn_of_graph("classifier", core, "a new layer follows its output; pass a graph without a classifier")


def _warn_of_loss(lost: str, backbone: nn.Module, model: nn.Module, consequence: str) -> None:
    kinds = type(backbone).__name__, type(model).__name__
    warnings.warn(
        f"{lost} not found inside {kinds[0]}: it may do more than pass its images to the {kinds[1]} inside and return "
        f"the output of that, so it stays as it is and {consequence}",
        stacklevel=5,
    )


def _initialize(encoder: nn.Module, example: Tensor | None) -> None:
    """Run the encoder once, so that lazy layers get their weights."""
    if example is None:
        paths = [name for name, weight in encoder.named_parameters() if is_lazy(weight)]
        raise UnsupportedBackboneError(
            f"expected a backbone whose weights are initialised, got lazy ones that are not ({', '.join(paths)}); "
            f"{PASS_EXAMPLE}, or run the backbone on such a batch first"
        )
    run_once(encoder, example)


def _blank(image_shape: tuple[int, int, int] | None) -> Tensor | None:
    return None if image_shape is None else torch.zeros(1, *image_shape)


def _append_layer(module: nn.Module, out_features: int, example: Tensor | None) -> nn.Sequential:
    features, like = nn.Sequential(module), last_parameter(module)
    family = family_of(module)
    if (pooling := family.pooling(module)) is not None:
        features.append(pooling)
    output = find_output(features, module, example, usual=family.image_shape(module))
    device = getattr(like, "device", None) if example is None else output.device
    features.append(nn.Linear(output.shape[1], out_features, device=device, dtype=output.dtype))
    features.training = features[-1].training = module.training
    return features
