"""Families of backbones: everything that differs between models of timm, torchvision, transformers and other modules.

To add a family, write a subclass of `Family` and enter it in `FAMILIES`. No library is imported until a model of it is
built. A model is recognised by the modules in which its class and their bases are defined, so a user's subclass is
recognised too.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, TypeGuard, final

from clusterguard.detectors._dense_layers import (
    Dense,
    count_outputs,
    dense_layers,
    is_one_layer,
    last_parameter,
)
from clusterguard.detectors._family import Family, Replacement, replace_end, replace_head
from clusterguard.detectors._hugging_face import HuggingFace
from clusterguard.detectors._layers import build_layers, describe_layers
from clusterguard.detectors._wrappers import Normalization
from clusterguard.errors import ConfigurationError
from einops.layers.torch import Reduce
from torch import nn
from torch.fx import GraphModule

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@final
class Timm(Family):
    """Models of timm."""

    name = "timm"

    def fits(self, module: nn.Module) -> bool:
        """Whether a base class of the module is defined in timm."""
        return any(cls.__module__.startswith("timm.") for cls in type(module).__mro__)

    def is_model(self, module: nn.Module) -> bool:
        """Whether the module has a classifier to reset, or timm's configuration."""
        return hasattr(module, "reset_classifier") or isinstance(getattr(module, "pretrained_cfg", None), dict)

    def num_classes(self, model: nn.Module) -> int | None:
        """The width of the classifier, or timm's attribute `num_classes` if there is no such layer."""
        num_classes = int(getattr(model, "num_classes", 0))
        classifier = getattr(model, "get_classifier", nn.Identity)()
        layers = dense_layers(nn.ModuleList(classifier if isinstance(classifier, tuple) else [classifier]))
        # The layer counts more than the attribute, because a user may have replaced it. If the attribute is 0, the
        # layer is not a classifier.
        return count_outputs(layers[-1]) if layers and num_classes else num_classes or None

    def trained_normalization(self, model: nn.Module) -> Normalization | None:
        """The values of timm's configuration."""
        settings = getattr(model, "pretrained_cfg", None)
        if not (isinstance(settings, dict) and settings.get("mean") and settings.get("std")):
            return None
        return tuple(map(float, settings["mean"])), tuple(map(float, settings["std"]))

    def keep_main_output(self, model: nn.Module) -> None:
        """Switch off distilled and auxiliary heads."""
        _drop_auxiliary_outputs(model)

    def replace_classifier(self, model: Any, out_features: int) -> Replacement | None:
        """Let timm reset the classifier, with pooling in front of it."""
        if not hasattr(model, "reset_classifier"):
            return None
        classifier = getattr(model, "get_classifier", nn.Identity)()
        if _is_users_sequence(classifier):
            return replace_end(model, classifier, out_features)
        if _is_users_module(classifier):
            return replace_head(self, model, classifier, out_features)
        like = last_parameter(model)
        pools = [getattr(owner, "global_pool", None) for owner in (getattr(model, "head", None), model)]
        # Without pooling, a model that returns its feature map would apply the layer at every position of the map.
        unpooled = "" in [getattr(pool, "pool_type", pool) for pool in pools]
        before = dict(model.named_modules())
        model.reset_classifier(out_features, *(["avg"] if unpooled else []))
        for module in set(model.modules()) - set(before.values()):
            module.to(like).training = model.training
        # Some models have more than one classifier, and timm's `get_classifier` does not return all of them.
        pairs = [(before.get(path, nn.Identity()), new) for path, new in _new_modules(model, set(before.values()))]
        # A user's classifier may compute anything. Classifiers of timm compute the same if they have the same weights.
        return pairs if all(type(old) is type(new) or is_one_layer(old) for old, new in pairs) else []

    def pooling(self, model: nn.Module) -> nn.Module | None:
        """The mean over all positions of a feature map, which encoders of vision-language models need."""
        if not hasattr(model, "forward_features"):
            return None
        is_map = getattr(model, "output_fmt", "NCHW") == "NCHW"
        return Reduce("b d ... -> b d" if is_map else "b ... d -> b d", "mean")

    def recipes(self, model: nn.Module) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The name of the architecture in timm's configuration."""
        settings = getattr(model, "pretrained_cfg", None)
        if isinstance(settings, dict) and settings.get("architecture"):
            name = ".".join(filter(None, (settings["architecture"], settings.get("tag"))))
            yield name, getattr(model, "_model_args", {})  # newer versions of timm keep the arguments

    def _build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module:
        import timm

        if not (re.fullmatch(r"[\w.]+", name) and timm.is_model(name)):
            raise ConfigurationError(f"{name!r:.100} is no name of a timm model")
        off: dict[str, Any] = {"pretrained": False, "checkpoint_path": "", "pretrained_cfg": None}
        return timm.create_model(name, **off, pretrained_cfg_overlay=None, **arguments)


@final
class Torchvision(Family):
    """Classification models of torchvision."""

    name = "torchvision"
    _heads = ("fc", "classifier", "head", "heads")

    def fits(self, module: nn.Module) -> bool:
        """Whether a base class of the module is defined in torchvision, for classification and not for another task."""
        homes = (cls.__module__.split(".") for cls in type(module).__mro__)
        home = next((home for home in homes if home[:2] == ["torchvision", "models"]), None)
        return home is not None and home[2] not in {"detection", "optical_flow", "segmentation", "video"}

    def is_model(self, module: nn.Module) -> bool:
        """Whether the module has a head, or is a feature extractor."""
        return any(hasattr(module, name) for name in self._heads) or isinstance(module, GraphModule)

    def num_classes(self, model: nn.Module) -> int | None:
        """The width of the head's last layer."""
        head = self._find_head(model)
        return None if head is None else count_outputs(head[1])

    def trained_normalization(self, model: nn.Module) -> Normalization | None:
        """ImageNet's values, although efficientnet_v2_l has others, because a model does not record its weights."""
        convolutions = [layer for layer in dense_layers(model) if isinstance(layer, nn.Conv2d)]
        ends = [tuple(layer.weight.shape[:2]) for layer in convolutions[:1] + convolutions[-1:]]
        return ((0.5,) * 3, (0.5,) * 3) if ends == [(32, 3), (1280, 640)] else _IMAGENET

    def keep_main_output(self, model: nn.Module) -> None:
        """Remove auxiliary heads."""
        _drop_auxiliary_outputs(model)

    def replace_classifier(self, model: nn.Module, out_features: int) -> Replacement | None:
        """Replace the last layer of the head, and remove activations after it.

        Raises:
            UnsupportedBackboneError: a user replaced the head, and its last layer does not make the output.
        """
        ending = self._find_head(model)
        if ending is None:
            return None
        return replace_head(self, model, ending[0], out_features)

    def recipes(self, model: nn.Module) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The functions that build models of this class."""
        if type(model).__module__.startswith("torchvision.models."):
            from torchvision import models

            for name in models.list_models(module=models):
                if inspect.signature(models.get_model_builder(name)).return_annotation is type(model):
                    yield name, {}

    def _build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module:
        from torchvision import models

        # Models for detection and segmentation fetch weights of a backbone unless they are told not to.
        if name not in models.list_models(module=models):
            raise ConfigurationError(f"{name!r:.100} is no name of a classifier of torchvision")
        return models.get_model_builder(name)(weights=None, **arguments)  # type: ignore[no-any-return]

    def _find_head(self, model: nn.Module) -> tuple[nn.Module, Dense] | None:
        """The head and its last layer; None for a model without a classifier."""
        for name in self._heads:
            head = getattr(model, name, nn.Identity())
            if layers := dense_layers(head):
                return head, layers[-1]
        return None


@final
class PlainModules(Family):
    """All other modules, which get a layer on top. Those that consist of torch's layers can be rebuilt."""

    name = "layers"
    rebuilds = False

    def fits(self, module: nn.Module) -> bool:
        """False, because these are the modules that no other family fits."""
        return False

    def is_model(self, module: nn.Module) -> bool:
        """False, because a plain module cannot be recognised as a whole model."""
        return False

    def num_classes(self, model: nn.Module) -> int | None:
        """None, because a classifier cannot be told from another layer."""
        return None

    def trained_normalization(self, model: nn.Module) -> Normalization | None:
        """None, because it is unknown."""
        return None

    def keep_main_output(self, model: nn.Module) -> None:
        """Leave the module as it is."""

    def replace_classifier(self, model: nn.Module, out_features: int) -> Replacement | None:
        """None, because no classifier is replaced."""
        return None

    def recipes(self, model: nn.Module) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The description of the layers, if all of them are layers of torch."""
        if (layers := describe_layers(model)) is not None:
            yield type(model).__name__, layers

    def may_be_set(self, name: str, value: object) -> bool:
        """True, because `build_layers` checks every layer."""
        return True

    def build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module:
        """The module of these layers.

        Args:
            name: name of the module's class, which is not used.
            arguments: layers as `describe_layers` gives them.

        Raises:
            ConfigurationError: a layer is not known, or does not take its options.
        """
        return self._build(name, arguments)

    def _build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module:
        return build_layers(arguments)


FAMILIES: dict[str, Family] = {family.name: family for family in (Timm(), Torchvision(), HuggingFace(), PlainModules())}
"""All families by name. A module that fits none of them is a plain module."""


def family_of(module: nn.Module) -> Family:
    """The family that a module, which may be a part of a model, belongs to."""
    return next((family for family in FAMILIES.values() if family.fits(module)), FAMILIES[PlainModules.name])


def _is_users_sequence(classifier: object) -> bool:
    """Whether a user put several layers of torch in the place of a classifier."""
    return (
        isinstance(classifier, nn.Sequential)
        and len(dense_layers(classifier)) > 1
        and all(type(part).__module__.startswith("torch.nn.") for part in classifier.modules())
    )


def _is_users_module(classifier: object) -> TypeGuard[nn.Module]:
    """Whether a user put a module of another library, with a linear layer in it, in the place of a classifier."""
    if not (isinstance(classifier, nn.Module) and dense_layers(classifier)):
        return False
    return any(type(part).__module__.split(".")[0] not in ("torch", "timm") for part in classifier.modules())


def _new_modules(module: nn.Module, old: Set[nn.Module], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with weights that are not among the old ones, with their paths."""
    for name, child in module.named_children():
        if child in old:
            yield from _new_modules(child, old, f"{path}{name}.")
        elif any(True for _ in child.parameters()):
            yield path + name, child


def _drop_auxiliary_outputs(model: Any) -> None:
    for module in model.modules():
        if getattr(module, "distilled_training", False):
            module.distilled_training = False
    for name in {"AuxLogits", "aux1", "aux2"}.intersection(model._modules):
        setattr(model, name, None)
        model.aux_logits = False
