"""The base class of families, which define everything that differs between kinds of backbones."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import dropwhile
from typing import Any, ClassVar, TypeAlias

from clusterguard._support import no_warnings
from clusterguard.detectors._dense_layers import changes_no_label, dense_layers, make_layer_like, put_in_place
from clusterguard.detectors._outputs import has_width
from clusterguard.detectors._recipe_settings import may_be_set
from clusterguard.detectors._wrappers import Normalization
from clusterguard.errors import ConfigurationError, UnsupportedBackboneError
from torch import nn

Replacement: TypeAlias = Sequence[tuple[nn.Module, nn.Module]]
"""Pairs of an old and a new module with the same inputs. If the new ones get the weights of the old ones, the model
returns its old logits. There is no pair if it may return others. Most models have one classifier, hence one pair."""


class Family(ABC):
    """A kind of backbones, with everything that differs between kinds.

    Attributes:
        name: name of the family in recipes of saved guards.
        rebuilds: whether users may expect that saved models of this family are rebuilt from a recipe.
    """

    name: ClassVar[str]
    rebuilds: ClassVar[bool] = True

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Whether a module belongs to this family. The module may be a part of a model."""

    @abstractmethod
    def is_model(self, module: nn.Module) -> bool:
        """Whether a module of this family is a whole model, not one of the blocks that models are made of."""

    @abstractmethod
    def num_classes(self, model: nn.Module) -> int | None:
        """The number K of classes, which is the present width of the classifier; None without a classifier."""

    @abstractmethod
    def trained_normalization(self, model: nn.Module) -> Normalization | None:
        """The mean and standard deviation, one value per channel, that a model was trained with; None if unknown."""

    def normalization(self, model: nn.Module) -> Normalization | None:
        """The values of `trained_normalization`, or their averages if the model was built for one channel."""
        trained = self.trained_normalization(model)
        first = next((layer for layer in dense_layers(model) if isinstance(layer, nn.Conv2d)), None)
        # timm's attribute covers linear patch embeddings, and the layer covers a stem that a user replaced.
        if trained is None or 1 not in (getattr(model, "in_chans", None), getattr(first, "in_channels", None)):
            return trained
        mean, std = trained
        return (sum(mean) / len(mean),), (sum(std) / len(std),)

    def image_shape(self, model: nn.Module) -> tuple[int, ...] | None:
        """The shape (C, H, W) of images that a model was made for; None if it is unknown."""
        settings: Mapping[str, Any] = getattr(
            model, "pretrained_cfg", {}
        )  # timm introduced this attribute, and other libraries use it too
        return (getattr(model, "in_chans", 3), *settings["input_size"][1:]) if "input_size" in settings else None

    @abstractmethod
    def keep_main_output(self, model: nn.Module) -> None:
        """Make a model return one output, if it returns several in train mode, such as those of auxiliary heads."""

    @abstractmethod
    def replace_classifier(self, model: nn.Module, out_features: int) -> Replacement | None:
        """Put a new layer in the place of the classifier.

        Args:
            model: model of this family, which is changed.
            out_features: number of outputs of the new layer.

        Returns:
            The old classifier and the new one; None if there was no classifier that could be replaced.
        """

    def as_function(self, model: nn.Module) -> nn.Module:
        """A module that returns one tensor: the model itself, or a wrapper if the model returns something else."""
        return model

    def class_names(self, model: nn.Module) -> list[str] | None:
        """The names of the classes in the order of the logits; None if they are unknown."""
        return None

    def pooling(self, model: nn.Module) -> nn.Module | None:
        """A module that turns outputs of a model without a classifier into (B, D); None if none is needed."""
        return None

    @abstractmethod
    def recipes(self, model: nn.Module) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Pairs of a name and arguments with which `build` may rebuild a model; empty if there are none."""

    def may_be_set(self, name: str, value: object) -> bool:
        """Whether a recipe may hold this argument."""
        return may_be_set(name, value)

    def build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module:
        """Build a model with random weights. Nothing is downloaded, and no checkpoint is read.

        Args:
            name: name of the model, possibly from an untrusted source.
            arguments: arguments of the model, possibly from an untrusted source.

        Raises:
            ConfigurationError: the name is not that of a classifier, or an argument is not allowed in recipes.
        """
        refused = [key for key, value in arguments.items() if not self.may_be_set(key, value)]
        if refused:
            raise ConfigurationError(f"expected settings that a recipe may hold, got {refused!s:.100}")
        with no_warnings.on():  # libraries warn about initial weights and old names
            return self._build(name, arguments)

    @abstractmethod
    def _build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module:
        """Build the model of this name. The arguments have been checked, but the name has not."""


def replace_end(model: nn.Module, head: nn.Module, out_features: int) -> Replacement:
    """Replace the last layer of a head, and remove activations after it."""
    layer = dense_layers(head)[-1]
    fresh = make_layer_like(layer, out_features)
    rest = list(dropwhile(lambda item: item[1] is not layer, list(head.named_modules())))
    after = [(path, module) for path, module in rest if module not in set(layer.modules())]
    for path, module in after:
        # Remove activations after the classifier, such as SqueezeNet's ReLU. Representations scatter around centres
        # whose coordinates are mostly zero, so they must be able to become negative.
        if type(module).__module__ == "torch.nn.modules.activation":
            head.set_submodule(path, nn.Identity().train(module.training))
    put_in_place(model, layer, fresh)
    return [(layer, fresh)] if all(changes_no_label(module) for _, module in after) else []


def replace_head(family: Family, model: nn.Module, head: nn.Module, out_features: int) -> Replacement:
    """Replace the last layer of a head, or all of a user's head if its last layer does not make the output.

    Raises:
        UnsupportedBackboneError: no linear layer can replace the head.
    """
    replacement = replace_end(model, head, out_features)
    if all(type(part).__module__.split(".")[0] in ("torch", family.name) for part in head.modules()):
        return replacement
    # In a user's head, such as an adapter beside its base, the last layer need not be the one that makes the output.
    function, usual = family.as_function(model), family.image_shape(model)
    if has_width(function, out_features, usual=usual):
        return replacement
    put_in_place(model, head, make_layer_like(dense_layers(head)[0], out_features))
    if not has_width(function, out_features, usual=usual):
        raise UnsupportedBackboneError(
            f"expected a classifier that one linear layer can replace, got {type(head).__name__}; put such a layer in "
            "its place"
        )
    return []
