"""Turns an image classifier into an encoder, images (B, C, H, W) -> (B, out_features), and keeps its weights.

The classifier of timm and torchvision models is replaced. Any other module that returns (B, D) gets a linear layer on
top. Neither library is imported here. A model is recognised by the modules in which its class and their bases are
defined, so a user's subclass is recognised too. `_wrappers` removes wrappers around a model.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import dropwhile
from typing import Any, TypeAlias

import torch
from clusterguard._support import check_numbers, copy_backbone, refuse_unusable, shorten
from clusterguard.detectors._wrappers import Normalization, unwrap, warn_of_graph
from clusterguard.errors import ConfigurationError, UnsupportedBackboneError
from einops.layers.torch import Reduce
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

_Dense: TypeAlias = nn.Linear | nn.Conv2d
_AS_THEY_ARE: Normalization = ((0.0,), (1.0,))
_TORCHVISION_HEADS = ("fc", "classifier", "head", "heads")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_COMMON_SIZES = (224, 32, 28, 64, 299, 96, 128, 16, 8, 48, 84, 112, 160, 192, 227, 256, 384, 512)
_PASS_EXAMPLE = "pass example=images, a batch as the backbone will get it"


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
    backbone = unwrap(backbone, _is_model).module
    if not _is_timm(backbone):
        head = _find_torchvision_head(backbone)
        return None if head is None else _width(head[1])
    num_classes = int(getattr(backbone, "num_classes", 0))
    classifier = getattr(backbone, "get_classifier", nn.Identity)()
    layers = _dense_layers(nn.ModuleList(classifier if isinstance(classifier, tuple) else [classifier]))
    # The layer counts more than the attribute, because a user may have replaced it. If the attribute is 0, the layer is
    # not a classifier.
    return _width(layers[-1]) if layers and num_classes else num_classes or None


def choose_num_classes(backbone: nn.Module, num_classes: int | None, *, consequence: str) -> int:
    """The number of classes that the user asked for, or else the number that the backbone has.

    Args:
        backbone: module as in `find_num_classes`.
        num_classes: number K of classes; None takes the number that the backbone has.
        consequence: part of the warning that says what happens if the two numbers differ.

    Raises:
        ConfigurationError: num_classes is no whole number, or it is None and the backbone does not tell it either.
        UnsupportedBackboneError: the backbone is not a module.

    Warns:
        UserWarning: num_classes differs from the number that the backbone has.

    Example:
        >>> choose_num_classes(nn.Flatten(), 10, consequence="")
        10
    """
    if not isinstance(backbone, nn.Module):
        raise UnsupportedBackboneError(
            f"expected a torch.nn.Module that maps images to (B, D), got {type(backbone).__name__}; pass the module "
            "inside it"
        )
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
    normalization = core.normalization or _read_recipe(core.module)
    if normalization is not None:
        return normalization
    lost = next(((model, recipe) for model in _models_inside(core.module) if (recipe := _read_recipe(model))), None)
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
    backbone: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, *, keep: bool = False
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
        UserWarning: as in `find_normalization`, unless both mean and std are passed.

    Example:
        >>> choose_normalization(nn.Flatten(), [0.5], None)
        ([0.5], (1.0,))
    """
    built_in = unwrap(backbone, _is_model).normalization
    if built_in is None or keep:
        is_settled = built_in is not None or (mean is not None and std is not None)
        usual = _AS_THEY_ARE if is_settled else find_normalization(backbone)
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
    if out_features < 1:
        raise ConfigurationError(f"expected a positive out_features, got {out_features}")
    refuse_unusable(backbone)
    encoder = copy_backbone(unwrap(backbone, _is_model).module)
    if any(map(is_lazy, encoder.parameters())):
        _initialize(encoder, example)
    head = _find_torchvision_head(encoder)
    if _is_timm(encoder) or _is_torchvision(encoder):
        _keep_main_output(encoder)
    if _is_timm(encoder) and hasattr(encoder, "reset_classifier"):
        _reset_timm_head(encoder, out_features)
    elif head is not None:
        _replace_torchvision_head(encoder, *head, out_features)
    else:
        _warn_of_classifier(backbone, encoder)
        return _append_layer(encoder, out_features, _blank(image_shape) if example is None else example)
    if example is not None:
        _run(encoder, example)
    return encoder


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a whole model of timm or torchvision, not one of the blocks that their models are made of."""
    if _is_timm(module):
        return hasattr(module, "reset_classifier") or isinstance(getattr(module, "pretrained_cfg", None), dict)
    has_head = any(hasattr(module, name) for name in _TORCHVISION_HEADS)
    return _is_torchvision(module) and (has_head or isinstance(module, GraphModule))  # a feature extractor


def _is_timm(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("timm.") for cls in type(module).__mro__)


def _is_torchvision(module: nn.Module) -> bool:
    homes = (cls.__module__.split(".") for cls in type(module).__mro__)
    home = next((home for home in homes if home[:2] == ["torchvision", "models"]), None)
    return home is not None and home[2] not in {"detection", "optical_flow", "segmentation", "video"}


def _read_recipe(backbone: nn.Module) -> Normalization | None:
    """The normalisation that a model of timm or torchvision was trained with; None for any other module."""
    convolutions = [layer for layer in _dense_layers(backbone) if isinstance(layer, nn.Conv2d)]
    recipe = getattr(backbone, "pretrained_cfg", None) if _is_timm(backbone) else None
    if isinstance(recipe, dict) and recipe.get("mean") and recipe.get("std"):
        mean, std = tuple(map(float, recipe["mean"])), tuple(map(float, recipe["std"]))
    elif _is_torchvision(backbone):
        # A model does not tell which weights it has, but all use ImageNet's values, except for efficientnet_v2_l.
        ends = [tuple(layer.weight.shape[:2]) for layer in convolutions[:1] + convolutions[-1:]]
        mean, std = ((0.5,) * 3,) * 2 if ends == [(32, 3), (1280, 640)] else _IMAGENET
    else:
        return None
    # timm's attribute covers linear patch embeddings, and the layer covers a stem that a user replaced.
    if 1 in (getattr(backbone, "in_chans", None), *(layer.in_channels for layer in convolutions[:1])):
        return (sum(mean) / len(mean),), (sum(std) / len(std),)
    return mean, std


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
            f"{_PASS_EXAMPLE}, or run the backbone on such a batch first"
        )
    _run(encoder, example)


def _width(layer: _Dense) -> int:
    # A user may have replaced the weight and forgotten the attribute, so the weight decides.
    if is_lazy(layer.weight):
        return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return len(layer.weight)


def _dense_layers(module: nn.Module) -> list[_Dense]:
    return [
        layer
        for path, layer in module.named_modules()
        if isinstance(layer, _Dense) and "parametrizations" not in path.split(".")  # layers there compute a weight
    ]


def _last_parameter(module: nn.Module) -> Tensor | None:
    # In a model spread over devices, the last parameter is on the device of the output.
    return next((p for p in reversed(list(module.parameters())) if p.is_floating_point()), None)


def _find_torchvision_head(backbone: nn.Module) -> tuple[nn.Module, _Dense] | None:
    """The head and its last layer; None for a model of another library or task, or without a classifier."""
    for name in _TORCHVISION_HEADS if _is_torchvision(backbone) else ():
        head = getattr(backbone, name, nn.Identity())
        if layers := _dense_layers(head):
            return head, layers[-1]
    return None


def _keep_main_output(encoder: Any) -> None:
    """Keep one output of models that return several in train mode because of auxiliary or distilled heads."""
    for module in encoder.modules():
        if getattr(module, "distilled_training", False):
            module.distilled_training = False
    for name in {"AuxLogits", "aux1", "aux2"}.intersection(encoder._modules):
        setattr(encoder, name, None)
        encoder.aux_logits = False


def _reset_timm_head(encoder: Any, out_features: int) -> None:
    like = _last_parameter(encoder)
    pools = [getattr(owner, "global_pool", None) for owner in (getattr(encoder, "head", None), encoder)]
    # Without pooling, a model that returns its feature map would apply the layer at every position of the map.
    unpooled = "" in [getattr(pool, "pool_type", pool) for pool in pools]
    before = set(encoder.modules())
    encoder.reset_classifier(out_features, *(["avg"] if unpooled else []))
    for module in set(encoder.modules()) - before:
        module.to(like).training = encoder.training


def _replace_torchvision_head(encoder: nn.Module, head: nn.Module, layer: _Dense, out_features: int) -> None:
    fresh, first = _make_layer_like(layer, out_features), _dense_layers(head)[0]
    for path, module in dropwhile(lambda item: item[1] is not layer, list(head.named_modules())):
        # Remove activations after the classifier, such as SqueezeNet's ReLU. Representations scatter around centres
        # whose coordinates are mostly zero, so they must be able to become negative.
        if type(module).__module__ == "torch.nn.modules.activation":
            head.set_submodule(path, nn.Identity().train(module.training))
    _put(encoder, layer, fresh)
    if all(type(part).__module__.split(".")[0] in ("torch", "torchvision") for part in head.modules()):
        return
    # In a user's head, such as an adapter beside its base, the last layer need not be the one that makes the output.
    if not _has_width(encoder, out_features):
        _put(encoder, head, _make_layer_like(first, out_features))
        if not _has_width(encoder, out_features):
            raise UnsupportedBackboneError(
                f"expected a classifier that one linear layer can replace, got {type(head).__name__}; put such a layer "
                "in its place"
            )


def _make_layer_like(layer: _Dense, out_features: int) -> _Dense:
    like = next(layer.parameters())  # a weight computed before each call may be on another device
    options: dict[str, Any] = {"bias": layer.bias is not None, "device": like.device, "dtype": like.dtype}
    fresh: _Dense
    if isinstance(layer, nn.Linear):
        fresh = nn.Linear(layer.weight.shape[1], out_features, **options)
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        fresh = nn.Conv2d(layer.in_channels, out_features, **options, **{name: getattr(layer, name) for name in names})
    fresh.training = layer.training
    return fresh


def _put(encoder: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another one in all places where it occurs."""
    for path, module in list(encoder.named_modules(remove_duplicate=False)):
        if module is old:
            encoder.set_submodule(path, new)


def _has_width(encoder: nn.Module, out_features: int) -> bool:
    try:
        return _find_output(encoder, encoder, None).shape[1] == out_features
    except UnsupportedBackboneError:
        return False


def _blank(image_shape: tuple[int, int, int] | None) -> Tensor | None:
    return None if image_shape is None else torch.zeros(1, *image_shape)


def _append_layer(module: nn.Module, out_features: int, example: Tensor | None) -> nn.Module:
    features, like = nn.Sequential(module), _last_parameter(module)
    if _is_timm(module) and hasattr(module, "forward_features"):  # encoders of vision-language models
        is_map = getattr(module, "output_fmt", "NCHW") == "NCHW"
        features.append(Reduce("b d ... -> b d" if is_map else "b ... d -> b d", "mean"))
    output = _find_output(features, module, example)
    device = getattr(like, "device", None) if example is None else output.device
    features.append(nn.Linear(output.shape[1], out_features, device=device, dtype=output.dtype))
    features.training = features[-1].training = module.training
    return features


def _find_output(features: nn.Module, module: nn.Module, example: Tensor | None) -> Tensor:
    """The output of a module and its optional pooling, `features`, for an example or for blank images that fit."""
    # Two images, because a module that confuses the batch with another axis may work with one.
    dtype = getattr(_last_parameter(module), "dtype", None)
    blanks = (torch.empty(2, *shape, device="meta", dtype=dtype) for shape in _plausible_shapes(module))
    return _probe(features, blanks if example is None else [example])


def _plausible_shapes(module: nn.Module) -> Iterable[tuple[int, ...]]:
    """Shapes (C, H, W) of images that the module may take, the likeliest first."""
    recipe: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    if "input_size" in recipe:  # timm's configuration
        yield getattr(module, "in_chans", 3), *recipe["input_size"][1:]
    first = next(iter(_dense_layers(module)), None)
    if isinstance(first, nn.Linear):
        yield 1, 1, first.in_features  # whatever the image's sides are, if nn.Flatten comes before it
        if first.in_features > 1:
            yield 1, first.in_features, 1  # fits too, so that no further shape has to be tried
    channels = (first.in_channels,) if isinstance(first, nn.Conv2d) else (3, 1)
    yield from ((channel, size, size) for size in _COMMON_SIZES for channel in channels)


def _probe(module: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The output for the first batch that fits. A second batch that fits must give the same width."""
    outputs: list[Tensor] = []
    failures: list[UnsupportedBackboneError] = []
    for images in batches:
        try:
            outputs.append(_run(module, images))
        except UnsupportedBackboneError as error:
            failures.append(error)
        if len(outputs) == 2:
            break
    if not outputs:  # an output of a wrong kind is a better message than an image size that does not fit
        raise next((failure for failure in failures if failure.__cause__ is None), failures[0])
    widths = [output.shape[1] for output in outputs]
    if widths[0] != widths[-1]:
        raise UnsupportedBackboneError(f"expected one D for all image sizes, got {widths}; {_PASS_EXAMPLE}")
    return outputs[0]


def _run(module: nn.Module, images: Tensor) -> Tensor:
    """The module's output (B, D) in eval mode. The module itself, its modes and its buffers do not change."""
    expected = f"expected floating-point features ({len(images)}, D) for images {tuple(images.shape)}"
    # The copy shares the parameters. On the meta device it gets empty ones, which need no memory and no arithmetic.
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    try:
        if images.is_meta:
            tensors = [*module.parameters(), *module.buffers()]
            memo = {id(t): nn.Parameter(torch.empty_like(t, device="meta"), False) for t in tensors}
        shadow = copy.deepcopy(module, memo)
        for submodule in shadow.modules():
            submodule.training = False  # not eval(), which some modules override to change their weights
        with torch.no_grad():
            output = shadow(images)
    except Exception as error:
        raise UnsupportedBackboneError(f"{expected}, got {shorten(error)}; {_PASS_EXAMPLE}") from error
    if isinstance(output, Tensor) and output.is_floating_point() and output.shape[:-1] == images.shape[:1]:
        return output
    got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise UnsupportedBackboneError(
        f"{expected}, got {got}; wrap the backbone so that it picks or pools its output, such as "
        "nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten())"
    )
