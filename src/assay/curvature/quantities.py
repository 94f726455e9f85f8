"""What `compute` returns: tensors by quantity and parameter, and what is needed to average them."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.curvature.kronecker import KroneckerFactors
from assay.functional import Estimate

PER_SAMPLE = frozenset({"grad_batch", "batch_l2"})
MOMENTS = frozenset({"second_moment", "variance"})


class Quantities(dict[str, dict[str, Any]]):
    """Quantity → parameter → value.

    Args:
        values: the entries.
        samples: N, of the mini-batch.
        reduction: `"mean"` or `"sum"`: what the loss does over samples.
        weight: what the loss's mean divides by: N, or the number of terms that count.

    Example:
        >>> import torch
        >>> from assay import curvature
        >>> line, x = torch.nn.Linear(2, 1), torch.randn(3, 2)
        >>> loss = torch.nn.MSELoss()
        >>> q = curvature.compute(line, loss, x, torch.zeros(3, 1), ["grad", "batch_l2"])
        >>> isinstance(q, curvature.Quantities), q.samples
        (True, 3)
        >>> torch.equal(q.model_l2(), q["batch_l2"]["weight"] + q["batch_l2"]["bias"])
        True
    """

    def __init__(
        self,
        values: Mapping[str, dict[str, Any]],
        samples: int,
        reduction: str = "mean",
        weight: float | None = None,
    ) -> None:
        super().__init__(values)
        self.samples = samples
        self.reduction = reduction
        self.weight = float(samples if weight is None else weight)

    def model_l2(self) -> Float[Tensor, " n"]:
        """‖g_n‖² over all parameters together, from `batch_l2`.

        Raises:
            KeyError: if `batch_l2` was not computed.
        """
        return torch.stack(list(self["batch_l2"].values())).sum(0)

    def replace(self, other: "Quantities") -> None:
        """Take everything from another.

        Args:
            other: may be forgotten afterwards.
        """
        self.clear()
        self.update(other)
        self.samples, self.reduction, self.weight = other.samples, other.reduction, other.weight

    def merged(self, other: "Quantities") -> "Quantities":
        """With the entries of another besides."""
        return Quantities({**self, **other}, self.samples, self.reduction, self.weight)

    def scaled_to_loss(self) -> "Quantities":
        """With g_n replaced by what the sample contributes to ∇L, and moments as sums."""
        n = self.samples
        share = 1 / n if self.reduction == "mean" else 1.0
        factors = {
            "grad_batch": share,
            "batch_l2": share**2,
            "second_moment": share**2 * n,
            "variance": share**2,
        }
        values = {
            quantity: {name: value * factors[quantity] for name, value in entries.items()}
            if quantity in factors
            else entries
            for quantity, entries in self.items()
        }
        return Quantities(values, n, self.reduction, self.weight)


def average(parts: list[Quantities]) -> Quantities:
    """Quantities of the union of mini-batches from those of each.

    Curvature and gradients count by the share that a batch has in the loss; Kronecker factors are
    averaged factor by factor.

    Args:
        parts: with the same quantities and parameters.
    """
    if len(parts) == 1:
        return parts[0]
    samples = sum(part.samples for part in parts)
    weight = sum(part.weight for part in parts)
    mean = parts[0].reduction == "mean"
    shares = [part.weight / weight if mean else 1.0 for part in parts]
    # ℓ_n is N times the sample's contribution to a mean: with N and the mean it changes scale.
    scales = [
        share * samples / part.samples if mean else 1.0
        for share, part in zip(shares, parts, strict=True)
    ]
    values: dict[str, dict[str, Any]] = {}
    for quantity in parts[0]:
        if quantity == "variance":
            continue
        values[quantity] = {
            name: _join(
                quantity, name, [part[quantity][name] for part in parts], parts, shares, scales
            )
            for name in parts[0][quantity]
        }
    result = Quantities(values, samples, parts[0].reduction, weight)
    if "variance" in parts[0]:
        result["variance"] = _variance(parts, scales)
    return result


def _join(quantity: str, name: str, entries: list, parts: list[Quantities], shares, scales) -> Any:
    if quantity == "grad_batch":
        return torch.cat([e * s for e, s in zip(entries, scales, strict=True)])
    if quantity == "batch_l2":
        return torch.cat([e * s**2 for e, s in zip(entries, scales, strict=True)])
    if quantity == "second_moment":
        samples = sum(part.samples for part in parts)
        factors = [s**2 * p.samples / samples for s, p in zip(scales, parts, strict=True)]
        return _weighted(entries, factors)
    if isinstance(entries[0], KroneckerFactors):
        return _join_factors(name, entries, parts, shares)
    if isinstance(entries[0], Estimate):
        error = _weighted([e.standard_error.square() for e in entries], [s**2 for s in shares])
        return Estimate(_weighted([e.mean for e in entries], shares), error.sqrt())
    return _weighted(entries, shares)


def _join_factors(name: str, entries: list, parts: list[Quantities], shares: list[float]) -> Any:
    forms = {(tuple(f.shape for f in e.factors), e.grads_left) for e in entries}
    if len(forms) > 1:
        raise ValueError(
            f"the blocks of {name!r} differ in form between pieces of the batch, for its uses "
            "depend on the samples: take its factors without chunk_size, or leave it out of params"
        )
    samples = sum(part.samples for part in parts)
    total = None
    for entry, part, share in zip(entries, parts, shares, strict=True):
        even = part.samples / samples
        if entry.right is None:
            scaled = entry.scaled(share)
        elif entry.grads_left:
            scaled = entry.scaled(share, even)
        else:
            scaled = entry.scaled(even, share)
        total = scaled if total is None else total.plus(scaled)
    return total


def _weighted(tensors: list[Tensor], factors: list[float]) -> Tensor:
    total = tensors[0] * factors[0]
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total.add_(tensor, alpha=factor)
    return total


def _variance(parts: list[Quantities], scales: list[float]) -> dict[str, Tensor]:
    """Within and between batches, so that nothing cancels."""
    samples = sum(part.samples for part in parts)
    found = {}
    for name in parts[0]["variance"]:
        means = [
            part["grad"][name] * (s if part.reduction == "mean" else 1 / part.samples)
            for part, s in zip(parts, scales, strict=True)
        ]
        even = [part.samples / samples for part in parts]
        differences = [mean - means[0] for mean in means]
        centre = means[0] + _weighted(differences, even)
        spread = [
            part["variance"][name] * s**2 + (mean - centre).square()
            for part, mean, s in zip(parts, means, scales, strict=True)
        ]
        found[name] = _weighted(spread, even)
    return found
