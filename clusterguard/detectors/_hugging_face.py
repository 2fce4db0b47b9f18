"""Image classifiers of transformers as backbones.

transformers is only imported when a model is built or its image processor is read.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, final

from clusterguard.detectors._dense_layers import count_outputs, dense_layers
from clusterguard.detectors._family import Family, Replacement, replace_head
from clusterguard.detectors._recipe_settings import CONFIGURATIONS, may_be_set
from clusterguard.detectors._wrappers import Normalization
from clusterguard.errors import ConfigurationError, UnsupportedBackboneError
from torch import Tensor, nn

_LARGEST_OF_LEVIT = 512
_NOWHERE = "/nowhere"  # a path that does not exist; an empty path would mean the current folder
_PRE_TRAINED = "transformers.modeling_utils.PreTrainedModel"
_UNIMPORTANT = {  # settings of a configuration that do not change what an image classifier computes
    *("architectures", "dtype", "id2label", "label2id", "model_type", "problem_type", "transformers_version"),
    *("_name_or_path", "out_features", "out_indices", "stage_names", "vocab_size"),
}


class MainLogits(nn.Module):
    """A model of transformers that returns its logits only, and not several outputs.

    Args:
        model: model whose output has the attribute `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, K)."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


@final
class HuggingFace(Family):
    """Image classifiers of transformers, such as those of AutoModelForImageClassification."""

    name = "transformers"
    # Distilled models have two classifiers, whose logits they average.
    _heads = (
        "classifier",
        "cls_classifier",
        "distillation_classifier",
        "classifier_distill",
        "fc",
        "head",
        "dist_head",
        "score",
    )

    def fits(self, module: nn.Module) -> bool:
        """Whether a base class of the module is the base class of all models of transformers."""
        return any(f"{cls.__module__}.{cls.__name__}" == _PRE_TRAINED for cls in type(module).__mro__)

    def is_model(self, module: nn.Module) -> bool:
        """Whether the name of the module's class is that of an image classifier."""
        return any("ForImageClassification" in cls.__name__ for cls in type(module).__mro__)

    def num_classes(self, model: Any) -> int | None:
        """The width of the classifier."""
        heads = self._find_heads(model)
        return count_outputs(dense_layers(heads[0])[-1]) if heads else None

    def trained_normalization(self, model: Any) -> Normalization | None:
        """The mean and standard deviation of the image processor, if a copy of it is on this machine.

        Warns:
            UserWarning: there is no copy. The configuration of a model does not hold these values.
        """
        try:
            from transformers import AutoImageProcessor

            path = model.config._name_or_path or _NOWHERE
            load: Any = AutoImageProcessor.from_pretrained
            processor = load(path, local_files_only=True)
            scale = getattr(processor, "rescale_factor", 1 / 255)
            if not (processor.do_normalize and processor.do_rescale and abs(255 * scale - 1) < 1e-6):
                raise ValueError("it does not normalise pixels in [0, 1]")
            return tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))
        except Exception:  # there is no processor, or one without these values, which raises errors of many kinds
            warnings.warn(
                f"no image processor of this {type(model).__name__} is on this machine that normalises pixels in [0, "
                "1], so images reach the model as they are; pass mean=processor.image_mean and "
                "std=processor.image_std, or [0.0] and [1.0] if it takes pixels in [0, 1]",
                stacklevel=6,
            )
            return None

    def image_shape(self, model: Any) -> tuple[int, ...] | None:
        """The size of images in the configuration."""
        channels, size = getattr(model.config, "num_channels", 3), getattr(model.config, "image_size", None)
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        return (channels, *sides) if len(sides) == 2 else None

    def keep_main_output(self, model: nn.Module) -> None:
        """Leave the model as it is, because `MainLogits` selects one output."""

    def replace_classifier(self, model: nn.Module, out_features: int) -> Replacement | None:
        """Replace the last layer of each head.

        Raises:
            UnsupportedBackboneError: the model has no head of a known name, or a user replaced the head, and its last
                layer does not make the output.
        """
        heads = self._find_heads(model)
        if not heads:
            raise UnsupportedBackboneError(
                f"expected a model with a linear classifier, got a {type(model).__name__}; pass the network inside it, "
                "such as timm_model, or wrap it so that it returns features (B, D)"
            )
        pairs = [replace_head(self, model, head, out_features) for head in heads]
        return [pair for replacement in pairs for pair in replacement] if all(pairs) else []

    def as_function(self, model: nn.Module) -> nn.Module:
        """The model, wrapped to return only its logits."""
        return MainLogits(model)

    def class_names(self, model: Any) -> list[str] | None:
        """The names in the configuration, unless they are the usual LABEL_0, LABEL_1 and so on."""
        told = getattr(model.config, "id2label", None) or {}
        names = [str(told[index]) for index in sorted(told, key=int)]  # some configurations have "10" for 10
        is_usual = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
        return None if is_usual or len(set(names)) < len(names) else names

    def recipes(self, model: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The settings in the configuration, if a recipe may hold all of them."""
        config = getattr(model, "config", None)
        if type(model).__module__.startswith("transformers.") and config is not None:
            told = {key: value for key, value in config.to_diff_dict().items() if key not in _UNIMPORTANT}
            told["num_labels"] = config.num_labels
            if all(self.may_be_set(key, value) for key, value in told.items()):
                yield f"{config.model_type}:{type(model).__name__}", told

    def may_be_set(self, name: str, value: object) -> bool:
        """Whether a setting of a configuration is known, and its value allowed."""
        return may_be_set(name, value, CONFIGURATIONS)

    def _build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module:
        try:
            import transformers
        except ImportError:
            raise ConfigurationError("this needs transformers; run: pip install transformers") from None

        kind, _, architecture = name.partition(":")
        is_classifier = re.fullmatch(r"[A-Za-z0-9]+ForImageClassification\w*", architecture) is not None
        if not (is_classifier and re.fullmatch(r"[\w-]+", kind) and hasattr(transformers, architecture)):
            raise ConfigurationError(f"{name!r:.100} is no name of an image classifier of transformers")
        if kind == "levit" and max([*_numbers(arguments.get("image_size"))], default=0) > _LARGEST_OF_LEVIT:
            raise ConfigurationError("expected a smaller image_size, because LeViT takes time in its fourth power")
        config = transformers.AutoConfig.for_model(kind, **arguments)
        model: nn.Module = getattr(transformers, architecture)(config)
        return model

    def _find_heads(self, model: nn.Module) -> list[nn.Module]:
        heads = (getattr(model, name, nn.Identity()) for name in self._heads)
        return [head for head in heads if dense_layers(head)]


def _numbers(value: Any) -> list[float]:
    return [float(side) for side in (value if isinstance(value, list | tuple) else [value or 0])]
