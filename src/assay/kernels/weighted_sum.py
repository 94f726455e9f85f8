"""A weighted sum of vectors in one pass over memory.

One operation of torch for each vector reads and writes the sum again and again; where many
processes share a machine's memory that takes longer than to receive the vectors.
"""

from collections.abc import Sequence

import torch
from numba import njit
from torch import Tensor

from assay.kernels.tensors import is_plain

__all__ = ["weighted_sum", "weighted_sum_reference"]


def weighted_sum_reference(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Do what `weighted_sum` does, in plain torch."""
    total = vectors[0] * weights[0]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total.add_(vector, alpha=weight)
    return total


@njit(nogil=True, cache=True)
def _sum_of_two(out, a, b, weight_a, weight_b):
    for i in range(out.size):
        out[i] = weight_a * a[i] + weight_b * b[i]


@njit(nogil=True, cache=True)
def _sum_of_three(out, a, b, c, weight_a, weight_b, weight_c):
    for i in range(out.size):
        out[i] = weight_a * a[i] + weight_b * b[i] + weight_c * c[i]


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ xᵢ as a new vector.

    Two or three contiguous float32 or float64 vectors on the CPU are added by a kernel (the first
    three, if there are more), others by plain torch.

    Args:
        vectors: One or more of the same length and dtype.
        weights: One number each.
    """
    first = vectors[0]
    kernel = {2: _sum_of_two}.get(len(vectors), _sum_of_three)
    if len(vectors) < 2 or torch.compiler.is_compiling() or not all(map(is_plain, vectors)):
        return weighted_sum_reference(vectors, weights)
    total = torch.empty_like(first)
    arrays = [vector.detach().numpy() for vector in vectors[:3]]
    factors = [total.numpy().dtype.type(weight) for weight in weights[:3]]
    kernel(total.numpy(), *arrays, *factors)
    for vector, weight in zip(vectors[3:], weights[3:], strict=True):
        total.add_(vector, alpha=weight)
    return total
