"""Which torch functions are linear, piecewise linear, or act on each entry alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _both(*names: str) -> set[Callable]:
    """A function of `torch` and the method of that name, where they exist."""
    found = set()
    for name in names:
        for owner in (torch, Tensor):
            function = getattr(owner, name, None)
            if callable(function):  # torch.float is a dtype
                found.add(function)
    return found


SHAPE_ONLY = _both(
    "flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "contiguous", "clone",
    "view_as", "reshape_as", "to", "float", "double", "type_as",
)  # fmt: skip
"""The entries of each sample stay what they are, in the same order."""

LINEAR = SHAPE_ONLY | _both(
    "permute", "transpose", "movedim", "expand", "repeat", "tile", "cat", "concat", "stack",
    "mean", "sum", "neg", "conv1d", "conv2d", "conv3d", "select", "narrow", "index_select",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "flip", "roll", "add", "sub",
) | {
    F.linear, F.pad, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.batch_norm, F.unfold, F.fold, F.embedding,
    F.pixel_shuffle, Tensor.__getitem__, Tensor.__add__, Tensor.__radd__, Tensor.__sub__,
    Tensor.__rsub__, Tensor.__neg__, Tensor.__iadd__, Tensor.__isub__, Tensor.add_, Tensor.sub_,
}  # fmt: skip
"""Linear in all their inputs together."""

SCALING = _both("mul", "div", "matmul", "mm", "addmm") | {
    Tensor.__mul__, Tensor.__rmul__, Tensor.__truediv__, Tensor.__matmul__,
}  # fmt: skip
"""Linear in the one input that depends on the samples, if it comes first or alone."""

PIECEWISE_ENTRYWISE = _both("relu", "abs", "relu_", "clamp", "clamp_min") | {
    F.relu, F.leaky_relu, F.hardtanh, F.relu6, F.threshold, F.dropout, F.hardshrink, F.softshrink,
}  # fmt: skip
"""Entry by entry, without a second derivative."""

PIECEWISE = PIECEWISE_ENTRYWISE | {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.dropout1d, F.dropout2d, F.dropout3d,
}  # fmt: skip
"""Linear in pieces: no second derivative where they have a first."""

SMOOTH = _both(
    "tanh", "sigmoid", "exp", "sin", "cos", "square", "erf", "expm1", "log1p", "sqrt", "log",
    "softplus", "celu",
) | {
    F.gelu, F.silu, F.softplus, F.elu, F.selu, F.celu, F.mish, F.hardswish, F.hardsigmoid,
    F.logsigmoid, F.softsign, F.tanh, F.sigmoid, F.tanhshrink,
}  # fmt: skip
"""Entry by entry, with a second derivative."""
