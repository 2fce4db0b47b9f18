"""Names of classes: where a loader tells them, and messages that use them."""

import warnings
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

_MOST = 10  # classes that a message names


@runtime_checkable
class HasClassNames(Protocol):
    """A detector that can know what its classes are called.

    It states no buffer, which `isinstance` does not find from Python 3.12 on.
    """

    class_names: Sequence[str] | None


def _names_of_data_set(loader: object) -> tuple[str, ...] | None:
    """The names of the classes that the data set of a loader tells in its attribute `classes`, as `ImageFolder` does.

    Args:
        loader: loader, or object around one that holds it in its attribute `loader`.

    Returns:
        Names in the order of the labels; None if the data set tells none.
    """
    while not isinstance(loader, DataLoader) and hasattr(loader, "loader"):
        loader = loader.loader
    data = getattr(loader, "dataset", None)
    while isinstance(data, Subset | ConcatDataset):
        data = data.dataset if isinstance(data, Subset) else data.datasets[0]
    names = getattr(data, "classes", None)
    is_right = (
        isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
    )
    return tuple(names) if is_right and names and len(set(names)) == len(names) else None


def learn_class_names(detector: object, loader: object) -> None:
    """Give a detector the names that a loader tells, unless it has names already.

    Args:
        detector: any detector; those that have no names stay as they are.
        loader: loader as in `_names_of_data_set`.

    Warns:
        UserWarning: the loader has the same classes in another order.
    """
    names = _names_of_data_set(loader)
    if (
        names is None
        or not isinstance(detector, HasClassNames)
        or len(names) != len(getattr(detector, "thresholds", ()))
    ):
        return
    if detector.class_names is None:
        detector.class_names = names
    elif set(names) == set(detector.class_names) and names != tuple(detector.class_names):
        index = next(i for i, (one, other) in enumerate(zip(names, detector.class_names, strict=True)) if one != other)
        warnings.warn(
            f"the loader's classes are those of the detector in another order: label {index} is {names[index]!r} there "
            f"and {detector.class_names[index]!r} for the detector; sort one of them like the other",
            stacklevel=3,
        )


def name_class(index: int, names: Sequence[str] | None) -> str:
    """A class in a message, such as "class 3 (cat)"."""
    return f"class {index}" + (f" ({names[index]})" if names else "")


def list_classes(indices: Sequence[int], names: Sequence[str] | None) -> str:
    """The first ten of some classes, by name if names are known.

    Example:
        >>> list_classes([0, 2], None), list_classes([0, 2], ["cat", "dog", "eel"])
        ('[0, 2]', "['cat', 'eel']")
    """
    shown = str([names[index] if names else index for index in indices[:_MOST]])
    return shown + (f" and {len(indices) - _MOST} more" if len(indices) > _MOST else "")


def list_counts(counts: Tensor, chosen: Tensor, names: Sequence[str] | None) -> str:
    """The first ten of the classes that were chosen (K,), with their counts (K,)."""
    indices = chosen.nonzero().flatten().tolist()
    listing = ", ".join(f"{name_class(index, names)}: {int(counts[index])}" for index in indices[:_MOST])
    return listing + (f" and {len(indices) - _MOST} more classes" if len(indices) > _MOST else "")
