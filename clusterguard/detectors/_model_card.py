"""The model card of a saved guard, which states only what is known about it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from clusterguard.detection import Calibration, Rate


class Measured(Protocol):
    """The part of an evaluation that a model card and a saved guard use."""

    @property
    def thresholds(self) -> Sequence[float]:
        """The thresholds of the detector that was evaluated, one per class."""

    def to_dict(self) -> dict[str, Any]:
        """The whole evaluation as plain values."""

    def to_markdown(self) -> str:
        """The whole evaluation as text for people."""


MARK = "library_name: clusterguard"
_HEADER = f"""---
{MARK}
pipeline_tag: image-classification
tags:
- adversarial-detection
- adversarial-examples
- image-classification
- model_hub_mixin
# license: the publisher's choice
---"""
_LIMITS = """\
It classifies images of the kind it was trained and calibrated on, and refuses those that look adversarial, for
applications that can do without an answer: they defer to a human, a fallback, or a second look.

- Attacks that were run prove nothing about others. An attacker who knows the guard, or is allowed larger changes than
  it was trained against, may get through.
- The false-positive rate holds for images exchangeable with the calibration images. Drift, another camera or another
  preprocessing void it, and so does a change of weights or precision: fit the thresholds again.
- Refusing is not explaining: an odd or blurred image is refused like an adversarial one.
- Images go in as floating point in [0, 1]; normalisation is inside."""


def model_card(
    config: Mapping[str, Any],
    *,
    calibrated: bool,
    calibration: Calibration | None = None,
    evaluation: Measured | None = None,
) -> str:
    """Write a model card in Markdown, with a Hugging Face header.

    Args:
        config: content of `config.json`.
        calibrated: whether the guard has thresholds.
        calibration: record of how the thresholds were fitted; None if it is not known.
        evaluation: evaluation of this guard; None leaves out the figures.

    Returns:
        The text. It states no licence, which is left to whoever publishes the guard.

    Example:
        >>> backbone = {"source": "timm", "name": "resnet18", "arguments": {}}
        >>> guard = {"num_classes": 10, "head": {"description": "m = 10"}, "dtype": "float32"}
        >>> config = {"backbone": backbone, "guard": guard, "training": None, "versions": {"torch": "2.13.0"}}
        >>> "Not measured" in model_card(config, calibrated=False)
        True
    """
    backbone, guard = config["backbone"], config["guard"]
    is_module = backbone["source"] == "module"
    is_listed = backbone["source"] == "layers"
    name = f"`{backbone['type']}`" if is_module else f"`{backbone['name']}` of {backbone['source']}"
    arguments = (
        "" if is_module or is_listed or not backbone["arguments"] else f" with `{json.dumps(backbone['arguments'])}`"
    )
    code = (
        "from clusterguard import ClusterGuard\n\n"
        f'guard = ClusterGuard.from_pretrained("this folder or id"{", backbone=your_module" if is_module else ""})\n'
        "labels, distances, is_adversarial = guard.detect(images)  # images (B, C, H, W), float, in [0, 1]"
    )
    versions = ", ".join(f"{package} {number}" for package, number in config["versions"].items())
    # JSON on one line, so that no class name can end the block of code that holds it.
    names = guard.get("class_names") and json.dumps(guard["class_names"], ensure_ascii=False)
    lines = [
        _HEADER,
        f"# Guard: {name}, {guard['num_classes']} classes",
        "An image classifier that notices adversarial examples, made with clusterguard after "
        "[arXiv 2012.03483](https://arxiv.org/abs/2012.03483).",
        f"```python\n{code}\n```",
        "## Model",
        f"Backbone {name}{arguments}; {guard['head']['description']}, {guard['dtype']}. Saved with {versions}. The "
        "backbone's name tells its architecture, not the weights that training started from.",
        *(["## Classes", f"In the order of their labels:\n\n```json\n{names}\n```"] if names else []),
        "## Thresholds",
        describe_thresholds(calibrated, calibration),
        "## Measured",
        "Not measured: no evaluation was handed in." if evaluation is None else evaluation.to_markdown(),
        "## Training",
        "Not recorded." if config["training"] is None else f"```json\n{json.dumps(config['training'], indent=2)}\n```",
        "## Intended use and limits",
        f"{_LIMITS}\n- {describe_image_shape(guard.get('image_shape'))}",
        "## Licence",
        "None is stated. Whoever publishes this guard chooses one, adds it to the header as `license:`, and minds "
        "those of the backbone's weights and of the training data.",
    ]
    return "\n\n".join(lines) + "\n"


def describe_image_shape(shape: list[int] | tuple[int, ...] | str | None) -> str:
    """One sentence on the images that a guard with this `image_shape` takes."""
    if shape is None:
        return "No shape of images was recorded: mind that they are as large as those it was trained on."
    if isinstance(shape, str):
        return "It takes images of every shape that its network can take."
    return f"It takes images of shape ({', '.join(map(str, shape))}) alone, as it was trained on; others are an error."


def describe_thresholds(calibrated: bool, calibration: Calibration | None) -> str:
    """One or two sentences on what is known about a guard's thresholds."""
    if not calibrated:
        return "None: fit them with `Calibrator` before use; until then everything is refused."
    if calibration is None:
        return "Set without a `Calibrator`: nothing is known of their false-positive rate."
    correct = sum(calibration.counts)
    refused = Rate(round(calibration.realised_rate * correct), correct)
    pooled = ""
    if calibration.pooled:
        which = f"Classes {list(calibration.pooled)} share a pooled threshold"
        pooled = f" {which}: the rate holds on average over all classes, not for each of these."
    return (
        f"One per class, fitted by the {calibration.method} method for a false-positive rate of "
        f"{calibration.false_positive_rate:g} on {calibration.images} benign images. {correct} of these are classified "
        f"correctly, {min(calibration.counts)} in the smallest class, and the thresholds refuse {refused}.{pooled}"
    )
