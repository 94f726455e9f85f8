"""Accumulating gradients and finding the entries above a threshold, each in one pass over memory.

The kernels hold no lock and split their work over `torch.get_num_threads()` threads. Tensors that
are not float32 or float64 on the CPU take the plain torch references.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

__all__ = [
    "compensate_",
    "compensate_reference_",
    "select_at_least",
    "select_at_least_reference",
]

_CHUNK = 1 << 18  # entries below which a second thread costs more than it saves
_BLOCK = 256  # entries tested together: few of them hold a hit when 1 in 1000 is one

_UNSIGNED = {torch.float32: np.uint32, torch.float64: np.uint64}


# --------------------------------------------------------------------------- plain torch reference


def compensate_reference_(
    velocity: Tensor, error: Tensor, gradient: Tensor, momentum: float, nesterov: bool
) -> None:
    """Do what `compensate_` does, in plain torch."""
    if nesterov:
        velocity.add_(gradient).mul_(momentum)
        error.add_(velocity + gradient)
    else:
        velocity.mul_(momentum).add_(gradient)
        error.add_(velocity)


def select_at_least_reference(x: Tensor, threshold: float) -> Tensor:
    """Do what `select_at_least` does, in plain torch."""
    found = ~(x.abs() < threshold)
    return found.nonzero()[:, 0].to(_index_dtype(x.numel()))


# ----------------------------------------------------------------------------------------- kernels


@njit(nogil=True, cache=True)
def _compensate(velocity, error, gradient, momentum):
    for i in range(velocity.size):
        u = momentum * velocity[i] + gradient[i]
        velocity[i] = u
        error[i] += u


@njit(nogil=True, cache=True)
def _compensate_nesterov(velocity, error, gradient, momentum):
    for i in range(velocity.size):
        g = gradient[i]
        u = momentum * (velocity[i] + g)
        velocity[i] = u
        error[i] += u + g


@njit(nogil=True, cache=True)
def _select(bits, magnitude, threshold, start, out):
    # Without the sign, IEEE-754 numbers are in the order of their bits, NaN above infinity.
    found = 0
    for low in range(0, bits.size, _BLOCK):
        block = bits[low : min(bits.size, low + _BLOCK)]
        largest = block[0] & magnitude
        for i in range(block.size):
            largest = max(largest, block[i] & magnitude)
        if largest >= threshold:
            for i in range(block.size):
                if (block[i] & magnitude) >= threshold:
                    out[found] = start + low + i
                    found += 1
    return found


# ------------------------------------------------------------------------------------ torch's side


def compensate_(
    velocity: Tensor, error: Tensor, gradient: Tensor, momentum: float, nesterov: bool = False
) -> None:
    """Momentum correction in place: u ← m·u + g, v ← v + u.

    With `nesterov`: u ← m·(u + g), v ← v + u + g.

    Args:
        velocity: Vector u.
        error: Vector v, of the same dtype and length.
        gradient: Vector g, likewise.
        momentum: The factor m.
        nesterov: Use the second form.
    """
    if not _runs_kernels(velocity, error, gradient):
        compensate_reference_(velocity, error, gradient, momentum, nesterov)
        return
    kernel = _compensate_nesterov if nesterov else _compensate
    # numpy writes behind autograd's back: a graph that saved one of these must be able to notice.
    torch.autograd.graph.increment_version((velocity, error))
    u, v, g = velocity.numpy(), error.numpy(), gradient.detach().numpy()
    factor = u.dtype.type(momentum)
    _in_chunks(lambda low, high: kernel(u[low:high], v[low:high], g[low:high], factor), len(u))


def select_at_least(x: Tensor, threshold: float) -> Tensor:
    """Indices of the entries with |x| ≥ threshold, in order; NaN counts as largest.

    Args:
        x: Vector.
        threshold: A number that is not negative.

    Returns:
        int32 indices (int64 for vectors of 2^31 entries and more).
    """
    if not _runs_kernels(x):
        return select_at_least_reference(x, threshold)
    unsigned = _UNSIGNED[x.dtype]
    bits = x.detach().numpy().view(unsigned)
    limit = np.asarray(threshold, x.numpy().dtype).view(unsigned)[()]
    magnitude = unsigned(np.iinfo(unsigned).max >> 1)
    # Memory is given by the page when it is written: what is not found costs nothing.
    out = torch.empty(len(bits), dtype=_index_dtype(len(bits)))
    indices = out.numpy()

    def run(low: int, high: int) -> Tensor:
        found = _select(bits[low:high], magnitude, limit, low, indices[low:high])
        return out[low : low + found]

    return torch.cat(_in_chunks(run, len(bits)))


def _index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel < 2**31 else torch.int64


def _runs_kernels(*vectors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and all(
        x.device.type == "cpu" and x.dtype in _UNSIGNED and x.is_contiguous() for x in vectors
    )


def _in_chunks(run: Callable[[int, int], Any], n: int) -> list[Any]:
    """Run `run(low, high)` over [0, n), a range a thread; the results in order."""
    threads = max(1, min(torch.get_num_threads(), n // _CHUNK))
    bounds = [n * i // threads for i in range(threads + 1)]
    if threads == 1:
        return [run(0, n)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, bounds[:-1], bounds[1:]))
