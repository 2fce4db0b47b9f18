"""Descriptions of trainings as text, by which `fit` recognises that a checkpoint belongs to another training.

A description lists everything that changes the weights of the training, in words that are the same at every start. A
checkpoint keeps the description, and `fit` refuses a checkpoint with another one. A description leaves out what may
differ between an interrupted and a resumed run: the number of epochs, devices, places and times of checkpoints,
progress bars and reports, and global seeds, because a checkpoint restores the global random states. It also leaves out
the shapes of weights and the number of processes, which are compared separately.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from numbers import Integral, Real
from types import BuiltinFunctionType, FunctionType
from typing import Any

from clusterguard._support import digest_of, names_in_eval_mode
from clusterguard.detection import Loader, Pairs
from clusterguard.detection._internal import number_of_batches
from clusterguard.detectors import DetectorModule, Head, Normalize
from clusterguard.training._contents import describe_contents
from clusterguard.training._options import TrainingOptions
from clusterguard.training._own_code import MAY_CHANGE, UNKNOWN_KIND, settings_inside
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

_LONGEST = 200  # largest number of characters of a value
_DEEPEST = 8  # largest number of values that a value is nested in
_LONGEST_ROW = 20  # largest number of values in a plain attribute of a module
_NAMED_AT_MOST = 10  # largest number of differences in an error message
# Entries of an optimizer's groups that do not change its results, or that are described otherwise.
_HOW = {"params", "lr", "foreach", "fused", "capturable", "differentiable"}


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """Describe options as text, with a line for each option and for each part of an option that has parts.

    Functions are described by their names, and objects without a readable `repr` by the names of their classes. If they
    are a user's own, the settings inside them are described too. So the text contains no addresses in memory.

    Args:
        options: values of any type by name, such as numbers, dataclasses and functions.

    Example:
        >>> from clusterguard.training import ClusterLoss, Outside
        >>> list(describe({"loss": ClusterLoss(target=Outside()), "rate": 0.5}).items())[:3]
        [('loss', 'ClusterLoss'), ('loss.target', 'Outside'), ('loss.target.margin', '0.1')]
        >>> describe({"attack": lambda detector, images, labels: images})
        {'attack': '<lambda>'}
    """
    return dict(line for name, value in options.items() for line in _lines(name, value, 0))


def _lines(name: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    parts = _parts(value)
    if depth == _DEEPEST or parts is None:
        yield name, _text(value)
        return
    inner = [line for key, part in parts for line in _lines(f"{name}.{key}", part, depth + 1)]
    if isinstance(value, list | tuple):
        if len(inner) == len(value):  # the values have no parts
            yield name, _clipped(f"({', '.join(text for _, text in inner)})")
            return
        yield name, f"{len(value)} values"
    elif not isinstance(value, Mapping):
        yield name, type(value).__qualname__ if is_dataclass(value) or isinstance(value, partial) else _text(value)
    yield from inner


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a value; None if it has none."""
    if is_dataclass(value) and not isinstance(value, type):
        named = [(part.name, getattr(value, part.name, None)) for part in fields(value) if part.repr]
        return named + settings_inside(value)
    if isinstance(value, partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, Mapping):
        return [(key if isinstance(key, str) else _text(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(str(index), part) for index, part in enumerate(value)]
    parts = settings_inside(value)
    if isinstance(value, nn.Module):
        with suppress(Exception):  # a module of the user's may print itself with an error
            parts.append(("printed", repr(value)))
    return parts or None


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return f"tensor {tuple(value.shape)} {digest_of(value)[:8]}"
        value = value.item()
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, Real):
        return str(int(value)) if isinstance(value, Integral) else repr(float(value)).removesuffix(".0")
    if isinstance(value, Set):
        return _clipped(f"{{{', '.join(sorted(map(_text, value)))}}}")
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):  # the value is a class, a function or a method
        return name
    kind: Any = type(value)
    if isinstance(value, nn.Module) or kind.__repr__ is object.__repr__:
        return str(kind.__qualname__)
    return _clipped(re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value)))


def _clipped(text: str) -> str:
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} … {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def describe_steps(optimizer: Optimizer, scheduler: Any) -> dict[str, str]:
    """Describe an optimizer with its hyperparameters, and a scheduler.

    Settings of the scheduler may change, because some depend on the number of epochs.

    Args:
        optimizer: optimizer that has taken no step of this training yet.
        scheduler: scheduler of the optimizer, or None.
    """
    groups = [
        {"lr": group.get("initial_lr", group.get("lr"))}  # a scheduler may have changed the learning rate already
        | {name: value for name, value in group.items() if name not in {*_HOW, "initial_lr"}}
        for group in optimizer.param_groups
    ]
    named = (
        {"optimizer": groups[0]} if len(groups) == 1 else {f"optimizer.{i}": group for i, group in enumerate(groups)}
    )
    kinds = {"optimizer": type(optimizer), "scheduler": None if scheduler is None else type(scheduler)}
    settings = describe({"scheduler": _settings_of_scheduler(scheduler)})
    may_change = {f"{name.removesuffix(MAY_CHANGE)}{MAY_CHANGE}": text for name, text in settings.items()}
    return describe(kinds) | describe(named) | may_change


def _settings_of_scheduler(scheduler: Any) -> dict[str, Any]:
    """The settings of a scheduler that has taken no step yet, and of those inside it."""
    with suppress(Exception):  # a scheduler of the user's may raise anything
        inner = enumerate(getattr(scheduler, "_schedulers", ()))
        settings: dict[str, Any] = {str(index): _settings_of_scheduler(part) for index, part in inner}
        settings["lr_lambdas"] = getattr(scheduler, "lr_lambdas", None)
        state = scheduler.state_dict().items()
        return {name: value for name, value in state if name not in ("_schedulers", "_last_lr")} | settings
    return {}


def describe_options(options: TrainingOptions, precision: str) -> dict[str, str]:
    """Describe the options of training steps that change weights.

    Args:
        options: options of the training.
        precision: mixed precision of the accelerator.
    """
    names = (
        "clip_norm",
        "average_decay",
        "weight_perturbation",
        "schedule_every",
        "precision",
        "memory_format",
        "augment",
    )
    chosen = {name: getattr(options, name) for name in names}
    return describe({"options": chosen | {"accumulate": options.batches_per_step, "mixed precision": precision}})


def describe_data(name: str, loader: Loader) -> dict[str, str]:
    """Describe the data of a loader: the numbers of its batches and images, the batch size, and what it holds.

    Args:
        name: name of the loader in the description.
        loader: loader of any kind.
    """
    while isinstance(loader, Pairs):
        loader = loader.loader
    sizes = {"batches": number_of_batches(loader), "batch size": getattr(loader, "batch_size", None)}
    with suppress(AttributeError, TypeError, NotImplementedError):  # lists and streams have no such length
        sizes["images"] = len(loader.dataset)  # type: ignore[attr-defined]
    generators = (getattr(place, "generator", None) for place in (loader, getattr(loader, "sampler", None)))
    for generator in generators:
        if isinstance(generator, Generator):  # a checkpoint keeps its state, so another seed is no other run
            sizes[f"seed of the loader{MAY_CHANGE}"] = generator.initial_seed()
    numbers = describe({f"{name} {what}": size for what, size in sizes.items() if isinstance(size, int)})
    return numbers | describe_contents(name, loader)


def describe_detector(detector: DetectorModule) -> dict[str, str]:
    """Describe how a detector is built: the classes and plain attributes of its modules, but not its weights.

    Args:
        detector: detector before its first step.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector
        >>> lines = describe_detector(ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Dropout(0.1)), 2))
        >>> lines["detector.classifier.1"], lines["detector.classifier.1.p"]
        ('Dropout', '0.1')
    """
    described: dict[str, Any] = {}
    for name, module in detector.named_modules():
        place = f"detector.{name}".removesuffix(".")
        described[place] = type(module)
        plain = {key: value for key, value in vars(module).items() if key[0] != "_" and _is_plain(value)}
        described |= {f"{place}.{key}": value for key, value in plain.items() if key != "training"}
        if isinstance(module, Head):
            described |= {f"{place}.{key}": value for key, value in module.options().items()}
        if isinstance(module, Normalize):
            described |= {
                f"{place}.mean": module.mean.flatten().tolist(),
                f"{place}.std": module.std.flatten().tolist(),
            }
    frozen = names_in_eval_mode(detector) if detector.training else detector.frozen
    described["modules in eval mode"] = set(frozen)
    described["fixed weights"] = {name for name, weight in detector.named_parameters() if not weight.requires_grad}
    return describe(described)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, a function or a short row of such values."""
    if isinstance(value, tuple | list):
        return len(value) <= _LONGEST_ROW and all(
            not isinstance(part, tuple | list) and _is_plain(part) for part in value
        )
    return value is None or isinstance(value, bool | int | float | str | FunctionType | BuiltinFunctionType)


def digest_of_weights(state: Mapping[str, Any]) -> str:
    """A digest of all weights and buffers in the state dict of a detector, except its thresholds."""
    return digest_of({name: value for name, value in state.items() if name != "thresholds"})


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The differences between two descriptions, in words.

    Lines that only one of the descriptions has do not count, because another version may describe more or less. Nor do
    those of `doubts`.

    Args:
        before: description in a checkpoint.
        now: description of the present training.

    Example:
        >>> differences({"eps": "0.1", "steps": "3"}, {"eps": "0.2", "steps": "3", "start": "image"})
        ['eps was 0.1, is 0.2']
    """
    return [
        f"{key} was {before[key]}, is {text}"
        for key, text in now.items()
        if before.get(key, text) != text and not key.endswith(MAY_CHANGE)
    ]


def doubts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What two descriptions leave open, in words: values that may change by themselves, and that cannot be compared.

    Args:
        before: description in a checkpoint.
        now: description of the present training.

    Example:
        >>> doubts({"attack.calls (may change)": "0"}, {"attack.calls (may change)": "7"})
        ['attack.calls was 0, is 7']
    """
    return [
        f"{key} is {text}, which cannot be compared"
        if text.startswith(UNKNOWN_KIND)
        else f"{key.removesuffix(MAY_CHANGE)} was {before[key]}, is {text}"
        for key, text in now.items()
        if text.startswith(UNKNOWN_KIND) or (key.endswith(MAY_CHANGE) and before.get(key, text) != text)
    ]


def listed(names: Iterable[str]) -> str:
    """The first ten differences on one line, each named once."""
    some = list(dict.fromkeys(names))
    more = [f"{len(some) - _NAMED_AT_MOST} more"] if len(some) > _NAMED_AT_MOST else []
    return "; ".join(some[:_NAMED_AT_MOST] + more)
