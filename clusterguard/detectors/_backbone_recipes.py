"""Recipes, the part of `config.json` from which the backbone of a saved guard is rebuilt.

A recipe may come from an untrusted source. So it consists of the name of a model, numbers and short words. Nothing in
it can make a library download or read a file.
"""

import inspect
import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from clusterguard.detectors._backbones import make_encoder
from clusterguard.detectors._families import FAMILIES, family_of
from clusterguard.detectors._family import Family
from clusterguard.detectors._hugging_face import MainLogits
from clusterguard.detectors._recipe_settings import is_plain
from clusterguard.errors import ConfigurationError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


def describe_backbone(
    encoder: nn.Module, representation_dim: int, image_shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Find a recipe that rebuilds the backbone of an encoder. Recipes are tested on the meta device.

    Args:
        encoder: encoder that `make_encoder` made from the backbone.
        representation_dim: number m of the encoder's outputs.
        image_shape: (C, H, W) of the images that the encoder takes; None if it is not known.

    Returns:
        A dict. If a recipe rebuilds the encoder with the same modules, attributes and shapes, "source" is a key of
        `FAMILIES`, and "name" and "arguments" are those of the model. Otherwise "source" is "module", and "type" is the
        class of the model.

    Warns:
        UserWarning: no recipe rebuilds a model of a family whose models can usually be rebuilt.
    """
    model, structure = _inner(encoder), _structure(encoder)
    near_misses = []
    for recipe in _recipes(model):
        for _ in range(2):
            try:
                with torch.device("meta"):
                    rebuilt = make_encoder(build_backbone(recipe), representation_dim, image_shape=image_shape)
            except Exception as error:  # libraries raise errors of many kinds for arguments that they do not accept
                near_misses.append((0, f"{recipe['name']}: {error}"))
                break
            twin = _structure(rebuilt)
            different = [name for name in {**structure, **twin} if structure.get(name) != twin.get(name)]
            if not different:
                return recipe
            place = different[0] or type(model).__name__
            near_misses.append((len(structure) - len(different), f"{recipe['name']} differs at {place}"))
            # Many constructors store an argument in an attribute of the same name. In a second try, attributes that
            # differ are passed as arguments.
            usual, changeable = _attributes(_inner(rebuilt)), inspect.signature(type(model)).parameters
            changed = {k: v for k, v in _attributes(model).items() if k in changeable and v != usual.get(k, v)}
            if not changed:
                break
            recipe = _recipe(FAMILIES[recipe["source"]], recipe["name"], {**recipe["arguments"], **changed})
    family = family_of(model)
    if not near_misses and family.rebuilds and family.is_model(model):
        near_misses.append((0, f"{type(model).__name__} has settings that a recipe may not hold, or is a subclass"))
    if near_misses and family.rebuilds:  # nobody expects this of a user's module
        warnings.warn(
            f"no recipe rebuilds this backbone ({max(near_misses)[1]}); from_pretrained will need backbone=, the "
            "module that the guard was made with",
            stacklevel=3,
        )
    return {"source": "module", "type": f"{type(model).__module__}.{type(model).__qualname__}"}


def build_backbone(recipe: Mapping[str, Any]) -> nn.Module:
    """Build the backbone of a recipe, with random weights. Nothing is downloaded, and no checkpoint is read.

    Args:
        recipe: recipe as `describe_backbone` returns it, possibly from an untrusted source.

    Raises:
        ConfigurationError: the name is not that of a classifier of the library, or an argument is not allowed.
    """
    if recipe["source"] not in FAMILIES:
        raise ConfigurationError(f"expected a source among {', '.join(FAMILIES)}, got {recipe['source']!r:.100}")
    return FAMILIES[recipe["source"]].build(recipe["name"], recipe["arguments"])


@contextmanager
def at_most(modules: int) -> Iterator[None]:
    """Limit the size of networks that this thread builds within the block, so that none has a million layers.

    Args:
        modules: largest number of modules that may be added to other modules.

    Raises:
        ConfigurationError: more modules are added.
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


def _recipes(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The recipes for a model from the first family that has any."""
    for family in FAMILIES.values():
        recipe = None
        for name, arguments in family.recipes(model):
            recipe = _recipe(family, name, arguments)
            yield recipe
        if recipe is not None:
            return


def _recipe(family: Family, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in arguments.items() if family.may_be_set(key, value)}
    return {
        "source": family.name,
        "name": name,
        "arguments": json.loads(json.dumps(plain)),
    }  # with the types that JSON will return


def _inner(encoder: nn.Module) -> nn.Module:
    """The backbone inside an encoder: without an added layer, and without the wrapper that selects its logits."""
    if type(encoder) is MainLogits:
        return encoder.model
    return encoder[0] if type(encoder) is nn.Sequential else encoder


def _structure(module: nn.Module) -> dict[str, object]:
    """The classes and attributes of all modules, and the shapes of all tensors, by name."""
    return {
        **{name: (type(part), _attributes(part)) for name, part in module.named_modules()},
        **{name: tensor.shape for name, tensor in [*module.named_parameters(), *module.named_buffers()]},
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The public attributes of a module. Functions and other objects are replaced by their names."""
    return {
        key: value if is_plain(value) else getattr(value, "__qualname__", type(value).__name__)
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training"
    }
