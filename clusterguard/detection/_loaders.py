"""Batches of loaders: their images and labels, how many there are, and whether two loaders share images."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import GeneratorType
from typing import Any, NoReturn, final

import torch
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

Loader = Iterable[Any]
"""Batches of images (B, C, H, W) and labels (B,), in a form that `unpack_batch` knows: a DataLoader or a list."""

Unpack = Callable[[Any], tuple[Tensor, Tensor]]
"""A function from a batch of the loader to its images (B, C, H, W) and labels (B,)."""

IMAGE_KEYS = ("image", "images", "img", "pixel_values")
LABEL_KEYS = ("label", "labels", "target", "targets")
_HINT = "pass unpack=, a function from a batch to its images and labels"


def unpack_batch(batch: Any, unpack: Unpack | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch. A batch that can be read in two ways is refused.

    Args:
        batch: pair of images and labels, or a longer tuple that begins with them and holds nothing else that could be
            the labels, or a mapping with one of `IMAGE_KEYS` and one of `LABEL_KEYS`.
        unpack: function that finds images and labels in batches of any other form; None takes the rules above.

    Returns:
        Images (B, C, H, W) and labels (B,), not checked yet.

    Raises:
        InputError: it is not clear which parts are images and labels, or `unpack` does not return a pair.

    Example:
        >>> import torch
        >>> images, labels = unpack_batch({"pixel_values": torch.rand(2, 1, 4, 4), "labels": torch.tensor([0, 1])})
        >>> images.shape, labels.shape
        (torch.Size([2, 1, 4, 4]), torch.Size([2]))
    """
    if unpack is not None:
        pair = unpack(batch)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"expected unpack to return a pair of images and labels, got {type(pair).__name__}")
        return pair[0], pair[1]
    if isinstance(batch, Mapping):
        return _entry(batch, IMAGE_KEYS), _entry(batch, LABEL_KEYS)
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise InputError(f"expected batches of images and labels, got {type(batch).__name__}; {_HINT}")
    images, labels, *more = batch
    if more and (not _is_images(images) or not _is_labels(labels) or any(map(_is_labels, more))):
        raise InputError(
            f"expected batches of images and labels, got {len(batch)} parts, and it is unclear which of them are "
            f"images and labels; {_HINT}, such as lambda batch: (batch[0], batch[1])"
        )
    return images, labels


def _entry(batch: Mapping[Any, Any], keys: tuple[str, ...]) -> Any:
    present = [key for key in keys if key in batch]
    if len(present) != 1:
        raise InputError(
            f"expected batches with exactly one of the keys {', '.join(keys)}, got {', '.join(map(str, batch))}; "
            f"{_HINT}"
        )
    return batch[present[0]]


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _is_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point() and not value.is_complex()


@final
class Pairs:
    """A loader's batches as pairs of images and labels. Each iteration starts from the beginning.

    Args:
        loader: loader of batches in any form that `unpack_batch` knows.
        unpack: function as in `unpack_batch`.

    Raises:
        ConfigurationError: the loader is a data set of single images, or `unpack` is no function.

    Example:
        >>> import torch
        >>> loader = [{"image": torch.rand(2, 1, 4, 4), "label": torch.tensor([0, 1])}]
        >>> [labels.tolist() for _, labels in Pairs(loader)]
        [[0, 1]]
    """

    def __init__(self, loader: Iterable[Any], unpack: Unpack | None = None) -> None:
        source: object = loader
        if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
            _refuse_data_set("loader")
        if unpack is not None and not callable(unpack):
            raise ConfigurationError(f"expected unpack to be a function of a batch, got {unpack!r:.100}")
        self.loader, self.unpack = loader, unpack

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (unpack_batch(batch, self.unpack) for batch in self.loader)


def check_loader(loader: object, name: str) -> None:
    """Check that a loader gives batches, and gives them again in every pass.

    Args:
        loader: object to check.
        name: name of the loader in the error message.

    Raises:
        ConfigurationError: the loader is a data set, an iterator that is empty after one pass, or not iterable at all.
    """
    if isinstance(loader, Dataset):
        _refuse_data_set(name)
    source = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(source, Iterator) and not isinstance(source, Dataset):
        _refuse_one_pass(name, source)
    if not hasattr(loader, "__iter__"):
        raise ConfigurationError(
            f"expected a {name} that can be passed through repeatedly, got {type(loader).__name__}; pass a DataLoader, "
            "or a list of the batches"
        )


def check_passes(loader: object, name: str) -> None:
    """Check that neither a loader nor the stream that it reads returns the same iterator twice.

    Such an iterator is empty after one pass. The check skips loaders with workers, because each pass gives the workers
    fresh copies of the stream.

    Args:
        loader: loader that has passed `check_loader`. Two iterators are taken from it, which may change its state.
        name: name of the loader in the error message.

    Raises:
        ConfigurationError: if the check fails.
    """
    sources: list[Any] = [loader]
    if isinstance(loader, DataLoader):
        is_stream = isinstance(loader.dataset, IterableDataset) and not loader.num_workers
        sources = [loader.dataset] if is_stream else []
    while sources:
        source = sources.pop()
        if isinstance(source, ChainDataset):
            sources += source.datasets
            continue
        first = iter(source)
        if is_one_pass_iterator(first) and iter(source) is first:
            _refuse_one_pass(name, source)


def _refuse_data_set(name: str) -> NoReturn:
    raise ConfigurationError(
        f"expected a {name} of batches, got a data set of single images; wrap it in torch.utils.data.DataLoader"
    )


def _refuse_one_pass(name: str, source: object) -> NoReturn:
    raise ConfigurationError(
        f"expected a {name} that can be passed through repeatedly, got {type(source).__name__}, which allows one "
        "pass only; pass a DataLoader of a data set, a list of the batches, or a class whose __iter__ makes a new "
        "iterator each time"
    )


def is_one_pass_iterator(value: object) -> bool:
    """Whether a value is one of Python's built-in iterators, which run to their end once and never start again."""
    return isinstance(value, Iterator) and (
        isinstance(value, GeneratorType) or type(value).__module__ in ("builtins", "itertools")
    )


def number_of_batches(loader: object) -> int | None:
    """The number of batches in a pass through a loader; None if it is not known, as for an `IterableDataset`.

    Example:
        >>> number_of_batches([1, 2]), number_of_batches(iter([1, 2]))
        (2, None)
    """
    if isinstance(loader, Pairs):
        return number_of_batches(loader.loader)
    with suppress(TypeError, NotImplementedError):  # a DataLoader over a stream has a __len__ that fails
        return len(loader)  # type: ignore[arg-type]
    return None


def set_epoch(loader: object, epoch: int) -> None:
    """Tell the number of the epoch to every part of a loader that shuffles by it, such as a `DistributedSampler`.

    Args:
        loader: loader of any kind. Most have no such part.
        epoch: number of the epoch, counted from 0.
    """
    if isinstance(loader, Pairs):
        loader = loader.loader
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    parts = (loader, sampler, batches, getattr(batches, "sampler", None), getattr(loader, "dataset", None))
    for part in {id(part): part for part in parts}.values():
        tell = getattr(part, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def have_common_images(first: object, second: object) -> bool:
    """Whether two loaders certainly share images.

    They do if they share batches, items of a data set, files, or memory that holds images.

    Args:
        first: one loader.
        second: another loader, or the same one.

    Returns:
        True if they certainly share images; False if they do not, or if it cannot be found out.

    Example:
        >>> import torch
        >>> data = TensorDataset(torch.rand(4, 1, 2, 2), torch.arange(4))
        >>> halves = [DataLoader(Subset(data, part)) for part in ([0, 1], [2, 3])]
        >>> have_common_images(*halves), have_common_images(halves[0], DataLoader(data))
        (False, True)
    """
    if first is second:
        return True
    places, others = _places(first), _places(second)
    return any(not places[source].isdisjoint(others[source]) for source in places.keys() & others.keys())


def _places(loader: object) -> dict[object, set[int]]:
    """The positions of a loader's items in the data set or memory that holds them; empty if they are unknown."""
    places: dict[object, set[int]] = {}
    if isinstance(loader, list | tuple):
        places["batches"] = {id(batch) for batch in loader}
        for batch in loader:
            with suppress(InputError):
                _add_rows(places, unpack_batch(batch)[0], None)
    elif isinstance(loader, DataLoader):
        batches = loader.batch_sampler
        sampler = loader.sampler if batches is None else getattr(batches, "sampler", batches)
        if isinstance(sampler, SubsetRandomSampler):
            _add_items(places, loader.dataset, [int(index) for index in sampler.indices])
        elif type(batches) in (BatchSampler, type(None)) and isinstance(
            sampler, SequentialSampler | RandomSampler | WeightedRandomSampler
        ):
            _add_items(places, loader.dataset, range(len(loader.dataset)))  # type: ignore[arg-type]
    return places


def _add_items(places: dict[object, set[int]], data: Dataset[Any], indices: Iterable[int]) -> None:
    if isinstance(data, Subset):
        _add_items(places, data.dataset, [int(data.indices[index]) for index in indices])
    elif isinstance(data, ConcatDataset):
        parts: dict[int, list[int]] = {}
        for index in indices:
            part = bisect_right(data.cumulative_sizes, index)
            parts.setdefault(part, []).append(index - ([0, *data.cumulative_sizes])[part])
        for part, positions in parts.items():
            _add_items(places, data.datasets[part], positions)
    elif isinstance(data, TensorDataset):
        _add_rows(places, data.tensors[0], indices)
    elif files := _files_of(data):
        places.setdefault("files", set()).update(hash(os.path.realpath(files[index][0])) for index in indices)
    else:
        places.setdefault(_identity(data), set()).update(indices)


def _files_of(data: Any) -> list[tuple[str, Any]] | None:
    """The files and labels of a data set such as `ImageFolder`; other objects may read the same files."""
    samples = getattr(data, "samples", None)
    is_list = isinstance(samples, list) and samples and isinstance(samples[0], tuple) and isinstance(samples[0][0], str)
    return samples if is_list else None


def _identity(data: Any) -> object:
    """What is equal for objects that hold the same data, as torchvision's downloaded ones do, or else the object."""
    root = getattr(data, "root", None)
    if not isinstance(root, str | Path):
        return id(data)
    return type(data), os.path.realpath(root), *(str(getattr(data, name, None)) for name in ("train", "split"))


def _add_rows(places: dict[object, set[int]], images: object, indices: Iterable[int] | None) -> None:
    """Add rows of a tensor by their address in memory, so that rows of its slices count as the same; None adds all."""
    if isinstance(images, Tensor) and images.ndim and images.layout == torch.strided and not images.is_meta:
        start, step = int(images.storage_offset()), int(images.stride(0))
        rows = range(len(images)) if indices is None else indices
        memory = "memory", images.untyped_storage().data_ptr()
        places.setdefault(memory, set()).update(start + step * row for row in rows)
