"""The user's data, in whatever form: read as little of it as the examination needs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from assay import data as named
from assay.data import stratified
from assay.lab.usage import UsageError

MAX_BYTES = 256 * 2**20  # of inputs that are held at a time, a split
MAX_STREAMED = 200  # batches read of a loader that has no places to read from
MAX_SINGLE = 64 * MAX_STREAMED  # samples read of a stream that has no batches
INPUT_KEYS = ("x", "input", "inputs", "pixel_values", "image", "img", "input_ids", "data")
TARGET_KEYS = ("y", "label", "labels", "target", "targets")


@dataclass(frozen=True)
class Drawn:
    """Samples of one split.

    Args:
        x: inputs, `(N, ...)`.
        y: targets, `(N, ...)`.
        index: places in the user's data, `(N,)`.
        size: how many there are in all; None if unknown.
        note: how they were chosen.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    size: int | None
    note: str


@dataclass(frozen=True)
class Data:
    """Train and test data with the names of its classes; what a `--data` callable may return.

    Args:
        train: a dataset, a loader, or a pair of arrays `(x, y)`.
        test: the same; None to take the train data for both, which the report says.
        classes: their names, or None.
        name: for the report.

    Example:
        >>> import torch
        >>> from assay.examine import Data
        >>> Data(train=(torch.zeros(3, 2), torch.zeros(3))).test is None
        True
    """

    train: Any
    test: Any = None
    classes: Sequence[str] | None = None
    name: str = ""


def as_data(given: Any) -> Data:
    """What a user gave as data, in one form.

    Args:
        given: `Data`; a mapping with `train`, perhaps `test`, `classes`, `name`; a pair
            `(train, test)`; a dataset or loader; or the name of one of Assay's data sets.

    Raises:
        UsageError: if it is none of these.

    Example:
        >>> from assay.examine.sources import as_data
        >>> as_data("digits").name
        'digits'
    """
    if isinstance(given, Data):
        return given
    if isinstance(given, str):
        return _by_name(given)
    if isinstance(given, Mapping):
        unknown = set(given) - {"train", "test", "classes", "name"}
        if "train" not in given or unknown:
            raise UsageError(
                "data as a mapping has the keys train, and perhaps test, classes, name; "
                f"got {', '.join(sorted(map(str, given)))}"
            )
        return Data(**given)
    if isinstance(given, tuple | list):
        if len(given) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in given):
            return Data(train=tuple(given))
        if len(given) == 2:
            return Data(train=given[0], test=given[1])
        raise UsageError(f"data as a tuple is (train, test), got {len(given)} parts")
    if hasattr(given, "__getitem__") or hasattr(given, "__iter__"):
        return Data(train=given)
    raise UsageError(
        "data must be a dataset, a loader, a pair (train, test) of them, a mapping, or the name "
        f"of a data set, got {type(given).__name__}"
    )


def _by_name(name: str) -> Data:
    if name not in named.names():
        raise UsageError(f"no data set {name!r}; there are: {', '.join(named.names())}")
    train, test = (named.load(name, split) for split in ("train", "test"))
    return Data(train, test, train.classes, name)


def draw(source: Any, n: int, seed: int) -> Drawn:
    """Read at most `n` samples of a split, stratified where the labels can be had cheaply.

    Only the chosen samples are read of a dataset with places; of a stream at most
    `MAX_STREAMED` batches or `MAX_SINGLE` samples pass, one at a time.

    Args:
        source: a dataset, a loader, an iterable of batches, or a pair of arrays.
        n: how many, at most; fewer where inputs are so large that they would fill the memory.
        seed: of the choice.

    Raises:
        UsageError: if the source is empty or its samples are not pairs of input and target.

    Example:
        >>> import torch
        >>> from assay.examine.sources import draw
        >>> drawn = draw((torch.zeros(10, 2), torch.arange(10) % 2), 4, seed=0)
        >>> drawn.y.sort().values.tolist(), drawn.size
        ([0, 0, 1, 1], 10)
    """
    if isinstance(source, tuple | list) and len(source) == 2:
        return _from_arrays(source[0], source[1], n, seed)
    streamed = isinstance(getattr(source, "dataset", source), IterableDataset)
    if isinstance(source, DataLoader) and source.batch_sampler is not None and not streamed:
        sampler = getattr(source.batch_sampler, "sampler", source.sampler)
        # A loader of a part of its dataset must not show the rest, which may be test samples.
        part = getattr(sampler, "indices", None)
        dataset = source.dataset if part is None else Subset(source.dataset, part)
        return _from_dataset(dataset, source.collate_fn, n, seed)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not streamed:
        return _from_dataset(source, default_collate, n, seed)
    if isinstance(source, Iterable):
        return _from_stream(source, n, seed)
    raise UsageError(f"a {type(source).__name__} is neither a dataset nor a loader")


def _from_arrays(x: Any, y: Any, n: int, seed: int) -> Drawn:
    """Of tensors or arrays, which may be views of files."""
    x, y = (part if isinstance(part, Tensor) else np.asarray(part) for part in (x, y))
    if len(x) != len(y):
        raise UsageError(f"x and y differ in length: {len(x)} and {len(y)}")

    def read(places: Tensor) -> tuple[Tensor, Tensor]:
        return as_pair([part[places if isinstance(part, Tensor) else places.numpy()]
                        for part in (x, y)])  # fmt: skip

    return _from_places(read, len(x), _as_labels(y), n, seed)


def _from_dataset(dataset: Any, collate: Callable, n: int, seed: int) -> Drawn:
    def read(places: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for chunk in places.split(256):
            samples = [dataset[i] for i in chunk.tolist()]
            try:
                parts.append(as_pair(collate(samples)))
            except (TypeError, RuntimeError) as error:
                raise UsageError(
                    f"the samples cannot be made into a batch: {_first_line(error)}; give a "
                    "dataset with a transform to tensors of one shape, or a loader with its "
                    "collate function"
                ) from error
        return _joined(torch.cat, parts)

    return _from_places(read, len(dataset), _labels(dataset), n, seed)


def _joined(join: Callable, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all parts, joined by `torch.cat` or `torch.stack`."""
    try:
        return join([x for x, _ in parts]), join([y for _, y in parts])
    except RuntimeError as error:
        raise UsageError(f"the samples differ in shape: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _labels(dataset: Any) -> Tensor | None:
    """All labels of a dataset, if it keeps them apart from the inputs."""
    for name in ("y", "targets", "labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, Tensor | np.ndarray | list | tuple) and len(found) == len(dataset):
            return _as_labels(found)
    tensors = getattr(dataset, "tensors", None)
    if isinstance(tensors, tuple) and len(tensors) == 2:
        return tensors[1]
    inner, places = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and places is not None:
        labels = _labels(inner)
        return None if labels is None else labels[torch.as_tensor(places)]
    return None


def _as_labels(found: Any) -> Tensor | None:
    try:
        return found if isinstance(found, Tensor) else torch.tensor(np.asarray(found))
    except (TypeError, ValueError):  # labels that are no numbers
        return None


def _from_places(
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    size: int,
    labels: Tensor | None,
    n: int,
    seed: int,
) -> Drawn:
    if size == 0:
        raise UsageError("the data is empty")
    first, _ = read(torch.zeros(1, dtype=torch.int64))
    n = _affordable(first, min(n, size))
    if n == size:
        places, note = torch.arange(size), f"all {size:,}"
    elif labels is not None and labels.ndim == 1 and not labels.is_floating_point():
        _, codes = labels.cpu().unique(return_inverse=True)
        places, note = stratified(codes, n, seed), f"{n:,} of {size:,}, stratified by class"
    else:
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(size, generator=generator)[:n]
        note = f"{n:,} of {size:,}, at random"
    places = places.sort().values
    x, y = read(places)
    return Drawn(x, y, places, size, note)


def _from_stream(batches: Iterable, n: int, seed: int) -> Drawn:
    """A uniform choice from what passes (reservoir sampling)."""
    generator = np.random.default_rng(seed)
    kept: list[tuple[Tensor, Tensor, int]] = []
    seen, iterator = 0, iter(batches)
    for passed, batch in enumerate(iterator, 1):
        x, y = as_pair(batch)
        single = y.ndim == 0  # a stream of samples, not of batches
        if single:
            x, y = x[None], y[None]
        if len(x) != len(y):
            raise UsageError(f"a batch has {len(x)} inputs and {len(y)} targets")
        if not seen and len(x):
            n = _affordable(x[:1], n)
        for i in range(len(x)):
            place = seen if seen < n else int(generator.integers(seen + 1))
            if place < n:
                entry = (x[i].clone(), y[i].clone(), seen)
                kept[place : place + 1] = [entry]
            seen += 1
        if passed == (MAX_SINGLE if single else MAX_STREAMED):
            break
    if not kept:
        raise UsageError("the data is empty")
    whole = next(iterator, None) is None
    note = f"{len(kept):,} of {'the' if whole else 'the first'} {seen:,}, at random"
    kept.sort(key=lambda entry: entry[2])
    x, y = _joined(torch.stack, [entry[:2] for entry in kept])
    places = torch.tensor([place for _, _, place in kept])
    return Drawn(x, y, places, seen if whole else None, note)


def _affordable(one: Tensor, n: int) -> int:
    return max(1, min(n, MAX_BYTES // max(1, one.numel() * max(4, one.element_size()))))


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Input and target of a batch.

    Args:
        batch: `(x, y)`, or a mapping with one of the usual names for each.

    Raises:
        UsageError: if it is neither, or not made of tensors.

    Example:
        >>> import torch
        >>> from assay.examine.sources import as_pair
        >>> x, y = as_pair({"pixel_values": torch.zeros(2, 3), "labels": torch.zeros(2)})
        >>> x.shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Mapping):
        x = next((batch[key] for key in INPUT_KEYS if key in batch), None)
        y = next((batch[key] for key in TARGET_KEYS if key in batch), None)
        if x is None or y is None:
            raise UsageError(
                f"a sample has the keys {', '.join(map(str, batch))}; an examination needs one of "
                f"{', '.join(INPUT_KEYS)} and one of {', '.join(TARGET_KEYS)}"
            )
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        x, y = batch
    else:
        raise UsageError(
            "a sample must be a pair (x, y) or a mapping, got "
            + (f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__)
        )
    pair = []
    for name, part in (("input", x), ("target", y)):
        try:
            pair.append(torch.as_tensor(part))
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(
                f"the {name} of a sample must be a tensor, got {type(part).__name__}; give a "
                "dataset with a transform that makes one"
            ) from None
    return pair[0], pair[1]
