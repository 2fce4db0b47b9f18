"""Copies of numbers, arrays, tensors and containers of them, as values that a checkpoint takes."""

import itertools
import math
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SCALARS = (bool, int, float, str, type(None))
_KINDS = "iufbc"  # kinds of NumPy types that are numbers


def replace_value(owner: Any, name: str, present: Any, value: Any) -> None:
    """Set an attribute, in place where possible, because other objects may hold its value too."""
    if type(present) is type(value) and isinstance(present, list | deque):
        present.clear()
        present.extend(value)
    elif type(present) is type(value) and isinstance(present, dict | set):
        present.clear()
        present.update(value)
    elif isinstance(present, np.ndarray) and np.shape(value) == present.shape and present.flags.writeable:
        present[...] = value
    else:
        setattr(owner, name, value.to(present.device) if isinstance(present, Tensor) else value)


def is_value(value: Any, *, limit: int | None) -> bool:
    """Whether a value is a number, string, tensor or array, or a container of them, of at most `limit` elements."""
    return _size(value, math.inf if limit is None else limit) >= 0


def _size(value: Any, limit: float) -> int:
    """The number of elements of a value; -1 if there are more than `limit`, or elements of other types."""
    if isinstance(value, _SCALARS) or (isinstance(value, np.generic) and value.dtype.kind in _KINDS):
        return 1
    if (isinstance(value, Tensor) and value.layout == torch.strided) or (
        isinstance(value, np.ndarray) and value.dtype.kind in _KINDS
    ):
        size = value.numel() if isinstance(value, Tensor) else value.size
        return size if size <= limit else -1
    if type(value) not in (list, tuple, dict, deque, set) or len(value) > limit:
        return -1
    total = 0
    for item in itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value:
        size = _size(item, limit - total)
        total += max(1, size)
        if size < 0 or total > limit:
            return -1
    return total


def copy_value(value: Any) -> Any:
    """Copy a value for which `is_value` is true.

    NumPy arrays, sets and other types that checkpoints cannot store become dicts that name the type.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray | np.generic):
        return {"array": torch.from_numpy(np.array(value)), "type": str(value.dtype)}
    if isinstance(value, dict):
        return {"dict": [[copy_value(name), copy_value(item)] for name, item in value.items()]}
    if isinstance(value, list | tuple | deque | set):
        items = [copy_value(item) for item in value]
        return (
            items
            if isinstance(value, list)
            else {type(value).__name__: items, "maxlen": getattr(value, "maxlen", None)}
        )
    return value


def restore_value(value: Any) -> Any:
    """The inverse of `copy_value`."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [restore_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return value["array"].numpy().astype(value["type"])[()]
    if "dict" in value:
        return {restore_value(name): restore_value(item) for name, item in value["dict"]}
    if "deque" in value:
        return deque(restore_value(value["deque"]), value["maxlen"])
    return tuple(restore_value(value["tuple"])) if "tuple" in value else set(restore_value(value["set"]))


def is_same(value: Any, other: Any) -> bool:
    """Whether two results of `copy_value` are equal."""
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        return value.dtype == other.dtype and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(is_same(item, other[name]) for name, item in value.items())
    if isinstance(value, list):
        return len(value) == len(other) and all(map(is_same, value, other))
    return bool(value == other)
