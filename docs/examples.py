"""An extension of griffe: `Example:` in a docstring is a section of code, as doctests are."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Reads the heading that the library uses as the one that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the heading in one docstring."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
