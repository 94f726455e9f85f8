"""A loss as a mean or sum over samples, seen from the model's output."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from assay.curvature.capture import LossCall, Record
from assay.curvature.layout import Layout
from assay.functional import Likelihood, per_sample_loss
from assay.functional.likelihood import SUPPORTED


@dataclass(frozen=True)
class Objective:
    """The loss of one forward pass.

    Args:
        loss: L, a scalar with graph.
        samples: N.
        reduction: `"mean"`: L = (1/N) Σ ℓ_n; `"sum"`: L = Σ ℓ_n.
        weight: what the mean divides by (N, entries, summed class weights): the batch's share when
            batches are averaged.
        sources: tensors through which the loss depends on the model, and where each has its
            samples.
        likelihood: of the loss, if its second derivative is known.
        call: the loss call it was found in.
    """

    loss: Tensor
    samples: int
    reduction: str
    weight: float
    sources: tuple[tuple[Tensor, Layout], ...]
    likelihood: Likelihood | None
    call: LossCall | None

    @property
    def per_sample_scale(self) -> float:
        """ℓ_n's gradient is so many times what the sample contributes to L's."""
        return float(self.samples) if self.reduction == "mean" else 1.0

    def curvature(self) -> tuple[Likelihood, Tensor, Tensor, Layout, float]:
        """Likelihood, its output and target, where the samples are, and the loss's own factor.

        Raises:
            ValueError: if the loss's second derivative is not known.
        """
        if self.likelihood is None or self.call is None:
            raise ValueError(
                "second-order quantities need a loss whose value is that of one call of "
                f"{SUPPORTED}; got another loss"
            )
        output, target = self.call.output, self.call.target
        scale = self.likelihood.scale(output.detach(), target)
        scale = 0.0 if scale == math.inf else scale
        return self.likelihood, output, target, self.sources[0][1], scale


def find_objective(
    loss_fn: Callable | None,
    value: Any,
    output: Any,
    targets: Any,
    record: Record,
    samples: int,
    batch_dim: int,
    *,
    cut: bool = True,
    piece: bool = False,
) -> Objective:
    """Read the loss's structure off its value and the calls that made it.

    Args:
        loss_fn: the loss, if known.
        value: what it returned, `()` or `(N,)`.
        output: of the model.
        targets: second argument of `loss_fn`.
        record: of the pass.
        samples: N.
        batch_dim: of the inputs.
        cut: whether the loss may be called on parts of output and targets to check it.
        piece: whether this is a piece of a batch, in which every target may be ignored.

    Raises:
        TypeError: if the value is no tensor.
        ValueError: if it has another shape, is not finite, or is no mean or sum over samples.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss must be a tensor, got {type(value).__name__}")
    if value.ndim > 1 or (value.ndim == 1 and len(value) != samples):
        raise ValueError(
            f"the loss must be a scalar or one value for each of the {samples} samples, got shape "
            f"{tuple(value.shape)}"
        )
    if not value.requires_grad:
        raise ValueError("the loss does not depend on the selected parameters")
    call = next((c for c in record.losses if c.value is value), None)
    likelihood = None
    if call is not None and call.loss.reduction != "none":
        likelihood = Likelihood(call.loss)
        scale = likelihood.scale(call.output.detach(), call.target)
        if scale == math.inf:
            if not piece:
                raise ValueError("the loss averages over nothing: every target is ignored")
            value = likelihood.terms(call.output, call.target).sum()
    if not bool(torch.isfinite(value.detach()).all()):
        raise ValueError("the loss is not finite: look for NaN or inf in inputs or parameters")
    if call is not None and likelihood is not None:
        layout = _output_layout(call.output, samples, batch_dim)
        sources = ((call.output, layout),)
        return Objective(value, samples, call.loss.reduction, 1 / scale, sources, likelihood, call)
    if value.ndim == 1:
        source = ((value, Layout(samples)),)
        return Objective(value.mean(), samples, "mean", samples, source, None, None)
    reduction = getattr(loss_fn, "reduction", "mean")
    if cut:
        reduction = _reduction(loss_fn, value, output, targets, samples)
    sources = tuple(
        (leaf, _output_layout(leaf, samples, batch_dim))
        for leaf in pytree.tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.requires_grad and samples in leaf.shape
    )
    return Objective(value, samples, reduction, samples, sources, None, None)


def _output_layout(output: Tensor, samples: int, batch_dim: int) -> Layout:
    shape = output.shape
    if output.ndim == 0:
        raise ValueError("the model's output has no dimension for the samples")
    for axis in (batch_dim, 0) if output.ndim > 2 else (0,):
        if shape[axis] == samples:
            return Layout(samples, axis)
    if shape[0] % samples == 0:
        return Layout(samples, 0, shape[0] // samples, sample_major=batch_dim == 0)
    raise ValueError(
        f"cannot find the {samples} samples in the output, which has shape {tuple(shape)}"
    )


def _reduction(loss_fn, value: Tensor, output: Any, targets: Any, samples: int) -> str:
    reduction = getattr(loss_fn, "reduction", None)
    if reduction is not None:
        terms = per_sample_loss(loss_fn)
        with torch.no_grad():
            each = terms(output, targets)
        if len(each) != samples:
            raise ValueError(
                f"{type(loss_fn).__name__} is not a mean or sum over the {samples} samples: "
                f"with reduction='none' it has {len(each)} terms"
            )
        return reduction
    halves = _halves(loss_fn, output, targets, samples)
    if halves is None:
        return "mean"
    whole, first, second, share = *halves, (samples // 2) / samples
    precision = 64 * torch.finfo(value.dtype).eps
    room = precision * (abs(whole) + abs(first) + abs(second)) + 1e-12
    if abs(share * first + (1 - share) * second - whole) <= room:
        return "mean"
    if abs(first + second - whole) <= room:
        return "sum"
    raise ValueError(
        "the loss is not a mean or sum over samples: on two halves of the batch it is "
        f"{first:.6g} and {second:.6g}, on the whole {whole:.6g}; return one value a sample instead"
    )


def _halves(loss_fn, output: Any, targets: Any, samples: int) -> tuple[float, ...] | None:
    """The loss on the batch and on its halves; None if outputs cannot be cut.

    That is so if the model returns the loss itself: then it is taken to be a mean.
    """
    outputs, output_spec = pytree.tree_flatten(output)
    held, target_spec = pytree.tree_flatten(targets)
    cut = [isinstance(x, Tensor) and x.ndim > 0 and len(x) == samples for x in outputs]
    whole = [isinstance(x, Tensor) and x.requires_grad and not c
             for x, c in zip(outputs, cut, strict=True)]  # fmt: skip
    if loss_fn is None or samples < 2 or not any(cut) or any(whole):
        return None
    values = []
    for part in (slice(None), slice(samples // 2), slice(samples // 2, None)):
        some = [x[part].detach() if c else x for x, c in zip(outputs, cut, strict=True)]
        targeted = [
            x[part] if isinstance(x, Tensor) and x.ndim > 0 and len(x) == samples else x
            for x in held
        ]
        with torch.no_grad():
            value = loss_fn(
                pytree.tree_unflatten(some, output_spec),
                pytree.tree_unflatten(targeted, target_spec),
            )
        values.append(float(value))
    return tuple(values)
