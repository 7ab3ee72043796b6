"""An extension of the build: the sections of a docstring may follow one another without an empty line."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"(?<=[^\n])\n(?=(?:Args|Attributes|Returns|Yields|Raises):[ ]*\n)")


class Sections(griffe.Extension):
    """Put the empty line in that griffe wants before a section."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of every module, class, function and attribute as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub("\n\n", obj.docstring.value)
