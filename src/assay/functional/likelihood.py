"""Losses as likelihoods: their terms, the square root of their Hessian, draws from their model."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from assay.functional.batches import BatchWeights

SUPPORTED = "CrossEntropyLoss, MSELoss, BCEWithLogitsLoss (as modules or functions)"
_FUNCTIONS: dict[Callable, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


@dataclass(frozen=True)
class Likelihood:
    """A loss whose Hessian in the model's output has a closed form.

    The loss is `scale · Σ_n ℓ_n`, with `scale` the loss's own reduction. For a sample n with output
    z_n, `factor` gives S_n with S_n S_nᵀ = ∇²ℓ_n(z_n), and `draw` gives vectors s with
    E[s sᵀ] = ∇²ℓ_n(z_n): gradients at labels drawn from the model.

    Args:
        loss: the loss module.

    Raises:
        ValueError: if the loss is not one of the supported ones.

    Example:
        >>> import torch
        >>> from assay.functional import Likelihood
        >>> likelihood = Likelihood.of(torch.nn.CrossEntropyLoss())
        >>> z, y = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
        >>> S = likelihood.factor(z, y)[:, 0]
        >>> p = z[0].softmax(0)
        >>> torch.allclose(S.T @ S, p.diag() - torch.outer(p, p), atol=1e-6)
        True
    """

    loss: Any  # checked below; torch types the attributes of modules as Tensor | Module

    def __post_init__(self) -> None:
        kind = type(self.loss)
        if kind not in (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss):
            name = getattr(self.loss, "__name__", kind.__name__)
            raise ValueError(f"second-order quantities need one of {SUPPORTED}, got {name}")
        if self.loss.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.loss.reduction!r}")

    @classmethod
    def of(cls, loss_fn: Callable) -> "Likelihood":
        """The likelihood of a loss given as a module or as a function of `torch.nn.functional`."""
        if loss_fn in _FUNCTIONS:
            return cls(_FUNCTIONS[loss_fn]())
        return cls(loss_fn)

    def terms(self, output: Tensor, target: Tensor) -> Float[Tensor, " n"]:
        """The sum of the loss's terms of each sample, `(N,)`, unscaled."""
        return _summed(_unreduced(self.loss)(output, target))

    def scale(self, output: Tensor, target: Tensor) -> float:
        """The factor by which the reduction multiplies the sum of all terms.

        Infinite for a mean over no terms: every target ignored.
        """
        if self.loss.reduction == "sum":
            return 1.0
        if isinstance(self.loss, nn.CrossEntropyLoss):
            divisor = self._divisor(output, target)
            return 1.0 / divisor if divisor else math.inf
        return 1.0 / max(1, output.numel())

    def factor(self, output: Tensor, target: Tensor) -> Float[Tensor, "columns n *rest"]:
        """The columns of S, shape `(K, N, ...)` with the output's own shape behind K.

        Cross-entropy needs C − 1 columns: the null vector √p of its Hessian is left out. An output
        with positions, `(N, C, ...)`, has so many for each: their terms do not interact.
        """
        if isinstance(self.loss, nn.MSELoss):
            return math.sqrt(2.0) * _unit_columns(output)
        if isinstance(self.loss, nn.BCEWithLogitsLoss):
            p = output.sigmoid()
            deviation = (p * (1 - p) * self._binary_weight(output, target)).sqrt()
            return deviation * _unit_columns(output)
        return self._cross_entropy_factor(output, target)

    def draw(
        self,
        output: Tensor,
        target: Tensor,
        samples: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "samples n *rest"]:
        """Columns s with mean(s sᵀ) = ∇²ℓ in expectation, already divided by √samples."""
        shape = (samples, *output.shape)
        if isinstance(self.loss, nn.MSELoss):
            noise = torch.randn(
                shape, generator=generator, dtype=output.dtype, device=output.device
            )
            return noise * math.sqrt(2.0 / samples)
        uniform = torch.rand(shape, generator=generator, dtype=output.dtype, device=output.device)
        if isinstance(self.loss, nn.BCEWithLogitsLoss):
            p = output.sigmoid()
            weight = self._binary_weight(output, target).sqrt()
            return (p - (uniform < p).to(p)) * weight / math.sqrt(samples)
        logits = output.movedim(1, -1)
        p = logits.softmax(-1)
        # Gumbel's trick draws a class for every position at once, from the given generator.
        gumbel = -(-uniform.clamp_min(torch.finfo(p.dtype).tiny).log()).log()
        drawn = (logits + gumbel.movedim(2, -1)).argmax(-1)
        columns = p - F.one_hot(drawn, p.shape[-1]).to(p)
        weight = self._weights(output, target).sqrt().unsqueeze(-1)
        return (columns * weight / math.sqrt(samples)).movedim(-1, 2)

    def _cross_entropy_factor(self, output: Tensor, target: Tensor) -> Tensor:
        p = output.movedim(1, -1).softmax(-1)
        root = p.sqrt()
        # S = (diag √p − p √pᵀ) Q with Q an orthonormal basis of the complement of √p: the columns
        # of the Householder reflection that takes √p to ±e_0, without its first.
        sign = torch.where(root[..., :1] >= 0, 1.0, -1.0).to(root)
        v = root.clone()
        v[..., :1] += sign
        v = v / v.norm(dim=-1, keepdim=True)
        q = -2 * v.unsqueeze(-1) * v[..., 1:].unsqueeze(-2)
        q[..., 1:, :] += torch.eye(p.shape[-1] - 1, dtype=p.dtype, device=p.device)
        columns = root.unsqueeze(-1) * q  # √pᵀ Q = 0 removes the second term
        weight = self._weights(output, target).sqrt()
        columns = (columns * weight[..., None, None]).movedim(-1, 0).movedim(-1, 2)
        return _separate_positions(columns)

    def _weights(self, output: Tensor, target: Tensor) -> Tensor:
        """How often each position's term has the Hessian diag p − ppᵀ: what its targets sum to."""
        smoothing, classes = self.loss.label_smoothing, output.shape[1]
        given = self._class_weights(output)
        if target.is_floating_point():
            target = target.to(output) * (1 - smoothing) + smoothing / classes
            return torch.einsum("nc...,c->n...", target, given)
        kept = target != self.loss.ignore_index
        weight = (1 - smoothing) * given[target.where(kept, 0)] + smoothing * given.mean()
        return weight * kept

    def _divisor(self, output: Tensor, target: Tensor) -> float:
        """What a mean divides by."""
        if target.is_floating_point():
            return output[:, 0].numel()
        return BatchWeights(self.loss)(output, target)

    def _class_weights(self, output: Tensor) -> Tensor:
        weight = self.loss.weight
        return output.new_ones(output.shape[1]) if weight is None else weight.to(output)

    def _binary_weight(self, output: Tensor, target: Tensor) -> Tensor:
        weight = torch.ones_like(output)
        if self.loss.weight is not None:
            weight = weight * self.loss.weight
        if self.loss.pos_weight is not None:
            weight = weight * (1 + (self.loss.pos_weight - 1) * target)
        return weight


def per_sample_loss(loss_fn: Callable) -> Callable[..., Float[Tensor, " n"]]:
    """A loss taken apart into one term a sample, so that the loss is the terms' mean.

    For a loss with `reduction="sum"` it is their sum. A mean over more than samples (entries of
    an output, positions that are not ignored, class weights) is respected: ℓ_n is N times what
    sample n contributes.

    Args:
        loss_fn: a loss module with a `reduction`, or a function that takes `reduction=`.

    Returns:
        `(output, target) -> (N,)`.

    Raises:
        ValueError: if the loss cannot be taken apart.

    Example:
        >>> import torch
        >>> from assay.functional import per_sample_loss
        >>> terms = per_sample_loss(torch.nn.functional.cross_entropy)
        >>> terms(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    unreduced = _unreduced(loss_fn)
    summing = getattr(loss_fn, "reduction", "mean") == "sum"
    weighted = loss_fn is F.cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss)
    likelihood = Likelihood.of(loss_fn) if weighted and not summing else None

    def terms(output: Tensor, target: Tensor) -> Tensor:
        each = unreduced(output, target)
        if summing:
            return _summed(each)
        if likelihood is not None:
            return _summed(each) * (len(each) * likelihood.scale(output, target))
        return _summed(each) * (len(each) / max(1, each.numel()))

    return terms


def _unreduced(loss_fn: Callable) -> Callable[..., Tensor]:
    if isinstance(loss_fn, nn.Module):
        if not hasattr(loss_fn, "reduction"):
            raise ValueError(
                f"{type(loss_fn).__name__} has no `reduction`: per-sample quantities need a loss "
                "that is a mean or sum over samples and can be asked for its terms"
            )
        twin: Any = type(loss_fn).__new__(type(loss_fn))
        twin.__dict__.update(loss_fn.__dict__)
        twin.reduction = "none"
        return twin
    try:
        takes_reduction = "reduction" in inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):
        takes_reduction = False
    if not takes_reduction:
        name = getattr(loss_fn, "__name__", repr(loss_fn))
        raise ValueError(
            f"{name} takes no `reduction` argument: per-sample quantities need a loss that is a "
            "mean or sum over samples and can be asked for its terms"
        )
    return lambda output, target: loss_fn(output, target, reduction="none")


def _summed(terms: Tensor) -> Tensor:
    if terms.ndim == 0:
        raise ValueError("the loss is not a mean or sum of terms, one a sample")
    return terms.flatten(1).sum(1) if terms.ndim > 1 else terms


def _unit_columns(output: Tensor) -> Tensor:
    """For each output entry of a sample one column that is 1 there: `(K, N, ...)`."""
    features = output[0].numel() if len(output) else 0
    eye = torch.eye(features, dtype=output.dtype, device=output.device)
    columns = eye.view(features, 1, *output.shape[1:])
    return columns.expand(features, *output.shape).clone()


def _separate_positions(columns: Tensor) -> Tensor:
    """From `(K, N, C, *positions)` to columns that are non-zero at one position each."""
    positions = columns.shape[3:].numel()
    if columns.ndim == 3 or positions == 1:
        return columns
    flat = columns.flatten(3)
    mask = torch.eye(positions, dtype=columns.dtype, device=columns.device)
    separate = flat.unsqueeze(1) * mask[:, None, None, :]
    return separate.flatten(0, 1).view(-1, *columns.shape[1:])
