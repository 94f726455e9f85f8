"""Running statistics of normalisation layers, recomputed from data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from assay.functional.modes import evaluating


def running_norms(model: nn.Module) -> list[Any]:
    """The layers of a model that keep running statistics.

    Any module counts that has tensors `running_mean` and `running_var` and an attribute `momentum`
    by which its forward pass updates them, as torch's BatchNorm, SyncBatchNorm and InstanceNorm do
    and other packages' norms by their example. A frozen norm without `momentum` is left alone.

    Args:
        model: any module.

    Returns:
        The layers, in the order of `modules()`.

    Example:
        >>> from torch import nn
        >>> from assay.functional import running_norms
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.LayerNorm(3))
        >>> running_norms(model) == [model[1]]
        True
    """
    return [
        module
        for module in model.modules()
        if hasattr(module, "momentum")
        and isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
    ]


@dataclass
class _Moments:
    """Mean and variance of all that a norm has seen, pooled batch by batch in float64."""

    count: float = 0.0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0  # sum of squared deviations from the mean

    def add(self, norm: Any, inputs: Tensor) -> None:
        mean = norm.running_mean.double()
        variance = norm.running_var.double()
        if isinstance(norm, _InstanceNorm):
            # Its running statistics are means over samples of each sample's own mean and variance:
            # nothing is to be added for the spread between samples.
            unbatched = inputs.ndim == norm._get_no_batch_dim()
            size = 1 if unbatched else inputs.shape[0]
            total = self.count + size
            self.mean = self.mean + (mean - self.mean) * (size / total)
            self.squares = self.squares + variance * size
            self.count = total
            return
        size = inputs.numel() / mean.numel()
        total = self.count + size
        shift = mean - self.mean
        between = shift**2 * (self.count * size / total)
        # The layer stores the unbiased variance of its batch; one element has none.
        within = variance * (size - 1) if size > 1 else torch.zeros_like(mean)
        self.squares = self.squares + within + between
        self.mean = self.mean + shift * (size / total)
        self.count = total

    def variance(self, norm: Any) -> Tensor | float:
        if isinstance(norm, _InstanceNorm):
            return self.squares / self.count
        return self.squares / max(self.count - 1, 1)


@contextmanager
def _statistics_of_each_batch(model: nn.Module, norms: list[Any]) -> Iterator[dict[Any, _Moments]]:
    """Norms in training mode with momentum 1, everything else in evaluation mode."""
    momenta = {norm: norm.momentum for norm in norms}
    moments = {norm: _Moments() for norm in norms}

    def collect(norm: Any, args: tuple[Tensor, ...], _: object) -> None:
        moments[norm].add(norm, args[0])

    handles = []
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
                norm.momentum = 1.0
                # 0 · NaN is NaN: statistics that have diverged must not survive momentum 1.
                norm.running_mean.zero_()
                norm.running_var.fill_(1)
                if isinstance(getattr(norm, "num_batches_tracked", None), Tensor):
                    norm.num_batches_tracked.zero_()
                handles.append(norm.register_forward_hook(collect))
            yield moments
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum


@torch.no_grad()
def update_bn(model: nn.Module, batches: Iterable[object]) -> None:
    r"""Recompute the running statistics of a model's norms by one pass over the data.

    Weights that no gradient step has led to, a point on a line between two networks or an average
    of several, have activations of other mean and variance than the stored ones. With m_b and v_b
    the mean and unbiased variance that a layer finds in batch b of n_b elements (samples times
    positions) and n = Σ n_b,

        running_mean = m = Σ n_b m_b / n,
        running_var = Σ [(n_b − 1) v_b + n_b (m_b − m)²] / (n − 1),

    i.e. the mean and unbiased variance of all the data, whatever the sizes of the batches.
    `torch.optim.swa_utils.update_bn` weighs batches equally and averages the v_b, which leaves the
    spread between batches out. An InstanceNorm's statistics are averaged over samples, as it
    defines them.

    Only the norms are in training mode during the pass: dropout is off, as it is when the model is
    used. Modes and momenta are as before afterwards. In a process group, each process sees the
    batches it is given.

    Args:
        model: any module; does nothing if it has no running statistics.
        batches: tensors, or tuples or lists whose first element is the model's input.

    Raises:
        ValueError: if `batches` yields nothing, or, from torch, if a batch has a single element a
            channel.
        TypeError: if a batch is not a tensor and does not start with one.

    Example:
        >>> import torch
        >>> from assay.functional import update_bn
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> x = torch.randn(100, 2)
        >>> update_bn(norm, x.split(30))
        >>> torch.allclose(norm.running_mean, x.mean(0), atol=1e-6)
        True
        >>> torch.allclose(norm.running_var, x.var(0), atol=1e-6)
        True

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
        Ensembling of DNNs", NeurIPS 2018.
    """
    norms = running_norms(model)
    if not norms:
        return
    device = norms[0].running_mean.device
    with _statistics_of_each_batch(model, norms) as moments:
        seen = 0
        for batch in batches:
            model(_inputs(batch).to(device))
            seen += 1
        if seen == 0:
            raise ValueError("batches is empty: expected at least one batch to take statistics of")
    for norm, moment in moments.items():
        if moment.count:  # a layer that the forward pass never reaches keeps mean 0, variance 1
            norm.running_mean.copy_(moment.mean)
            norm.running_var.copy_(moment.variance(norm))


def _inputs(batch: object) -> Tensor:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            f"batches: expected tensors, or tuples that start with one, got {type(first).__name__}"
        )
    return first
