"""One pass over parameter, gradient and moments for AMSGrad and AdamNC on the CPU."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, njit, types
from torch import Tensor

from assay.kernels.threads import pointer, run_on_threads, take

# Elements that a thread takes at a time: few enough that no thread waits long for the other at the
# end of a step, enough that listing them (about 3 µs) costs little beside 0.8 ns an element.
_CHUNK = 1 << 16

# Below this many elements of a step a second thread costs more than it saves: about 100 µs.
_PARALLEL = 1 << 18

SUPPORTED_DTYPES = (torch.float32, torch.float64)


@njit(nogil=True, cache=True, error_model="numpy")
def _update(
    param_at,
    grad_at,
    exp_avg_at,
    exp_avg_sq_at,
    max_exp_avg_sq_at,
    size,
    sign,
    shrink,
    weight_decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    inverse_correction,
    step_size,
    eps,
    zero,
):
    param = carray(pointer(param_at, zero), size)
    grad = carray(pointer(grad_at, zero), size)
    exp_avg = carray(pointer(exp_avg_at, zero), size)
    exp_avg_sq = carray(pointer(exp_avg_sq_at, zero), size)
    if max_exp_avg_sq_at is not None:
        max_exp_avg_sq = carray(pointer(max_exp_avg_sq_at, zero), size)
    for i in range(size):
        x = param[i] * shrink
        g = sign * grad[i] + weight_decay * x
        m = beta1 * exp_avg[i] + one_minus_beta1 * g
        v = beta2 * exp_avg_sq[i] + one_minus_beta2 * (g * g)
        exp_avg[i] = m
        exp_avg_sq[i] = v
        if max_exp_avg_sq_at is not None:
            corrected = v * inverse_correction
            highest = max_exp_avg_sq[i]
            # Written so that a NaN in v is kept, as torch.maximum keeps it.
            v = highest if highest >= corrected else corrected
            max_exp_avg_sq[i] = v
        scale = math.sqrt(v) + eps
        move = step_size * m / scale
        param[i] = x - (zero if scale == zero else move)


@njit(nogil=True, cache=True, error_model="numpy")
def _work(job_at, zero):
    """Take chunks until there is none.

    A job holds a counter, the number of chunks, and where their integers (five addresses and a
    size) and their numbers begin.
    """
    job = carray(pointer(job_at, types.int64(0)), 4)
    integers = carray(pointer(job[2], types.int64(0)), (job[1], 6))
    numbers = carray(pointer(job[3], zero), (job[1], 11))
    while True:
        i = take(job_at)
        if i >= job[1]:
            return
        a, s = integers[i], numbers[i]
        if a[4] == 0:
            _update(
                a[0], a[1], a[2], a[3], None, a[5],
                s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10],
            )  # fmt: skip
        else:
            _update(
                a[0], a[1], a[2], a[3], a[4], a[5],
                s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10],
            )  # fmt: skip


class AdamUpdate(NamedTuple):
    """One parameter's update; the tensors are changed in place.

    All tensors are dense CPU tensors of one dtype (float32 or float64) with equal strides.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step_size: float
    beta1: float
    beta2: float
    second_correction: float
    eps: float
    weight_decay: float
    shrink: float
    maximize: bool

    @property
    def written(self) -> list[Tensor]:
        """What the update changes."""
        written = [self.param, self.exp_avg, self.exp_avg_sq]
        return written if self.max_exp_avg_sq is None else [*written, self.max_exp_avg_sq]

    def integers(self) -> Iterator[list[int]]:
        """Where the tensors' parts of a chunk begin, 0 for no tensor, and its size; by chunk."""
        tensors = (self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq)
        begin = [0 if t is None else t.data_ptr() for t in tensors]
        size, width = self.param.numel(), self.param.element_size()
        for start in range(0, size, _CHUNK):
            here = [at + start * width if at else 0 for at in begin]
            yield [*here, min(_CHUNK, size - start)]

    def numbers(self) -> tuple[float, ...]:
        """What the kernel takes after the tensors."""
        return (
            -1.0 if self.maximize else 1.0,
            self.shrink,
            self.weight_decay,
            self.beta1,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            1 / self.second_correction,
            self.step_size,
            self.eps,
            0.0,
        )


def adam_updates_(updates: Sequence[AdamUpdate]) -> None:
    """Update parameters and their moments in place, in one pass over memory.

    The work is split over `torch.get_num_threads()` threads, which take it in small chunks: one
    that is held up by other programs does not hold up the step.

    Args:
        updates: of different parameters.
    """
    written = [tensor for update in updates for tensor in update.written]
    # The kernel writes behind autograd's back: a graph that saved one of these must notice.
    torch.autograd.graph.increment_version(written)
    for dtype in SUPPORTED_DTYPES:
        alike = [update for update in updates if update.param.dtype == dtype]
        if alike:
            _run(alike, np.float32 if dtype == torch.float32 else np.float64)


def _run(updates: Sequence[AdamUpdate], number: type) -> None:
    """All chunks of parameters of one dtype, on as many threads as are worth it."""
    chunks = [(part, u.numbers()) for u in updates for part in u.integers()]
    integers = np.array([part for part, _ in chunks], dtype=np.int64)
    numbers = np.array([values for _, values in chunks], dtype=number)
    job = np.array([0, len(chunks), integers.ctypes.data, numbers.ctypes.data], dtype=np.int64)
    small = sum(update.param.numel() for update in updates) < _PARALLEL
    threads = 1 if small else torch.get_num_threads()
    run_on_threads(_work, job.ctypes.data, number(0), threads)
