"""Which models of timm and torchvision can be guarded.

`python -m benchmarks.studies.coverage` builds each model on torch's meta device, where tensors have shapes but no
values, and checks that it becomes an encoder. With `--labels`, it builds each model that a CPU can bear, and checks
that a guard around it gives images the model's own labels. Results are in benchmarks/results/coverage.json.
"""

import datetime
import gc
import json
import platform
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from clusterguard.detectors import ClusterGuard, find_normalization, find_num_classes, make_encoder
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks._support import write_json

COVERAGE_FILE = Path(__file__).parents[1] / "results" / "coverage.json"
LIBRARIES = ("timm", "torchvision")
_WIDTH = 20
_BATCH = 2
_SMALL = 30_000_000  # largest number of parameters of a model that a CPU runs in seconds
_SAVE_EVERY = 50
CHECKS = [
    "the number of classes is found, and a mean and a standard deviation for every channel",
    f"the encoder maps {_BATCH} images of the model's own size to a tensor of shape ({_BATCH}, {_WIDTH}) in eval mode",
    "its gradient in the images has their shape",
    f"in train mode too it returns a tensor of shape ({_BATCH}, {_WIDTH}), and nothing else",
]
LABELS = (
    f"kept: on {_BATCH} images the guard gives the labels of the model, and its representation is the model's logits "
    f"times a factor, less their mean; for models of at most {_SMALL // 10**6} million parameters, all moved at random"
)
# Where a model ran, or why it failed, by library, by "passed" or "failed", and by the model's name.
Outcomes = dict[str, dict[str, dict[str, str]]]
# Pairs of a device to build a model on and a device to run it on, cheapest first. Some constructors and forward passes
# look at the values of tensors, which the meta device does not have.
PLACES = {"meta": ("meta", "meta"), "meta, built on the CPU": ("cpu", "meta"), "CPU": ("cpu", "cpu")}


class CheckError(Exception):
    """An encoder ran, but its output or its gradient is not as expected."""


class Candidate(NamedTuple):
    """A model, the shape (C, H, W) of its images, and its number of classes."""

    model: nn.Module
    shape: tuple[int, int, int]
    num_classes: int | None


def list_models(library: str) -> list[str]:
    """The names of all classification models of timm or torchvision."""
    if library == "timm":
        import timm

        return list(timm.list_models())
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def build_candidate(library: str, name: str) -> Candidate:
    """Build a model with the defaults of its library, without pretrained weights."""
    if library == "timm":
        import timm

        model: Any = timm.create_model(name)
        return Candidate(model, tuple(model.pretrained_cfg["input_size"]), model.num_classes or None)
    import torchvision

    # By default, these two models draw their initial weights from a slow truncated normal distribution.
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    # The smallest size is taken, since some weights were fine-tuned at a size that the default model does not accept.
    size = min(weights.transforms().crop_size[0] for weights in torchvision.models.get_model_weights(name))
    return Candidate(model, (3, size, size), 1000)


def expect(what: str, expected: object, got: object) -> None:
    """Raise `CheckError` if two values differ. `what` names the values in the message."""
    if expected != got:
        raise CheckError(f"{what}: expected {expected}, got {got}")


def describe_output(output: object) -> str:
    """The type of an output, and its shape if it is a tensor."""
    return f"tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def check_encoder(candidate: Candidate) -> None:
    """Check that a model becomes an encoder.

    Raises:
        CheckError: it does not. Errors that the model itself raises are passed on.
    """
    model, shape, num_classes = candidate
    expect("number of classes", num_classes, find_num_classes(model))
    expect("length of mean and std", [shape[0]] * 2, [len(values) for values in find_normalization(model)])
    encoder = make_encoder(model, _WIDTH).eval()
    images = torch.rand(_BATCH, *shape, requires_grad=True)
    wanted = describe_output(torch.empty(_BATCH, _WIDTH))
    representations = encoder(images)
    expect("eval mode", wanted, describe_output(representations))
    (gradient,) = torch.autograd.grad(representations.sum(), images)
    expect("input gradient", describe_output(images), describe_output(gradient))
    expect("train mode", wanted, describe_output(encoder.train()(images)))


def compare_labels(library: str, name: str) -> str:
    """Whether a guard around a model gives its labels: "kept", or why not, or that the model is too large to try."""
    with torch.device("meta"):
        try:
            parameters = sum(weight.numel() for weight in build_candidate(library, name).model.parameters())
        except Exception:  # the constructor looks at values
            parameters = 0
    if parameters > _SMALL:
        return f"not tried with {parameters / 1e6:.0f} million parameters"
    torch.manual_seed(0)
    model, shape, _ = build_candidate(library, name)
    with torch.no_grad():
        for weight in model.parameters():  # many last layers start with zeros, under which all labels are equal
            weight.add_(0.02 * torch.randn_like(weight))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guard = ClusterGuard(model.eval()).eval()
    images = torch.rand(_BATCH, *shape)
    with torch.no_grad():
        logits, kept = model(guard.normalize(images)), guard.represent(images)
        logits, kept = logits - logits.mean(dim=1, keepdim=True), kept - kept.mean(dim=1, keepdim=True)
        scale = (logits * kept).sum() / logits.square().sum()
    if torch.allclose(kept, scale * logits, rtol=1e-3, atol=1e-3 * float(kept.abs().max())) and scale > 0:
        labels = guard(images).argmax(dim=1)
        return "kept" if torch.equal(labels, logits.argmax(dim=1)) else "other labels"
    return "; ".join(str(warning.message) for warning in caught) or "other logits, without a warning"


def try_labels(library: str, name: str) -> str:
    """The outcome of `compare_labels`, or the error that it raised."""
    try:
        return compare_labels(library, name)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def find_place(make: Callable[[], Candidate]) -> tuple[str | None, str]:
    """Find the first place where a model can run, and check the model there.

    Args:
        make: function that builds the model on the default device.

    Returns:
        The place and an empty reason, or None and the reasons for each place.
    """
    reasons: list[str] = []
    for place, (build_device, run_device) in PLACES.items():
        try:
            with torch.device(build_device):
                candidate = make()
            parameters = sum(parameter.numel() for parameter in candidate.model.parameters())
            if run_device == "cpu" and parameters > _SMALL:
                reasons.append(f"{place}: not tried with {parameters / 1e6:.0f} million parameters")
                continue
            candidate.model.to(run_device)
            with torch.device(run_device):
                check_encoder(candidate)
            return place, ""
        except CheckError as error:
            return None, f"{place}: {error}"
        except Exception as error:
            reasons.append(f"{place}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return None, "; ".join(reasons)


def try_name(outcome: dict[str, dict[str, str]], library: str, name: str, *, labels: bool) -> str:
    """Try a model, note the outcome, and return what went wrong."""
    if labels:
        outcome["labels"][name] = try_labels(library, name)
        return "" if outcome["labels"][name] == "kept" else outcome["labels"][name]
    place, reason = find_place(partial(build_candidate, library, name))
    for kind in ("passed", "failed"):
        outcome[kind].pop(name, None)
    outcome["failed" if place is None else "passed"][name] = place or reason
    return reason if place is None else ""


def load_outcomes(path: Path | None, versions: dict[str, str]) -> Outcomes:
    """Read the outcomes in a file. There are none if the file is missing or is about other versions."""
    content: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    libraries = content["libraries"] if content.get("versions") == versions else {}
    return {
        library: {kind: libraries.get(library, {}).get(kind, {}) for kind in ("passed", "failed", "labels")}
        for library in LIBRARIES
    }


def save_outcomes(path: Path, outcomes: Outcomes, names: dict[str, list[str]], versions: dict[str, str]) -> None:
    """Write all outcomes so far to a file."""
    libraries = {
        library: {
            "models": len(names[library]),
            "models_passed": len(outcome["passed"]),
            "failed": outcome["failed"],
            "not_tried": [name for name in names[library] if name not in outcome["passed"] | outcome["failed"]],
            "passed": {name: outcome["passed"][name] for name in names[library] if name in outcome["passed"]},
            "models_with_their_labels": sum(label == "kept" for label in outcome["labels"].values()),
            "models_tried_for_labels": sum(not label.startswith("not tried") for label in outcome["labels"].values()),
            "labels": {name: outcome["labels"][name] for name in names[library] if name in outcome["labels"]},
        }
        for library, outcome in outcomes.items()
    }
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "checks": CHECKS,
        "legend": {
            "passed": "name: where the model ran (meta: shapes only, no values)",
            "failed": "name: why",
            "labels": LABELS,
        },
        "libraries": libraries,
    }
    write_json(path, content)


def main(
    resume: Annotated[bool, typer.Option("--resume", help="Keep what has passed, try the rest.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="Check labels instead; keep all else.")] = False,
    only: Annotated[str, typer.Option(help="Try the names that match, such as 'vit_*', keep the rest.")] = "*",
    output: Annotated[Path, typer.Option(help="The JSON file.")] = COVERAGE_FILE,
) -> None:
    """Try every model of timm and torchvision as a backbone."""
    versions = {package: version(package) for package in ("torch", *LIBRARIES)}
    versions["python"] = platform.python_version()
    names = {library: list_models(library) for library in LIBRARIES}
    outcomes = load_outcomes(output if resume or labels or only != "*" else None, versions)
    todo = [
        (library, name)
        for library in LIBRARIES
        for name in names[library]
        if fnmatch(name, only) and not (resume and name in outcomes[library]["labels" if labels else "passed"])
    ]
    progress = tqdm(todo, unit="model")
    try:
        for done, (library, name) in enumerate(progress, start=1):
            progress.set_postfix_str(name)
            reason = try_name(outcomes[library], library, name, labels=labels)
            if reason:
                progress.write(f"{library} {name}: {reason}")
            if done % _SAVE_EVERY == 0:
                gc.collect()  # modules and their hooks form cycles
                save_outcomes(output, outcomes, names, versions)
    finally:
        save_outcomes(output, outcomes, names, versions)
    for library, outcome in outcomes.items():
        kept = sum(label == "kept" for label in outcome["labels"].values())
        passed = f"{len(outcome['passed'])} of {len(names[library])} pass"
        print(f"{library} {versions[library]}: {passed}, {kept} of {len(outcome['labels'])} keep their labels")
    raise typer.Exit(code=any(outcome["failed"] for outcome in outcomes.values()))


if __name__ == "__main__":
    typer.run(main)
