"""A labelled data set held in memory, and stratified choices from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Dataset(torch.utils.data.Dataset):
    """Inputs and labels as two tensors, with the story of where they came from.

    It is also a map-style `torch.utils.data.Dataset`, so a `DataLoader` takes it;
    `assay.data.Batches` is much faster because it never touches single examples.

    Args:
        x: Inputs, `(N, C, H, W)` for images or `(N, d)`, floating point; images are in [0, 1].
        y: Class indices, `(N,)`, int64.
        classes: The name of each class; `classes[y[i]]` names example `i`.
        name: Name of the data set, e.g. `"mnist"`.
        split: `"train"` or `"test"`.
        source: One sentence: where the bytes came from.
        checksum: SHA-256 of the whole split before scaling and before any choice of a subset
            (pixels as stored, then labels), so that it does not depend on the file format.

    Raises:
        ValueError: If `x` and `y` differ in length, or a label has no class name.

    Example:
        >>> import torch
        >>> from assay.data import Dataset
        >>> data = Dataset(torch.zeros(3, 2), torch.tensor([0, 1, 1]), ("no", "yes"))
        >>> len(data), data[0][1].item(), data.num_classes
        (3, 0, 2)
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...] = ()
    name: str = ""
    split: str = ""
    source: str = ""
    checksum: str = ""

    def __post_init__(self) -> None:
        if self.x.ndim == 0 or self.y.ndim != 1 or len(self.x) != len(self.y):
            raise ValueError(
                "x and y must hold the same number of examples along their first dimension, "
                f"got shapes {tuple(self.x.shape)} and {tuple(self.y.shape)}"
            )
        if self.y.dtype != torch.int64:
            raise ValueError(f"y must be class indices of dtype torch.int64, got {self.y.dtype}")
        if len(self.y) and self.classes:
            low, high = int(self.y.min()), int(self.y.max())
            if low < 0 or high >= len(self.classes):
                raise ValueError(
                    f"y must lie in [0, {len(self.classes) - 1}] (one of {len(self.classes)} "
                    f"classes), got values from {low} to {high}"
                )

    @property
    def num_classes(self) -> int:
        """How many classes there are (also those without an example here)."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.x.shape)
        return f"Dataset({self.name} {self.split}, {shape}, {self.num_classes} classes)"

    def select(self, index: Tensor | Sequence[int], note: str = "") -> "Dataset":
        """Return the examples at `index`, in that order, as a copy.

        Args:
            index: Positions, `(M,)` integers.
            note: Added to `source`, so that a result says what was chosen.
        """
        index = torch.as_tensor(index, dtype=torch.int64, device=self.y.device)
        source = f"{self.source}; {note}" if note else self.source
        return replace(self, x=self.x[index], y=self.y[index], source=source)

    def subset(self, n: int, seed: int = 0) -> "Dataset":
        """Return `n` examples with the class proportions of the whole, in random order.

        The same `(n, seed)` always gives the same examples.

        Args:
            n: How many, from 1 to `len(self)`.
            seed: Seed of the choice.

        Raises:
            ValueError: If `n` is not in that range.
        """
        note = f"{n:,} of {len(self):,} examples, stratified, seed {seed}"
        return self.select(stratified(self.y, n, seed), note)


def stratified(y: Int[Tensor, " n"], n: int, seed: int = 0) -> Int[Tensor, " m"]:
    """Return the positions of `n` labels chosen with the proportions of all of them.

    Class `c`, with `n_c` of the `N` labels, gets `n n_c / N` rounded up or down (largest
    remainders first), so its share is off by less than one example.

    Args:
        y: Class indices, `(N,)`.
        n: How many to choose, from 1 to `N`.
        seed: Seed of the choice.

    Returns:
        Positions, `(n,)` int64, in random order.

    Raises:
        ValueError: If `n` is not in that range.

    Example:
        >>> import torch
        >>> from assay.data import stratified
        >>> y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
        >>> torch.bincount(y[stratified(y, 20, seed=1)]).tolist()
        [12, 6, 2]
    """
    total = len(y)
    if isinstance(n, bool) or not 1 <= n <= total:
        raise ValueError(f"n must be from 1 to the number of examples, {total}, got {n}")
    permutation = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    shuffled = y.cpu()[permutation]
    counts = torch.bincount(shuffled)
    quota, remainder = counts * n // total, counts * n % total
    missing = n - int(quota.sum())
    quota[remainder.argsort(descending=True, stable=True)[:missing]] += 1
    return permutation[rank_in_class(shuffled) < quota[shuffled]].to(y.device)


def rank_in_class(y: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return how many earlier labels equal each label: `[5, 3, 5, 5] -> [0, 0, 1, 2]`."""
    order = y.argsort(stable=True)
    counts = torch.bincount(y)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(y)
    rank[order] = torch.arange(len(y)) - first[y[order]]
    return rank
