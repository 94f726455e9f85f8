"""What the docstrings of Assay look like to Griffe, which mkdocstrings reads them with."""

import re
from typing import Any

import griffe


class DocstringSections(griffe.Extension):
    """Say in Griffe's words what the docstrings say in theirs.

    Griffe knows doctests only under the plural `Examples:`, and does not know that the fields of a
    pydantic model or a named tuple are what its constructor takes.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the headings of an object's docstring before it is parsed."""
        if obj.docstring is None:
            return
        obj.docstring.value = _renamed(obj.docstring.value, "Example", "Examples")
        if isinstance(obj, griffe.Class) and _has_fields(obj):
            obj.docstring.value = _renamed(obj.docstring.value, "Args", "Attributes")


def _renamed(docstring: str, old: str, new: str) -> str:
    return re.sub(rf"^(\s*){old}:\s*$", rf"\1{new}:", docstring, flags=re.MULTILINE)


def _has_fields(obj: griffe.Class) -> bool:
    return any(str(base) in ("BaseModel", "Stored", "NamedTuple") for base in obj.bases)
