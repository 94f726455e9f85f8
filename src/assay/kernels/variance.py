"""E g² − (E g)² and whether enough of E g² is left, in one pass over memory."""

import torch
from numba import njit
from torch import Tensor

from assay.kernels.tensors import is_plain

__all__ = ["variance", "variance_reference"]


def variance_reference(
    second: Tensor, mean: Tensor, share: float, out: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Do what `variance` does, in plain torch."""
    found = torch.addcmul(second, mean, mean, value=-1, out=out)
    # Not "less than": where squares overflow, nothing is left either.
    return found, not found.numel() or bool(torch.sub(found, second, alpha=share).min() >= 0)


@njit(nogil=True, cache=True, error_model="numpy")
def _variance(out, second, mean, share):
    kept = 0
    for i in range(out.size):
        found = second[i] - mean[i] * mean[i]
        out[i] = found
        kept += found >= share * second[i]
    return kept == out.size


def variance(
    second: Tensor, mean: Tensor, share: float, out: Tensor | None = None
) -> tuple[Tensor, bool]:
    """E g² − (E g)², and whether every entry keeps its share of E g².

    Contiguous float32 or float64 tensors on the CPU go through a kernel, others through plain
    torch.

    Args:
        second: E g², of any shape.
        mean: E g, of the same shape.
        share: of E g² that must be left at every entry.
        out: where to write, of the same shape, if not to a new tensor.
    """
    found = torch.empty_like(second) if out is None else out
    tensors = (second, mean, found)
    if torch.compiler.is_compiling() or not all(map(is_plain, tensors)):
        return variance_reference(second, mean, share, out)
    out_, second_, mean_ = (tensor.detach().view(-1).numpy() for tensor in (found, second, mean))
    torch.autograd.graph.increment_version(found)
    return found, _variance(out_, second_, mean_, out_.dtype.type(share))
