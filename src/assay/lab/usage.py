"""Mistakes of a user, told in one line with what would be right."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any


class UsageError(ValueError):
    """What a user asked for cannot be done; the message is one line that says what can."""


def unknown(kind: str, name: str, valid: Sequence[str] | Mapping[str, Any], of: str = "") -> str:
    """One line on an unknown name, with the nearest valid ones.

    Example:
        >>> unknown("preset", "smal", ["smoke", "small", "paper"])
        "unknown preset 'smal'; did you mean small?"
    """
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(valid)}"
    return f"unknown {kind} {name!r}{f' of {of}' if of else ''}; {hint}"
