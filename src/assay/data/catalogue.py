"""Data sets by name: where each may be, and how it becomes two tensors."""

import difflib
import os
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from assay.data import cache, cifar, embedded, mnist, usps
from assay.data.dataset import Dataset, stratified
from assay.data.download import download as fetch
from assay.data.download import offline
from assay.data.entry import Arrays, DataUnavailable, Description, Entry, Found
from assay.data.formats import DAMAGED

ENTRIES: dict[str, Entry] = {
    entry.about.name: entry for family in (embedded, mnist, cifar, usps) for entry in family.ENTRIES
}


def load(
    name: str,
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    progress: bool = True,
) -> Dataset:
    """Return a data set by name as two tensors.

    It is looked for in this order: `root` if given, else the folder named by the environment
    variable `ASSAY_DATA`; the platform's cache; installed packages; a download from the data
    set's own home, verified by its published checksum and kept in the cache. A download is not
    tried if `download` is false or `ASSAY_OFFLINE` is set.

    Every call returns tensors of its own: changing them affects nobody else.

    Args:
        name: One of `names()`, e.g. `"mnist5k"`, which needs neither files nor a network.
        split: `"train"` or `"test"`.
        limit: Keep at most this many examples, a stratified choice (see `Dataset.subset`).
        seed: Seed of that choice.
        root: A folder to look in first, laid out like `ASSAY_DATA`: one sub-folder a data set.
        download: Whether a download may be tried.
        progress: Whether to show progress of long steps on a terminal.

    Returns:
        The data set: `x` float32, `(N, C, H, W)` in [0, 1] for images and `(N, d)` as measured for
        tables; `y` int64, `(N,)`; the class names; and `source`, a sentence saying where the bytes
        came from.

    Raises:
        ValueError: If `name` or `split` is unknown, or `limit` is not positive.
        DataUnavailable: If the data is nowhere to be had, or a file found is damaged. One line
            that says what to do.

    Example:
        >>> from assay.data import load
        >>> data = load("digits", "test", limit=100)
        >>> tuple(data.x.shape), data.x.dtype, data.num_classes
        ((100, 1, 8, 8), torch.float32, 10)
        >>> data.source.split(" ")[0]
        'embedded:'
    """
    entry = _entry(name)
    _check_split(entry, split)
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit must be a positive number of examples or None, got {limit}")
    found = _find(entry, split, root) or _download(entry, split, root, download, progress)
    found = replace(found, read=partial(found.read, progress))
    arrays, digest = _decoded(name, split, found)
    y = torch.from_numpy(arrays.y)
    source = f"{found.place} ({arrays.note})" if arrays.note else found.place
    if limit is not None and limit < len(y):
        chosen = stratified(y, limit, seed)
        note = f"{limit:,} of {len(y):,} examples, stratified, seed {seed}"
        arrays, source = _take(arrays, chosen.numpy()), f"{source}; {note}"
    x = torch.from_numpy(arrays.x).to(torch.float32, copy=True).div_(entry.scale)
    y = torch.from_numpy(arrays.y).clone()
    return Dataset(x, y, entry.about.classes, name, split, source, digest)


def names() -> tuple[str, ...]:
    """Return the names of all data sets.

    Example:
        >>> from assay.data import names
        >>> names()[:2]
        ('mnist5k', 'digits')
    """
    return tuple(ENTRIES)


def describe(name: str) -> Description:
    """Return what a data set is: shape, classes, sizes, licence, reference.

    Args:
        name: One of `names()`.

    Raises:
        ValueError: If `name` is unknown.

    Example:
        >>> from assay.data import describe
        >>> print(describe("cifar10"))
        cifar10: CIFAR-10 tiny photographs; 3x32x32, 10 classes, 50,000 train, 10,000 test
    """
    return _entry(name).about


def available(name: str, split: str = "train") -> str | None:
    """Return where a data set would be read from without a download, or `None`.

    Args:
        name: One of `names()`.
        split: `"train"` or `"test"`.

    Raises:
        ValueError: If `name` or `split` is unknown.

    Example:
        >>> from assay.data import available
        >>> available("mnist5k").startswith("embedded: 5,000 MNIST images")
        True
    """
    entry = _entry(name)
    _check_split(entry, split)
    found = _find(entry, split, None)
    return None if found is None else found.place


def _entry(name: str) -> Entry:
    if name in ENTRIES:
        return ENTRIES[name]
    near = difflib.get_close_matches(str(name).lower().replace("_", "-"), ENTRIES, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown data set {name!r}: {hint}The names are {', '.join(ENTRIES)}")


def _check_split(entry: Entry, split: str) -> None:
    if split not in entry.about.sizes:
        valid = " or ".join(repr(name) for name in entry.about.sizes)
        raise ValueError(f"split must be {valid}, got {split!r}")


def _roots(entry: Entry, root: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Folders to look in, each under the words that name it in `Dataset.source`."""
    roots = {}
    if root is not None:
        roots["the folder given to load"] = Path(root).expanduser()
    elif os.environ.get("ASSAY_DATA"):
        roots["the folder ASSAY_DATA"] = Path(os.environ["ASSAY_DATA"]).expanduser()
    roots[f"the cache, from {entry.about.home}"] = cache.root()
    return roots


def _find(entry: Entry, split: str, root: str | os.PathLike[str] | None) -> Found | None:
    for place, base in _roots(entry, root).items():
        for folder in entry.folders:
            found = entry.find(base / folder, split)
            if found is not None:
                return replace(found, place=f"{found.place} in {place}")
    return entry.packaged(split)


def _download(
    entry: Entry,
    split: str,
    root: str | os.PathLike[str] | None,
    allowed: bool,
    progress: bool,
) -> Found:
    if not allowed:
        raise DataUnavailable(_missing(entry, split, root, "download=False forbids a download"))
    if offline():
        raise DataUnavailable(_missing(entry, split, root, "ASSAY_OFFLINE forbids a download"))
    folder = cache.root() / entry.folders[0]
    try:
        for remote in entry.remotes[split]:
            if not (folder / remote.file).is_file():
                fetch(remote, folder, progress)
    except DataUnavailable as error:
        raise DataUnavailable(_missing(entry, split, root, str(error))) from error
    found = _find(entry, split, root)
    if found is None:
        raise DataUnavailable(_missing(entry, split, root, f"a download into {folder} vanished"))
    return found


def _missing(entry: Entry, split: str, root: str | os.PathLike[str] | None, reason: str) -> str:
    places = " or ".join(str(base / entry.folders[0]) for base in _roots(entry, root).values())
    unset = "" if root is not None or os.environ.get("ASSAY_DATA") else " (ASSAY_DATA is not set)"
    files = " and ".join(remote.urls[0] for remote in entry.remotes[split])
    advice = f", or install {entry.advice}" if entry.advice else ""
    return (
        f"the {split} split of {entry.about.name} is not in {places}{unset}, and {reason}: "
        f"allow the download, or put {files} into a folder named {entry.folders[0]} and set "
        f"ASSAY_DATA to the folder that holds it{advice}"
    )


# A few whole splits as stored (a byte a pixel) stay in memory; `load` always hands out copies.
@lru_cache(maxsize=6)
def _decoded(name: str, split: str, found: Found) -> tuple[Arrays, str]:
    path = cache.path_of(name, split, found)
    cached = cache.read(path)
    if cached is not None:
        return cached
    try:
        x, y, note = found.read()
        # torch takes no array that is read-only, as one over the bytes of a file is.
        x, y = (np.require(array, requirements=["C", "W"]) for array in (x, y))
        arrays = Arrays(x, y, note)
        _check(ENTRIES[name], split, arrays)
    except DAMAGED as error:
        files = ", ".join(str(file) for file in found.files)
        raise DataUnavailable(
            f"{name} cannot be read from {files or found.place}: {' '.join(str(error).split())}; "
            "delete or replace what is damaged"
        ) from error
    digest = cache.checksum(arrays)
    cache.write(path, arrays, digest)
    return arrays, digest


def _check(entry: Entry, split: str, arrays: Arrays) -> None:
    about = entry.about
    expected = (about.sizes[split], *about.shape)
    if arrays.x.shape != expected or arrays.y.shape != expected[:1]:
        raise ValueError(
            f"the {split} split has inputs of shape {arrays.x.shape} and {len(arrays.y)} labels, "
            f"expected {expected}"
        )
    if arrays.y.min() < 0 or arrays.y.max() >= len(about.classes):
        raise ValueError(f"labels go from {arrays.y.min()} to {arrays.y.max()}")


def _take(arrays: Arrays, index: np.ndarray) -> Arrays:
    return Arrays(arrays.x[index], arrays.y[index], arrays.note)
