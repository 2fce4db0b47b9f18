"""What makes a training the one that it is, in words that are the same whenever it is started.

A checkpoint keeps them, and `fit` refuses to go on from one with other words. What may differ is left out on purpose:
the number of epochs, devices, when and where checkpoints are written, what is shown and reported, and global seeds, for
a checkpoint brings the global random states back. So is what a checkpoint compares itself: names and shapes of weights,
and the number of processes.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

from clusterguard._support import digest_of
from clusterguard.detection import Loader, Pairs, number_of_batches
from clusterguard.training._options import TrainingOptions
from torch import Tensor, nn
from torch.optim import Optimizer

_LONGEST = 200  # characters of a value
_DEEPEST = 8  # values within values
_NAMED_AT_MOST = 10  # differences
_HOW = {"params", "lr", "foreach", "fused", "capturable", "differentiable"}  # of an optimizer: how it computes


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """Each option as text, and each option of an option under a name of its own.

    The text has no addresses in memory: functions and objects that do not print themselves are known by their names and
    those of their classes.

    Args:
        options: values by name: numbers, dataclasses, functions, anything.

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
        if len(inner) == len(value):  # plain values
            yield name, _clipped(f"({', '.join(text for _, text in inner)})")
            return
        yield name, f"{len(value)} values"
    elif not isinstance(value, Mapping):
        yield name, type(value).__qualname__
    yield from inner


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a value; None if it has none."""
    if isinstance(value, type):
        return None
    if is_dataclass(value):
        return [(part.name, getattr(value, part.name, None)) for part in fields(value) if part.repr]
    if isinstance(value, partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, Mapping):
        return [(key if isinstance(key, str) else _text(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(str(index), part) for index, part in enumerate(value)]
    return None


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
    if isinstance(name, str):  # classes, functions, methods
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
    """An optimizer with its hyperparameters, and the class of a scheduler.

    Args:
        optimizer: optimizer that has taken no step of this training yet.
        scheduler: or None.
    """
    groups = [
        {"lr": group.get("initial_lr", group.get("lr"))}  # a scheduler may have changed the rate for its first epoch
        | {name: value for name, value in group.items() if name not in {*_HOW, "initial_lr"}}
        for group in optimizer.param_groups
    ]
    named = (
        {"optimizer": groups[0]} if len(groups) == 1 else {f"optimizer.{i}": group for i, group in enumerate(groups)}
    )
    kinds = {"optimizer": type(optimizer), "scheduler": None if scheduler is None else type(scheduler)}
    return describe(kinds) | describe(named)


def describe_options(options: TrainingOptions, precision: str) -> dict[str, str]:
    """The options that change weights.

    Args:
        options: options of the training.
        precision: mixed precision of the accelerator.
    """
    names = ("clip_norm", "average_decay", "weight_perturbation", "schedule_every", "precision", "memory_format")
    chosen = {name: getattr(options, name) for name in names}
    return describe({"options": chosen | {"accumulate": options.batches_per_step, "mixed precision": precision}})


def describe_data(name: str, loader: Loader) -> dict[str, str]:
    """The numbers of a loader's batches, of its images, and of those in a batch, as far as it tells them.

    Args:
        name: name of the loader.
        loader: any.
    """
    while isinstance(loader, Pairs):
        loader = loader.loader
    sizes = {"batches": number_of_batches(loader), "batch size": getattr(loader, "batch_size", None)}
    with suppress(AttributeError, TypeError, NotImplementedError):  # of a list, and of a stream
        sizes["images"] = len(loader.dataset)  # type: ignore[attr-defined]
    return describe({f"{name} {what}": size for what, size in sizes.items() if isinstance(size, int)})


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What has changed, in words; what one of the two does not know is no difference.

    Args:
        before: description that was kept, perhaps by another version.
        now: description of today.

    Example:
        >>> differences({"eps": "0.1", "steps": "3"}, {"eps": "0.2", "steps": "3", "start": "image"})
        ['eps was 0.1, is 0.2']
    """
    return [f"{key} was {before[key]}, is {text}" for key, text in now.items() if before.get(key, text) != text]


def listed(names: Iterable[str]) -> str:
    """Differences on one line, each once, the first ten of them."""
    some = list(dict.fromkeys(names))
    more = [f"{len(some) - _NAMED_AT_MOST} more"] if len(some) > _NAMED_AT_MOST else []
    return "; ".join(some[:_NAMED_AT_MOST] + more)
