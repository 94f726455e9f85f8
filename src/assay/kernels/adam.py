"""One pass over parameter, gradient and moments for AMSGrad and AdamNC on the CPU."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor

# Below this many elements a second thread costs more than it saves (measured: about 30 µs to hand
# a chunk over, about 0.8 ns an element).
_CHUNK = 1 << 17

SUPPORTED_DTYPES = (torch.float32, torch.float64)


@njit(nogil=True, cache=True, error_model="numpy")
def _update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
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
    for i in range(param.size):
        x = param[i] * shrink
        g = sign * grad[i] + weight_decay * x
        m = beta1 * exp_avg[i] + one_minus_beta1 * g
        v = beta2 * exp_avg_sq[i] + one_minus_beta2 * (g * g)
        exp_avg[i] = m
        exp_avg_sq[i] = v
        if max_exp_avg_sq is not None:
            corrected = v * inverse_correction
            highest = max_exp_avg_sq[i]
            # Written so that a NaN in v is kept, as torch.maximum keeps it.
            v = highest if highest >= corrected else corrected
            max_exp_avg_sq[i] = v
        scale = math.sqrt(v) + eps
        move = step_size * m / scale
        param[i] = x - (zero if scale == zero else move)


def _flat(tensor: Tensor) -> np.ndarray:
    """View a dense tensor of any layout as a vector in memory order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()


def adam_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step_size: float,
    beta1: float,
    beta2: float,
    second_correction: float,
    eps: float,
    weight_decay: float,
    shrink: float,
    maximize: bool,
) -> None:
    """Update a parameter and its moments in place, in one pass over memory.

    The work is split over `torch.get_num_threads()` threads; the kernel holds no lock. All tensors
    are dense CPU tensors of one dtype (float32 or float64) with equal strides.
    """
    number = np.float32 if param.dtype == torch.float32 else np.float64
    scalars = [
        number(value)
        for value in (
            -1.0 if maximize else 1.0,
            shrink,
            weight_decay,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            1 / second_correction,
            step_size,
            eps,
            0.0,
        )
    ]
    written = [
        tensor for tensor in (param, exp_avg, exp_avg_sq, max_exp_avg_sq) if tensor is not None
    ]
    # numpy writes behind autograd's back: a graph that saved one of these must be able to notice.
    torch.autograd.graph.increment_version(written)
    arrays = [
        None if tensor is None else _flat(tensor)
        for tensor in (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)
    ]
    threads = min(torch.get_num_threads(), param.numel() // _CHUNK)
    if threads < 2:
        _update(*arrays, *scalars)
        return
    bounds = np.linspace(0, param.numel(), threads + 1).astype(np.int64)
    with ThreadPoolExecutor(threads) as pool:
        chunks = [
            pool.submit(
                _update,
                *(None if array is None else array[start:stop] for array in arrays),
                *scalars,
            )
            for start, stop in pairwise(bounds)
        ]
    for chunk in chunks:
        chunk.result()
