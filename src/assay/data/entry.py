"""What the catalogue knows of one data set, and the words its parts talk in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np


class DataUnavailable(LookupError):  # noqa: N818  (the sentence a caller reads)
    """A data set cannot be had; the message is one line that says what to do.

    Example:
        >>> from assay.data import DataUnavailable
        >>> issubclass(DataUnavailable, LookupError)
        True
    """


class Arrays(NamedTuple):
    """One decoded split: `x` as stored (uint8 for images), `y` int64, and what to say of it."""

    x: np.ndarray
    y: np.ndarray
    note: str = ""


@dataclass(frozen=True)
class Found:
    """Where one split was found and how to read it.

    `place` says it in words (without a folder's path: it goes into published results), and
    `read(progress)` decodes it. Two of them are equal if they stand for the same bytes: the same
    files with the same sizes and times, or the same version of the same package.
    """

    identity: tuple[object, ...]
    place: str = field(compare=False)
    files: tuple[Path, ...] = field(compare=False)
    read: Callable[..., Arrays] = field(compare=False)

    @classmethod
    def at(cls, files: tuple[Path, ...], kind: str, read: Callable[..., Arrays]) -> "Found":
        """Describe files on disk; `kind` names their format, e.g. `"IDX files"`."""
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return cls(tuple(stats), kind, files, read)


@dataclass(frozen=True)
class Remote:
    """A file at its own home: the same bytes at every address of `urls`."""

    file: str
    md5: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """What a data set is.

    Args:
        name: Name for `load`.
        title: One line.
        shape: Shape of one input, `(C, H, W)`.
        classes: Class names, in the order of the labels.
        sizes: Number of examples a split.
        home: Web page.
        licence: Licence as far as known.
        reference: The paper or report to cite.

    Example:
        >>> from assay.data import describe
        >>> describe("mnist").sizes["train"]
        60000
    """

    name: str
    title: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    sizes: Mapping[str, int]
    home: str
    licence: str
    reference: str

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.shape)
        sizes = ", ".join(f"{count:,} {split}" for split, count in self.sizes.items())
        return f"{self.name}: {self.title}; {shape}, {len(self.classes)} classes, {sizes}"


def _nowhere(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Entry:
    """A data set of the catalogue: its description and its places.

    `find(folder, split)` looks in one folder, `packaged(split)` among installed packages; both
    return `None` if nothing is there. `folders` are names it may have beneath a root, ours first.
    `remotes` are the files to download for a split; `advice` completes "install ...".
    """

    about: Description
    folders: tuple[str, ...] = ()
    find: Callable[[Path, str], Found | None] = _nowhere
    packaged: Callable[[str], Found | None] = _nowhere
    remotes: Mapping[str, tuple[Remote, ...]] = field(default_factory=dict)
    advice: str = ""
    scale: float = 255.0
