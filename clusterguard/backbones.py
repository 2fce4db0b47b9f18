"""Turns an image classifier into an encoder: images (B, C, H, W) -> (B, out_features), its weights kept.

Models of timm and torchvision lose their classifier; any other module that returns (B, D) gets a linear layer
on top. Neither library is imported here: the modules in which a model's classes are defined tell where it
comes from, so a user's subclass is recognised too.
"""

import copy
from collections.abc import Iterable
from itertools import dropwhile
from typing import Any, TypeAlias

import torch
from clusterguard.errors import ConfigurationError, UnsupportedBackboneError
from einops.layers.torch import Reduce
from torch import Tensor, nn

_Dense: TypeAlias = nn.Linear | nn.Conv2d
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_COMMON_SIZES = (224, 32, 28, 64, 299, 96, 128, 16, 8, 48, 84, 112, 160, 192, 227, 256, 384, 512)
_PASS_EXAMPLE = "pass example=images, a batch as the backbone will get it"


def find_num_classes(backbone: nn.Module) -> int | None:
    """Read off how many classes the backbone tells apart now.

    Args:
        backbone: a timm model, a torchvision classification model, or any other module.

    Returns:
        K, the width of its classifier; None where it has none, and for any other module.

    Example:
        >>> from torchvision.models import resnet18
        >>> find_num_classes(resnet18(num_classes=10))
        10
    """
    if not _is_timm(backbone):
        head = _find_torchvision_head(backbone)
        return None if head is None else len(head[1].weight)
    num_classes = int(getattr(backbone, "num_classes", 0))
    classifier = getattr(backbone, "get_classifier", nn.Identity)()
    layers = _dense_layers(nn.ModuleList(classifier if isinstance(classifier, tuple) else [classifier]))
    # The layer has the last word, for its owner may have replaced it; without classes it does not classify.
    return len(layers[-1].weight) if layers and num_classes else num_classes or None


def find_normalization(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Find the mean and standard deviation by which the backbone expects pixels in [0, 1] to be normalised.

    Args:
        backbone: a timm model, a torchvision classification model, or any other module.

    Returns:
        Mean and standard deviation, one value a channel; for a model rebuilt for one channel, the averages of
        its recipe's three. Any other module is taken to want its pixels as they are: zero and one.

    Example:
        >>> find_normalization(nn.Flatten())
        ((0.0,), (1.0,))
    """
    convolutions = [layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d)]
    recipe = getattr(backbone, "pretrained_cfg", None) if _is_timm(backbone) else None
    if isinstance(recipe, dict) and recipe.get("mean") and recipe.get("std"):
        mean, std = tuple(map(float, recipe["mean"])), tuple(map(float, recipe["std"]))
    elif _is_torchvision(backbone):
        # A model does not tell its weights, but they share ImageNet's values, except for efficientnet_v2_l.
        ends = [tuple(layer.weight.shape[:2]) for layer in convolutions[:1] + convolutions[-1:]]
        mean, std = ((0.5,) * 3,) * 2 if ends == [(32, 3), (1280, 640)] else _IMAGENET
    else:
        return (0.0,), (1.0,)
    # timm's attribute knows of linear patch embeddings, the layer of a stem that the model's owner replaced.
    if 1 in (getattr(backbone, "in_chans", None), *(layer.in_channels for layer in convolutions[:1])):
        return (sum(mean) / len(mean),), (sum(std) / len(std),)
    return mean, std


def make_encoder(backbone: nn.Module, out_features: int, *, example: Tensor | None = None) -> nn.Module:
    """Copy a backbone into a module that maps images to representations, through a fresh last layer.

    Args:
        backbone: a timm model, a torchvision classification model, or any module that maps images to (B, D).
            It stays as it is; the copy keeps every weight but the classifier's.
        out_features: m, the width of the representation.
        example: (B, C, H, W) images that the backbone takes, to see what it returns for them. Needed only for
            a module whose D depends on the image size, or that cannot run on torch's meta device.

    Returns:
        A module that maps (B, C, H, W) to (B, m), in train mode too. Its last layer has the device, dtype and
        mode of the layer it replaces.

    Raises:
        ConfigurationError: out_features is not positive.
        UnsupportedBackboneError: the backbone returns no (B, D) tensor, or D takes an example to find.

    Example:
        >>> encoder = make_encoder(nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU()), 10)
        >>> encoder(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if out_features < 1:
        raise ConfigurationError(f"expected a positive out_features, got {out_features}")
    encoder = copy.deepcopy(backbone)
    head = _find_torchvision_head(encoder)
    if _is_timm(encoder) or _is_torchvision(encoder):
        _keep_main_output(encoder)
    if _is_timm(encoder) and hasattr(encoder, "reset_classifier"):
        _reset_timm_head(encoder, out_features)
    elif head is not None:
        _widen_torchvision_head(*head, out_features)
    else:
        return _append_layer(encoder, out_features, example)
    if example is not None:
        _run(encoder, example)
    return encoder


def _is_timm(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("timm.") for cls in type(module).__mro__)


def _is_torchvision(module: nn.Module) -> bool:
    homes = (cls.__module__.split(".") for cls in type(module).__mro__)
    home = next((home for home in homes if home[:2] == ["torchvision", "models"]), None)
    return home is not None and home[2] not in {"detection", "optical_flow", "segmentation", "video"}


def _dense_layers(module: nn.Module) -> list[_Dense]:
    return [layer for layer in module.modules() if isinstance(layer, _Dense)]


def _last_parameter(module: nn.Module) -> Tensor | None:
    # The last, for in a model spread over devices it lies where the output does.
    return next((p for p in reversed(list(module.parameters())) if p.is_floating_point()), None)


def _find_torchvision_head(backbone: nn.Module) -> tuple[nn.Module, _Dense] | None:
    """The head and its last layer; None in a model of another library or task, or without a classifier."""
    for name in ("fc", "classifier", "head", "heads") if _is_torchvision(backbone) else ():
        head = getattr(backbone, name, nn.Identity())
        if layers := _dense_layers(head):
            return head, layers[-1]
    return None


def _keep_main_output(encoder: Any) -> None:
    """Auxiliary and distilled heads make models return several outputs in train mode; leave one."""
    for module in encoder.modules():
        if getattr(module, "distilled_training", False):
            module.distilled_training = False
    for name in {"AuxLogits", "aux1", "aux2"}.intersection(encoder._modules):
        setattr(encoder, name, None)
        encoder.aux_logits = False


def _reset_timm_head(encoder: Any, out_features: int) -> None:
    like = _last_parameter(encoder)
    pools = [getattr(owner, "global_pool", None) for owner in (getattr(encoder, "head", None), encoder)]
    # A model made to return its feature map would otherwise get the layer at every position of that map.
    unpooled = "" in [getattr(pool, "pool_type", pool) for pool in pools]
    before = set(encoder.modules())
    encoder.reset_classifier(out_features, *(["avg"] if unpooled else []))
    for module in set(encoder.modules()) - before:
        module.to(like).training = encoder.training


def _widen_torchvision_head(head: nn.Module, layer: _Dense, out_features: int) -> None:
    layer.weight = nn.Parameter(layer.weight.new_empty(out_features, *layer.weight.shape[1:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(out_features))
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", out_features)
    layer.reset_parameters()
    for path, module in dropwhile(lambda item: item[1] is not layer, list(head.named_modules())):
        # SqueezeNet's ReLU after its classifier, say. Representations scatter around centres most of whose
        # coordinates are zero, so they must be able to go negative.
        if type(module).__module__ == "torch.nn.modules.activation":
            head.set_submodule(path, nn.Identity().train(module.training))


def _append_layer(module: nn.Module, out_features: int, example: Tensor | None) -> nn.Module:
    features, like = nn.Sequential(module), _last_parameter(module)
    if _is_timm(module) and hasattr(module, "forward_features"):  # encoders of vision-language models
        is_map = getattr(module, "output_fmt", "NCHW") == "NCHW"
        features.append(Reduce("b d ... -> b d" if is_map else "b ... d -> b d", "mean"))
    # Two images, for a module that confuses the batch with another axis may get away with one.
    shapes, dtype = _plausible_shapes(module), getattr(like, "dtype", None)
    blanks = (torch.empty(2, *shape, device="meta", dtype=dtype) for shape in shapes)
    output = _probe(features, blanks if example is None else [example])
    device = getattr(like, "device", None) if example is None else output.device
    features.append(nn.Linear(output.shape[1], out_features, device=device, dtype=output.dtype))
    features.training = features[-1].training = module.training
    return features


def _plausible_shapes(module: nn.Module) -> Iterable[tuple[int, ...]]:
    """Shapes (C, H, W) in which the module may take its images, likeliest first."""
    recipe: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    if "input_size" in recipe:  # timm's
        yield getattr(module, "in_chans", 3), *recipe["input_size"][1:]
    first = next(iter(_dense_layers(module)), None)
    if isinstance(first, nn.Linear):
        yield 1, 1, first.in_features  # whatever the image's sides are, if nn.Flatten comes before it
    channels = (first.in_channels,) if isinstance(first, nn.Conv2d) else (3, 1)
    yield from ((channel, size, size) for size in _COMMON_SIZES for channel in channels)


def _probe(module: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The output for the first batch that fits; a second one that fits must give the same width."""
    outputs: list[Tensor] = []
    failures: list[UnsupportedBackboneError] = []
    for images in batches:
        try:
            outputs.append(_run(module, images))
        except UnsupportedBackboneError as error:
            failures.append(error)
        if len(outputs) == 2:
            break
    if not outputs:  # an output of another kind tells more than an image size that does not fit
        raise next((failure for failure in failures if failure.__cause__ is None), failures[0])
    widths = [output.shape[1] for output in outputs]
    if widths[0] != widths[-1]:
        raise UnsupportedBackboneError(f"expected one D for all image sizes, got {widths}; {_PASS_EXAMPLE}")
    return outputs[0]


def _run(module: nn.Module, images: Tensor) -> Tensor:
    """The module's (B, D) output in eval mode; modes, buffers and everything else stay as they are."""
    expected = f"expected floating-point features ({len(images)}, D) for images {tuple(images.shape)}"
    # The copy shares the parameters; on the meta device it needs neither their memory nor any arithmetic.
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
        raise UnsupportedBackboneError(f"{expected}, got {error!r}; {_PASS_EXAMPLE}") from error
    if isinstance(output, Tensor) and output.is_floating_point() and output.shape[:-1] == images.shape[:1]:
        return output
    got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise UnsupportedBackboneError(
        f"{expected}, got {got}; wrap the backbone so that it picks or pools its output, such as "
        "nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten())"
    )
