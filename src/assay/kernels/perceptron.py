"""One pass of margin-perceptron updates over a two-layer leaky-ReLU net, sample by sample.

The net is N(x) = Σ_i s_i σ(⟨w_i, x⟩) with fixed s_i and σ(z) = z for z > 0, αz otherwise. A sample
with y N(x) < 1 moves every row: w_i += η y s_i σ'(⟨w_i, x⟩) x. Two kernels make the same updates:

* `_direct` evaluates the net at every sample: visits × (rows × d) operations;
* `_cached` keeps all preactivations and, after an update, corrects those of the samples still to
  come by the Gram matrix of the data: updates × (rows × n) operations and next to none for a
  sample that needs no update. The rows themselves move once a pass, by one matrix product. It is
  the faster one as soon as updates are rare.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

# `_cached` holds twice rows × n numbers and an n × n Gram matrix; beyond these it does not pay.
LARGEST_CACHE = 1 << 25  # entries
LARGEST_GRAM = 1 << 13  # samples
SMALLEST_WEIGHT = 1 << 14  # entries; a smaller net is evaluated faster than it is looked up


# Sums may be reordered (that is what makes them fast); nothing else of IEEE arithmetic is given up.
@njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _direct(weight, x, signs, y, order, lr, slope, one, zero, found):
    rows, features = weight.shape
    active = np.empty(rows, dtype=np.bool_)
    count = 0
    changed = False
    for j in order:
        sample = x[j]
        output = zero
        for i in range(rows):
            row = weight[i]
            z = zero
            for f in range(features):
                z += row[f] * sample[f]
            active[i] = z > zero
            output += signs[i] * (z if active[i] else slope * z)
        if y[j] * output >= one:
            continue
        found[count] = j
        count += 1
        for i in range(rows):
            step = lr * y[j] * signs[i] * (one if active[i] else slope)
            if step != zero:
                changed = True
                row = weight[i]
                for f in range(features):
                    row[f] += step * sample[f]
    return count, changed


@njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _cached(preactivations, gram, signs, y, order, lr, slope, one, zero, found, steps):
    rows = signs.size
    n = order.size
    outputs = np.empty(n, dtype=signs.dtype)
    for t in range(n):
        z = preactivations[order[t]]
        output = zero
        for i in range(rows):
            output += signs[i] * (z[i] if z[i] > zero else slope * z[i])
        outputs[t] = output
    count = 0
    changed = False
    for t in range(n):
        j = order[t]
        if y[j] * outputs[t] >= one:
            continue
        step = steps[count]
        found[count] = j
        count += 1
        moved = False
        for i in range(rows):
            step[i] = lr * y[j] * signs[i] * (one if preactivations[j, i] > zero else slope)
            moved |= step[i] != zero
        if not moved:
            continue
        changed = True
        for later in range(t + 1, n):
            similarity = gram[j, order[later]]
            z = preactivations[order[later]]
            output = zero
            for i in range(rows):
                value = z[i] + step[i] * similarity
                z[i] = value
                output += signs[i] * (value if value > zero else slope * value)
            outputs[later] = output
    return count, changed


def gram_matrix(x: Tensor, rows: int) -> Tensor | None:
    """Return X Xᵀ if `perceptron_epoch` is better off with it, else None.

    Args:
        x: samples, (n, d).
        rows: hidden units of the net.
    """
    n, features = x.shape
    fits = n <= LARGEST_GRAM and n * rows <= LARGEST_CACHE
    large = rows * features >= SMALLEST_WEIGHT
    # A pass of updates only costs n²/2 a row here and 2nd there; later passes have few.
    return x @ x.T if fits and large and n <= 8 * features else None


def perceptron_epoch(
    weight: Tensor,
    signs: Tensor,
    x: Tensor,
    y: Tensor,
    order: Tensor,
    *,
    lr: float,
    slope: float,
    gram: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """Visit every sample once, in order, and update `weight` in place at those with y N(x) < 1.

    All tensors are on the CPU; `weight`, `signs`, `x`, `y` have one dtype, float32 or float64.

    Args:
        weight: rows w_i, (rows, d), contiguous.
        signs: s_i, (rows,).
        x: samples, (n, d).
        y: labels ±1, (n,).
        order: positions of the samples, (m,) int64, each at most once.
        lr: η.
        slope: α.
        gram: from `gram_matrix`, or None.

    Returns:
        The positions at which updates were made, in order, and whether any weight was changed
        (with α = 0 an update may change none).
    """
    number = np.float32 if weight.dtype == torch.float32 else np.float64
    scalars = [number(value) for value in (lr, slope, 1.0, 0.0)]
    found = torch.empty(order.numel(), dtype=torch.int64)
    weight = weight.detach()
    common = [t.detach().contiguous().numpy() for t in (signs, y, order)]
    if gram is None:
        # numpy writes behind autograd's back: a graph that saved the weight must notice.
        torch.autograd.graph.increment_version([weight])
        arguments = [weight.numpy(), x.contiguous().numpy(), *common, *scalars, found.numpy()]
        count, changed = _direct(*arguments)
        return found[:count].clone(), bool(changed)
    steps = weight.new_empty(order.numel(), len(weight))
    tables = [(x @ weight.T).numpy(), gram.numpy()]
    arguments = [*tables, *common, *scalars, found.numpy(), steps.numpy()]
    count, changed = _cached(*arguments)
    found = found[:count].clone()
    weight.addmm_(steps[:count].T, x[found])
    return found, bool(changed)
