"""Many outer products at once, written past the cache.

Individual gradients of a linear layer are outer products, as many numbers as samples × weights, and
writing them is all the work. An ordinary store reads the memory that it overwrites.
"""

import numpy as np
import torch
from numba import carray, njit, types
from torch import Tensor

from assay.kernels.tensors import NUMBERS, is_plain
from assay.kernels.threads import (
    LINE,
    pointer,
    run_on_threads,
    stream_fence,
    stream_scaled,
    take,
)

__all__ = ["outer_products", "outer_products_reference"]

LARGE = 1 << 25
"""Bytes of a result that no core's own cache holds; smaller ones are left to torch."""

_CHUNK = 1 << 18
"""Bytes that a thread takes at a time."""


def outer_products_reference(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Do what `outer_products` does, in plain torch."""
    return torch.mul(left.unsqueeze(2), right.unsqueeze(1), out=out)


@njit(nogil=True, cache=True, error_model="numpy")
def _rows(out_at, left_at, right_at, start, stop, rows, columns, width, zero):
    """Rows `start` to `stop` of all matrices, one below the other."""
    lanes = LINE // width
    factors = carray(pointer(left_at, zero), stop)
    for row in range(start, stop):
        factor = factors[row]
        source_at = right_at + (row // rows) * columns * width
        source = carray(pointer(source_at, zero), columns)
        target_at = out_at + row * columns * width
        target = carray(pointer(target_at, zero), columns)
        first = min(columns, -target_at % LINE // width)  # where a line of the cache begins
        last = first + (columns - first) // lanes * lanes
        for j in range(first):
            target[j] = factor * source[j]
        for j in range(first, last, lanes):
            stream_scaled(target_at + j * width, source_at + j * width, factor)
        for j in range(last, columns):
            target[j] = factor * source[j]


@njit(nogil=True, cache=True, error_model="numpy")
def _work(job_at, zero):
    """Take chunks of rows until there is none."""
    job = carray(pointer(job_at, types.int64(0)), 9)
    out_at, left_at, right_at = job[1], job[2], job[3]
    total, rows, columns, width, chunk = job[4], job[5], job[6], job[7], job[8]
    while True:
        start = take(job_at) * chunk
        if start >= total:
            break
        stop = min(start + chunk, total)
        _rows(out_at, left_at, right_at, start, stop, rows, columns, width, zero)
    stream_fence()


def outer_products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out[n] = left[n] right[n]ᵀ.

    Large contiguous results of float32 or float64 on the CPU are written by a kernel, on
    `torch.get_num_threads()` threads, others by plain torch. It is meant for memory that has been
    written to before: new memory comes through the cache as the system fills it with zeros, and is
    written faster while it is there.

    Args:
        left: `(N, m)`.
        right: `(N, n)`.
        out: `(N, m, n)`, written and returned.
    """
    left, right = left.contiguous(), right.contiguous()
    tensors = (left, right, out)
    if (
        out.numel() * out.element_size() < LARGE
        or torch.compiler.is_compiling()
        or not all(map(is_plain, tensors))
        or any(x.requires_grad or x.dtype != out.dtype for x in tensors)
    ):
        return outer_products_reference(left, right, out)
    _, rows, columns = out.shape
    width = out.element_size()
    chunk = max(1, _CHUNK // (columns * width))
    job = np.array(
        [
            0, out.data_ptr(), left.data_ptr(), right.data_ptr(),
            left.numel(), rows, columns, width, chunk,
        ],
        dtype=np.int64,
    )  # fmt: skip
    # The kernel writes behind autograd's back: a graph that saved the result must notice.
    torch.autograd.graph.increment_version(out)
    run_on_threads(_work, job.ctypes.data, NUMBERS[out.dtype](0), torch.get_num_threads())
    return out
