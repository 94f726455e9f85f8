"""Quantities of a batch that is spread over processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from assay.curvature.kronecker import KroneckerFactors
from assay.curvature.quantities import PER_SAMPLE, Quantities
from assay.functional import Estimate


def all_reduce_quantities(
    quantities: Quantities, group: dist.ProcessGroup | None = None
) -> Quantities:
    """The quantities of all processes' mini-batches together, from those of each.

    Gradients and curvature are averaged by each process's share in the loss, moments by its number
    of samples, Kronecker factors factor by factor. Individual gradients and their norms stay those
    of the local samples. One collective call, and one more for the variance, which is that within
    processes and between their means.

    Args:
        quantities: from `compute` or `extend`, with the same names in every process.
        group: default all processes.

    Returns:
        New quantities; `samples` is the sum over the processes.

    Raises:
        ValueError: if `variance` comes without `grad`, from which the mean is needed.

    Example:
        >>> import torch
        >>> from assay import curvature
        >>> from assay.distributed.testing import spawn
        >>> line, loss_fn = torch.nn.Linear(1, 1), torch.nn.MSELoss()
        >>> q = curvature.compute(line, loss_fn, torch.ones(2, 1), torch.zeros(2, 1), ["grad"])
        >>> [both.samples for both in spawn(curvature.all_reduce_quantities, 2, q)]
        [4, 4]
    """
    if "variance" in quantities and "grad" not in quantities:
        raise ValueError("the variance over processes needs 'grad' among the quantities")
    parameter = next(iter(next(iter(quantities.values())).values()), None)
    like = _tensors(parameter)[0] if parameter is not None else torch.zeros(())
    counts = torch.tensor(
        [quantities.samples, quantities.weight], dtype=torch.float64, device=like.device
    )
    dist.all_reduce(counts, group=group)
    samples, weight = int(counts[0]), float(counts[1])
    mean = quantities.reduction == "mean"
    share = quantities.weight / weight if mean else 1.0
    scale = share * samples / quantities.samples if mean else 1.0
    even = quantities.samples / samples
    values: dict[str, dict[str, Any]] = {}
    sent: list[Tensor] = []
    for quantity, entries in quantities.items():
        values[quantity] = {}
        for name, entry in entries.items():
            if quantity in PER_SAMPLE:
                factor = scale if quantity == "grad_batch" else scale**2
                values[quantity][name] = entry if factor == 1 else entry * factor
                continue
            if quantity == "variance":
                continue
            if quantity == "second_moment":
                part: Any = entry * (scale**2 * even)
            else:
                part = _scaled(entry, share, even)
            values[quantity][name] = part
            sent += _tensors(part)
    _sum(sent, group)
    if "variance" in values:
        # Within processes and between their means, so that nothing cancels.
        for name, entry in quantities["variance"].items():
            own = quantities["grad"][name] * (scale if mean else scale / quantities.samples)
            centre = values["grad"][name] * (1 if mean else 1 / samples)
            spread = entry * scale**2 + (own - centre).square()
            values["variance"][name] = spread * even
        _sum(list(values["variance"].values()), group)
    for entries in values.values():
        for entry in entries.values():
            if isinstance(entry, Estimate):
                entry.standard_error.sqrt_()
    return Quantities(values, samples, quantities.reduction, weight)


def _scaled(entry: Any, share: float, even: float) -> Any:
    if isinstance(entry, Estimate):
        return Estimate(entry.mean * share, (entry.standard_error * share).square())
    if isinstance(entry, KroneckerFactors):
        if entry.right is None:
            return entry.scaled(share)
        return entry.scaled(share, even) if entry.grads_left else entry.scaled(even, share)
    return entry * share


def _tensors(entry: Any) -> list[Tensor]:
    if isinstance(entry, KroneckerFactors):
        return list(entry.factors)
    if isinstance(entry, Estimate):
        return [entry.mean, entry.standard_error]
    return [entry]


def _sum(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Add up over the processes, in one message a dtype."""
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view(tensor.shape))
