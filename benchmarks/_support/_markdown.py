"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]], *, others: str = "---") -> list[str]:
    """The lines of a table in Markdown.

    Args:
        head: titles of the columns.
        rows: cells of each row.
        others: line below the titles of all columns but the first, which says how they are aligned.

    Example:
        >>> markdown_table(["guard", "broken"], [["a", 3]])
        ['| guard | broken |', '| --- | --- |', '| a | 3 |']
    """
    lines = [head, ["---", *[others] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
