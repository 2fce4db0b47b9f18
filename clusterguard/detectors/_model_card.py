"""The model card of a saved guard, which states only what is known about it."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

from clusterguard._support import code_in_markdown, escape_markdown
from clusterguard.detection import Calibration, Rate
from clusterguard.detection._internal import list_classes
from clusterguard.detectors._known_heads import HEADS
from clusterguard.errors import ConfigurationError


class EvaluationForCard(Protocol):
    """The part of an evaluation that a model card and a saved guard use."""

    @property
    def thresholds(self) -> Sequence[float]:
        """The thresholds of the detector that was evaluated, one per class."""

    def to_dict(self) -> dict[str, Any]:
        """The whole evaluation as plain values."""

    def to_markdown(self) -> str:
        """The whole evaluation as text for people."""


@final
@dataclass(frozen=True, kw_only=True)
class CardDetails:
    """Details for the model card of a guard that only its publisher knows.

    Args:
        licence: identifier of the guard's licence as the Hugging Face Hub spells it, such as "mit"; None states none.
        backbone: Python expression that builds the backbone, for a guard whose backbone is a module of your own.
        imports: lines of Python that come before it, such as ``from my_package import MyNetwork``.

    Raises:
        ConfigurationError: the licence is no identifier, the code is no Python, or there are imports but no backbone.

    Example:
        >>> details = CardDetails(licence="mit", imports="from mine import Net", backbone="Net(width=32)")
        >>> details.licence
        'mit'
    """

    licence: str | None = None
    backbone: str | None = None
    imports: str = ""

    def __post_init__(self) -> None:
        if self.licence is not None and not re.fullmatch(r"[a-z][a-z0-9.+-]*", self.licence):
            raise ConfigurationError(
                f"expected a licence as the Hub spells it, such as 'mit' or 'apache-2.0', got {self.licence!r}"
            )
        _check_code("imports", self.imports, "exec", "lines of Python")
        if self.backbone is not None:
            _check_code("backbone", self.backbone, "eval", "an expression of Python")
            _check_code("backbone", f"({self.backbone})", "eval", "an expression without a comment")
        elif self.imports:
            raise ConfigurationError(f"expected a backbone that needs the imports, got none beside {self.imports!r}")


def _check_code(name: str, code: str, mode: Literal["eval", "exec"], expected: str) -> None:
    """Check that code for a card is Python, and contains no ``` that would end its block of code."""
    try:
        ast.parse(code, mode=mode)
    except (SyntaxError, ValueError) as error:
        raise ConfigurationError(f"expected {name} to be {expected}, got {code!r}: {error}") from error
    if "```" in code:
        raise ConfigurationError(f"expected {name} without ```, which ends the block of code on the card, got {code!r}")


MARK = "library_name: clusterguard"
_HEADER = """---
{mark}
pipeline_tag: image-classification
tags:
- adversarial-detection
- adversarial-examples
- image-classification
- model_hub_mixin
{license}
---"""
_NO_LICENCE = "# license: the publisher's choice"
INTENDED_USE = (
    "It classifies images of the kind it was trained and calibrated on, and refuses those that look adversarial, for "
    "applications that can do without an answer: they defer to a human, a fallback, or a second look."
)
LIMITS = (
    "Attacks that were run prove nothing about others. An attacker who knows the guard, or is allowed larger changes "
    "than it was trained against, may get through.",
    "The false-positive rate holds for images exchangeable with the calibration images. Drift, another camera or "
    "another preprocessing void it, and so does a change of weights or precision: fit the thresholds again.",
    "Refusing is not explaining: an odd or blurred image is refused like an adversarial one.",
    "Images go in as floating point in [0, 1]; normalisation is inside.",
)


def model_card(
    config: Mapping[str, Any],
    *,
    calibrated: bool,
    calibration: Calibration | None = None,
    evaluation: EvaluationForCard | None = None,
    details: CardDetails | None = None,
) -> str:
    """Write a model card in Markdown, with a Hugging Face header.

    Args:
        config: content of `config.json`.
        calibrated: whether the guard has thresholds.
        calibration: record of how the thresholds were fitted; None if it is not known.
        evaluation: evaluation of this guard; None leaves out the figures.
        details: details from the publisher; None leaves licence and backbone to whoever publishes the guard.

    Returns:
        The text.

    Example:
        >>> backbone = {"source": "timm", "name": "resnet18", "arguments": {}}
        >>> guard = {"num_classes": 10, "head": {"description": "m = 10"}, "dtype": "float32"}
        >>> config = {"backbone": backbone, "guard": guard, "training": None, "versions": {"torch": "2.13.0"}}
        >>> "Not measured" in model_card(config, calibrated=False)
        True
    """
    backbone, guard, details = config["backbone"], config["guard"], details or CardDetails()
    is_module = backbone["source"] == "module"
    is_short = backbone["source"] != "layers" and bool(backbone.get("arguments"))
    name = code_in_markdown(backbone["type" if is_module else "name"]) + (
        "" if is_module else f" of {backbone['source']}"
    )
    arguments = f" with {code_in_markdown(json.dumps(backbone['arguments']))}" if is_short else ""
    head = escape_markdown(guard["head"]["description"])
    builds = (details.backbone or ("your_module" if is_module else "")).strip()
    imports = "\n\n".join(["from clusterguard import ClusterGuard", *filter(None, [details.imports.strip()])])
    is_own_head = guard["head"].get("type", "GaussianClusters") not in HEADS
    arguments_of_loading = (f", backbone={builds}" if builds else "") + ", head=your_head" * is_own_head
    code = (
        f"{imports}\n\n"
        f'guard = ClusterGuard.from_pretrained("this folder or id"{arguments_of_loading})\n'
        "labels, distances, is_adversarial = guard.detect(images)  # images (B, C, H, W), float, in [0, 1]"
    )
    versions = ", ".join(f"{package} {number}" for package, number in config["versions"].items())
    # JSON on one line, so that no class name can end the block of code that holds it.
    names = guard.get("class_names") and _printable_json(guard["class_names"])
    lines = [
        _HEADER.format(mark=MARK, license=f"license: {details.licence}" if details.licence else _NO_LICENCE),
        f"# Guard: {name}, {guard['num_classes']} classes",
        "An image classifier that notices adversarial examples, made with clusterguard after "
        "[arXiv 2012.03483](https://arxiv.org/abs/2012.03483).",
        f"```python\n{code}\n```",
        "## Model",
        f"Backbone {name}{arguments}; {head}, {guard['dtype']}. Saved with {versions}. The "
        "backbone's name tells its architecture, not the weights that training started from."
        + " The class of the head defines what `distances` are, and loading needs this class."
        * is_own_head,
        *(["## Classes", f"In the order of their labels:\n\n```json\n{names}\n```"] if names else []),
        "## Thresholds",
        describe_thresholds(calibrated, calibration, [*map(escape_markdown, guard.get("class_names") or [])]),
        "## Measured",
        "Not measured: no evaluation was handed in." if evaluation is None else evaluation.to_markdown(),
        "## Training",
        "Not recorded." if config["training"] is None else f"```json\n{json.dumps(config['training'], indent=2)}\n```",
        "## Intended use and limits",
        INTENDED_USE,
        "\n".join(f"- {limit}" for limit in (*LIMITS, describe_image_shape(guard.get("image_shape")))),
        "## Licence",
        "None is stated. Whoever publishes this guard chooses one, adds it to the header as `license:`, and minds "
        "those of the backbone's weights and of the training data."
        if details.licence is None
        else f"{details.licence}. Mind those of the backbone's weights and of the training data as well.",
    ]
    return "\n\n".join(lines) + "\n"


def describe_image_shape(shape: list[int] | tuple[int, ...] | str | None) -> str:
    """One sentence about the shape of the images that a guard takes."""
    if shape is None:
        return "No shape of images was recorded: mind that they are as large as those it was trained on."
    if isinstance(shape, str):
        return "It takes images of every shape that its network can take."
    return f"It takes images of shape ({', '.join(map(str, shape))}) alone, as it was trained on; others are an error."


def _printable_json(value: Any) -> str:
    """JSON on one line, with letters as they are, and with escapes for characters that change how others are shown."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)


def describe_thresholds(
    calibrated: bool, calibration: Calibration | None, class_names: Sequence[str] | None = None
) -> str:
    """One or two sentences about how the thresholds of a guard were fitted."""
    if not calibrated:
        return "None: fit them with `Calibrator` before use; until then no image is accepted."
    if calibration is None:
        return "Set without a `Calibrator`: nothing is known of their false-positive rate."
    correct = sum(calibration.counts)
    refused = Rate(round(calibration.realised_rate * correct), correct)
    pooled = ""
    if calibration.pooled:
        which = f"Classes {list_classes(calibration.pooled, class_names)} share a pooled threshold"
        pooled = f" {which}: the rate holds on average over all classes, not for each of these."
    return (
        f"One per class, fitted by the {calibration.method} method for a false-positive rate of "
        f"{calibration.false_positive_rate:g} on {calibration.images} benign images. {correct} of these are classified "
        f"correctly, {min(calibration.counts)} in the smallest class, and the thresholds refuse {refused}.{pooled}"
    )
