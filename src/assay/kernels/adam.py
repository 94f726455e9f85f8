"""One pass over parameter, gradient and moments for AMSGrad and AdamNC on the CPU."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

# Elements that a thread takes at a time: few enough that no thread waits long for the other at the
# end of a step, enough that taking them (about 5 µs) costs nothing beside 0.8 ns an element.
_CHUNK = 1 << 16

# Below this many elements of a step a second thread costs more than it saves: about 100 µs.
_PARALLEL = 1 << 18

SUPPORTED_DTYPES = (torch.float32, torch.float64)


@intrinsic
def _pointer(typingctx, address, like):
    """To numbers of the type of `like`, at an address.

    Making numpy arrays of five tensors takes longer than a small parameter's whole step.
    """

    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build


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
    param = carray(_pointer(param_at, zero), size)
    grad = carray(_pointer(grad_at, zero), size)
    exp_avg = carray(_pointer(exp_avg_at, zero), size)
    exp_avg_sq = carray(_pointer(exp_avg_sq_at, zero), size)
    if max_exp_avg_sq_at is not None:
        max_exp_avg_sq = carray(_pointer(max_exp_avg_sq_at, zero), size)
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

    def addresses(self) -> list[int | None]:
        """Where the tensors begin."""
        tensors = (self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq)
        return [None if t is None else t.data_ptr() for t in tensors]

    def scalars(self) -> list[np.floating]:
        """What the kernel takes after the tensors, in their dtype."""
        number = np.float32 if self.param.dtype == torch.float32 else np.float64
        values = (
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
        return [number(value) for value in values]


def adam_updates_(updates: Sequence[AdamUpdate]) -> None:
    """Update parameters and their moments in place, in one pass over memory.

    The work is split over `torch.get_num_threads()` threads, which take it in small chunks: one
    that is held up (by other programs, or by torch's own threads, which spin for a while after
    their last work) does not hold up the step. The kernel holds no lock.

    Args:
        updates: of different parameters.
    """
    written = [tensor for update in updates for tensor in update.written]
    # The kernel writes behind autograd's back: a graph that saved one of these must notice.
    torch.autograd.graph.increment_version(written)
    threads = torch.get_num_threads()
    if threads < 2 or sum(update.param.numel() for update in updates) < _PARALLEL:
        for update in updates:
            _update(*update.addresses(), update.param.numel(), *update.scalars())
        return
    chunks = iter([chunk for update in updates for chunk in _chunks(update)])
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(_work, chunks) for _ in range(threads - 1)]
        _work(chunks)
    for other in others:
        other.result()


def _chunks(update: AdamUpdate) -> Iterator[tuple]:
    """Arguments of the kernel for a part of the parameter each."""
    addresses, scalars = update.addresses(), update.scalars()
    size, width = update.param.numel(), update.param.element_size()
    for start in range(0, size, _CHUNK):
        shifted = [None if at is None else at + start * width for at in addresses]
        yield (*shifted, min(_CHUNK, size - start), *scalars)


def _work(chunks: Iterator[tuple]) -> None:
    """Take chunks until there is none; all threads share the iterator, under the lock."""
    for chunk in chunks:
        _update(*chunk)
