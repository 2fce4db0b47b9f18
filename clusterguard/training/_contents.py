"""Digests of the data that a loader holds, which `fit` compares to notice that the data changed.

Nothing is drawn from the loader, so neither its random states nor its transforms are touched. Only what it and its data
sets hold in attributes is read: tensors, arrays, lists of numbers and lists of files. Data sets that make their images
in another way are compared by their numbers, and by the first batch of a resumed pass.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from clusterguard._support import open_ordinary
from clusterguard.errors import PersistenceError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

_DEEPEST = 6  # largest number of objects that data are nested in
_MOST_BYTES = 2**30  # of a larger tensor, evenly spaced rows are read
_MOST_PARTS = 1000  # data sets in a list
_MOST_SIZES, _MOST_FILES, _MOST_OF_A_FILE = 2000, 100, 2**20  # evenly spaced files whose sizes or first bytes are read


def describe_contents(name: str, source: object) -> dict[str, str]:
    """Describe the images and labels that a loader or a data set holds, with one line for each attribute.

    Args:
        name: name of the source in the description.
        source: DataLoader, list of batches, or another object with batches or data in its attributes.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> list(describe_contents("training", DataLoader(TensorDataset(torch.zeros(4, 1), torch.arange(4)))))
        ['training.dataset.tensors']
    """
    return dict(_lines(name, source, set(), 0))


def _lines(place: str, source: Any, seen: set[int], depth: int) -> Iterator[tuple[str, str]]:
    if id(source) in seen or depth > _DEEPEST:
        return
    seen.add(id(source))
    digest = hashlib.sha256()
    if isinstance(source, Tensor | np.ndarray | list | tuple | range) and _add(digest, source, 0):
        yield place if depth else f"{place} content", f"{len(source)} parts {digest.hexdigest()[:12]}"
        return
    if isinstance(source, DataLoader):
        parts: Any = [("dataset", source.dataset)]
    elif isinstance(source, list | tuple):
        parts = [(str(index), part) for index, part in enumerate(source[:_MOST_PARTS]) if isinstance(part, Dataset)]
    elif _holds_data(source):
        parts = vars(source).items()
    else:
        return
    for key, part in parts:
        yield from _lines(f"{place}.{key}", part, seen, depth + 1)


def _holds_data(source: object) -> bool:
    """Whether an object is a data set, or a sequence or a loader of a user's own."""
    is_data = isinstance(source, Dataset) or hasattr(source, "__getitem__") or hasattr(source, "__iter__")
    return is_data and hasattr(source, "__dict__") and not isinstance(source, nn.Module | type)


def _add(digest: Any, value: Any, depth: int) -> bool:
    """Add data to a digest. Return True if there was data, and all of it was of known types."""
    if isinstance(value, Tensor):
        return _add_tensor(digest, value)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufcSU" or not value.ndim:
            return False
        step = 1 + value.nbytes // _MOST_BYTES
        digest.update(f"array {value.dtype} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value[::step]).tobytes())
        return True
    if isinstance(value, range):
        digest.update(repr(value).encode())
        return True
    if isinstance(value, Mapping):
        return depth < _DEEPEST and _add(digest, [*value], depth + 1) and _add(digest, [*value.values()], depth + 1)
    if isinstance(value, list | tuple):
        return bool(value) and _add_sequence(digest, value, depth)
    return False


def _add_tensor(digest: Any, value: Tensor) -> bool:
    if value.layout != torch.strided or value.is_meta or value.is_quantized or not value.ndim:
        return False
    digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
    rows = value.detach()[:: 1 + value.nbytes // _MOST_BYTES]
    flat = rows.resolve_conj().resolve_neg().cpu().contiguous().flatten()
    digest.update(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data)
    return True


def _add_sequence(digest: Any, values: Sequence[Any], depth: int) -> bool:
    kinds = set(map(type, values))
    digest.update(f"sequence {len(values)} ".encode())
    if kinds <= {int, bool, float}:
        with suppress(OverflowError):
            return _add(digest, np.asarray(values), depth)
    if kinds == {str} or all(issubclass(kind, PurePath) for kind in kinds):
        _add_names(digest, [*map(str, values)])
        return True
    if depth >= _DEEPEST:
        return False
    if kinds <= {list, tuple} and len(set(map(len, values))) == 1 and len(values) > 1:  # rows, such as (path, label)
        columns = [*zip(*values, strict=True)]
        return bool(columns) and all(_add(digest, column, depth + 1) for column in columns)
    return all(_add(digest, value, depth + 1) for value in values)


def _add_names(digest: Any, names: list[str]) -> None:
    """Add texts to a digest. For names of files, add relative paths, and a sample of sizes and contents."""
    is_of_files = _is_file(names[0])
    folder = os.path.commonpath([Path(names[0]).parent, min(names), max(names)]) if is_of_files else ""
    digest.update("\n".join(name[len(folder) :] for name in names).encode(errors="surrogatepass"))
    if not is_of_files:
        return
    for name in _spaced(names, _MOST_SIZES):
        with suppress(OSError, ValueError):
            digest.update(f"{Path(name).stat().st_size} ".encode())
    for name in _spaced(names, _MOST_FILES):
        if _is_file(name):
            with suppress(OSError, PersistenceError), open_ordinary(name) as file:
                digest.update(file.read(_MOST_OF_A_FILE))


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a text that is too long, or has a character 0, is no path
        return False


def _spaced(names: list[str], count: int) -> list[str]:
    return names[:: 1 + len(names) // count]
