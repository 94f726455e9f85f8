"""Mini-batches in pieces."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def count_samples(inputs: Any, batch_dim: int) -> int:
    """The length of the first tensor of `inputs` along `batch_dim`.

    Args:
        inputs: of a model.
        batch_dim: which dimension counts samples.

    Raises:
        TypeError: if there is no tensor with that dimension.
        ValueError: if the batch is empty.
    """
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim > batch_dim:
            if leaf.shape[batch_dim] == 0:
                raise ValueError("the batch is empty: a mean over no samples is not defined")
            return leaf.shape[batch_dim]
    raise TypeError(
        f"inputs must hold a tensor with a dimension {batch_dim}, got {type(inputs).__name__}"
    )


def slice_samples(tree: Any, index: Tensor | slice, samples: int, dim: int) -> Any:
    """The chosen samples of every tensor whose dimension `dim` counts samples.

    Args:
        tree: of tensors and other things.
        index: which samples.
        samples: N.
        dim: of the samples.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim <= dim or leaf.shape[dim] != samples:
            return leaf
        if isinstance(index, slice):
            return leaf[(slice(None),) * dim + (index,)]
        chosen = torch.arange(samples, device=leaf.device)[index.to(leaf.device)]
        return leaf.index_select(dim, chosen)

    return pytree.tree_map(one, tree)


def pieces(samples: int, chunk_size: int | None) -> Iterator[slice]:
    """Consecutive slices of at most `chunk_size` samples.

    Args:
        samples: N.
        chunk_size: None for one piece.
    """
    size = samples if chunk_size is None else chunk_size
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))
