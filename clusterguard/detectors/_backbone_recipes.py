"""Recipes: what in `config.json` rebuilds a backbone, and what such a recipe may ask for.

A recipe may come from a stranger, so it names a model and numbers, and nothing that fetches or reads a file.
"""

import inspect
import json
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from clusterguard.detectors._backbones import make_encoder
from clusterguard.detectors._layers import build_layers, describe_layers
from clusterguard.errors import ConfigurationError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_LONGEST, _LARGEST, _LARGEST_SIDE = 200, 65536, 4096  # some networks take time in the square of an image's sides
_SETTINGS = """
    act_layer aa_layer alpha always_partition attention_dropout attn_drop_rate aux_logits avg_down base_width
    block_channels block_config block_layers block_reduce_first bn_size cardinality channels class_token conv_mlp depth
    depths dilated dims distilled down_kernel_size drop_block_rate drop_path_rate drop_rate dropout dropout_aux
    dynamic_img_pad dynamic_img_size embed_dim embed_dims expand_ratio expansion_ratio fc_norm final_norm fix_init
    fix_stem global_pool groups growth_rate head_dim head_hidden_size head_init_scale head_norm_first hidden_dim
    image_size img_size in_chans init_values init_weights input_size kernel_size last_channel layer_scale
    layer_scale_init_value layers ls_init_value memory_efficient mlp_dim mlp_dropout mlp_ratio mlp_ratios
    no_embed_class norm_eps norm_layer num_classes num_features num_heads num_init_features num_layers output_stride
    pad_type partition_size patch_drop_rate patch_size pos_drop_rate pos_embed pre_norm proj_drop_rate qk_norm qkv_bias
    reduced_tail reg_tokens replace_stem_pool replace_stride_with_dilation representation_size round_nearest
    squeeze_ratio stem_channels stem_chs stem_size stem_type stem_width stochastic_depth_prob strict_img_size
    transform_input use_grn use_pos_embed version weight_init width width_mult width_per_group widths window_size
    zero_init_last zero_init_residual
    """
"""What a recipe may set: sizes, rates and kinds of layers. Other things that constructors take might read a file."""


def describe_backbone(
    encoder: nn.Module, representation_dim: int, image_shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Find a recipe that rebuilds the backbone of an encoder. It is tried out on the meta device.

    Args:
        encoder: encoder that `make_encoder` made from the backbone.
        representation_dim: number m of its outputs.
        image_shape: (C, H, W) of the images that it takes; None if it is not known.

    Returns:
        A dict. If a recipe rebuilds the encoder with the same modules, attributes and shapes, "source" is "timm",
        "torchvision" or "layers", and "name" and "arguments" are those of the model. Otherwise "source" is "module".
    """
    model, structure = _inner(encoder), _structure(encoder)
    near_misses = []
    for recipe in _recipes(model):
        for _ in range(2):
            try:
                with torch.device("meta"):
                    rebuilt = make_encoder(build_backbone(recipe), representation_dim, image_shape=image_shape)
            except Exception as error:  # libraries raise many errors for arguments that they do not take
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
    """The backbone of a recipe, with random weights; nothing is downloaded and no checkpoint is read.

    Args:
        recipe: of `describe_backbone`, or a stranger's.

    Raises:
        ConfigurationError: it names no classifier of its library, or sets what no recipe may set.
    """
    name, arguments = recipe["name"], recipe["arguments"]
    if recipe["source"] == "layers":
        return build_layers(arguments)
    refused = [key for key, value in arguments.items() if not _may_be_set(key, value)]
    if refused:
        raise ConfigurationError(f"expected settings that a recipe may hold, got {refused!s:.100}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initial weights and old names
        if recipe["source"] == "torchvision":
            from torchvision import models

            # Models for detection and segmentation fetch weights of a backbone unless they are told not to.
            if name not in models.list_models(module=models):
                raise ConfigurationError(f"{name!r:.100} is no name of a classifier of torchvision")
            return models.get_model_builder(name)(weights=None, **arguments)  # type: ignore[no-any-return]
        import timm

        if not (re.fullmatch(r"[\w.]+", name) and timm.is_model(name)):
            raise ConfigurationError(f"{name!r:.100} is no name of a timm model")
        off: dict[str, Any] = {"pretrained": False, "checkpoint_path": "", "pretrained_cfg": None}
        return timm.create_model(name, **off, pretrained_cfg_overlay=None, **arguments)


@contextmanager
def at_most(modules: int) -> Iterator[None]:
    """Stop this thread from putting together a larger network, such as one of a million layers.

    Args:
        modules: how many may be put into others.

    Raises:
        ConfigurationError: there are more.
    """
    thread, left = threading.get_ident(), modules

    def count(*_: object) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise ConfigurationError(f"expected a network of at most {modules} parts, as its weights have, got more")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _may_be_set(name: str, value: object) -> bool:
    """Whether a recipe may hold a setting: numbers and short words, few of them, under names that are known."""
    plain = name in _SETTINGS.split() and _is_plain(value)
    values = _flat(value) if plain else []
    largest = _LARGEST_SIDE if name.endswith("_size") else _LARGEST
    return plain and len(values) <= _LONGEST and all(_is_small(item, largest) for item in values)


def _flat(value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value]
    return [leaf for part in value for leaf in (_flat(part) or [None])]


def _is_small(value: str | float | None, largest: int) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[\w.-]{0,40}", value) is not None
    return value is None or abs(value) <= largest  # no NaN either


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
    plain = {key: value for key, value in arguments.items() if _may_be_set(key, value)}
    return {"source": source, "name": name, "arguments": json.loads(json.dumps(plain))}  # as it will be read


def _inner(encoder: nn.Module) -> nn.Module:
    """The model that got a layer on top, or the encoder itself."""
    return encoder[0] if type(encoder) is nn.Sequential else encoder


def _structure(module: nn.Module) -> dict[str, object]:
    """All that decides what a module computes, but for the values of its tensors."""
    return {
        **{name: (type(part), _attributes(part)) for name, part in module.named_modules()},
        **{name: tensor.shape for name, tensor in [*module.named_parameters(), *module.named_buffers()]},
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
