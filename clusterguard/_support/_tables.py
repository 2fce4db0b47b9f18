"""Values that users name."""

from collections.abc import Mapping
from typing import TypeVar

from clusterguard.errors import ConfigurationError

Value = TypeVar("Value")


def look_up(name: str, table: Mapping[str, Value], what: str) -> Value:
    """The value with this name.

    Args:
        name: name that a user gave.
        table: values by name.
        what: word for such a value, with its article.

    Raises:
        ConfigurationError: the name is unknown.

    Example:
        >>> look_up("two", {"one": 1, "two": 2}, "a number")
        2
    """
    if name not in table:
        raise ConfigurationError(f"expected {what} among {', '.join(table)}, got {name!r}")
    return table[name]
