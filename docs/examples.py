"""Lets the reference show what a docstring calls an Example as the session it is: for Google style that is Examples."""

import re
from typing import Any

import griffe


class ShowExamples(griffe.Extension):
    """Without it prompts are taken for quotations, and lines run into each other."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section; texts that only refer to another example stay as they are."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:(?=\s+>>>)", r"\1Examples:", obj.docstring.value, flags=re.M)
