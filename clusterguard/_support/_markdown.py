"""Text in Markdown. Names that users choose, such as those of classes, are shown literally and never read as markup."""

import re


def escape_markdown(text: str) -> str:
    r"""Escape a text for a paragraph, a list or a cell of a table, and put it on one line.

    Args:
        text: text to show, which may contain markup.

    Example:
        >>> print(escape_markdown("a|b <i>\nc* d_e"))
        a\|b &lt;i> c\* d_e
    """
    line = re.sub(r"[\\`*|\[\]~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", _one_line(text))
    line = re.sub(r"&(?=#|\w+;)", "&amp;", line).replace("<", "&lt;")
    return re.sub(
        r"^(\d+(?=[.)])|(?=[-#+=>]))", r"\1\\", line
    )  # characters that would begin a heading, a list or a quotation


def code_in_markdown(text: str) -> str:
    """Show a text as code within a line.

    Args:
        text: text to show, which may contain backticks.

    Example:
        >>> print(code_in_markdown("resnet18"), code_in_markdown("a`b"))
        `resnet18` `` a`b ``
    """
    line = _one_line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
