"""Compressors that send a few entries and their indices."""

import math

import torch
from torch import Generator, Tensor

from assay.distributed.compressors import BaseCompressor, check_floating
from assay.distributed.payload import Payload

__all__ = ["Sparsifier", "TopK", "RandomK"]


class Sparsifier(BaseCompressor):
    """Sends `count(d)` entries: int32 indices (int64 beyond 2^31 entries) and their values."""

    def __init__(self, density: float) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        self.density = density

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.density})"

    def count(self, d: int) -> int:
        """Entries sent of d: ⌈density · d⌉."""
        return math.ceil(self.density * d)

    def select(self, x: Tensor, generator: Generator | None) -> Tensor:
        """Indices of the entries to send; subclasses say which."""
        raise NotImplementedError

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Send the selected entries; `TypeError` unless `x` is a real floating-point tensor."""
        check_floating(x)
        flat = x.detach().reshape(-1)
        indices = self.select(flat, generator)
        values = flat[indices] * self.scale(flat.numel())
        index_dtype = torch.int32 if flat.numel() < 2**31 else torch.int64
        return Payload((indices.to(index_dtype), values), tuple(x.shape), x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        """Zeros with the values put where they belong."""
        indices, values = payload.tensors
        out = values.new_zeros(math.prod(payload.shape))
        out[indices.long()] = values
        return out.view(payload.shape)

    def scale(self, d: int) -> float:
        """Factor on the values sent."""
        return 1.0


class TopK(Sparsifier):
    """Sends the ⌈density · d⌉ entries of largest magnitude.

    Biased: E‖C(x) − x‖² ≤ (1 − density)‖x‖². Wrap it in `ErrorFeedback` to train with it. NaN
    counts as largest, so it is seen at the receiver.

    Args:
        density: Fraction of entries to send, in (0, 1].

    Raises:
        ValueError: `density` is outside (0, 1].

    Example:
        >>> topk = TopK(0.5)
        >>> topk.decompress(topk.compress(torch.tensor([1.0, -4.0, 2.0, 3.0])))
        tensor([ 0., -4.,  0.,  3.])
    """

    unbiased = False

    def select(self, x: Tensor, generator: Generator | None) -> Tensor:
        """Indices of the largest magnitudes."""
        return x.abs().topk(self.count(x.numel()), sorted=False).indices

    def omega(self, d: int) -> float:
        """Infinity, unless everything is sent: it is biased."""
        return 0.0 if self.count(d) == d else math.inf


class RandomK(Sparsifier):
    """Sends ⌈density · d⌉ entries chosen at random, scaled by d / k to be unbiased.

    ω = d / k − 1.

    Args:
        density: Fraction of entries to send, in (0, 1].

    Raises:
        ValueError: `density` is outside (0, 1].

    Example:
        >>> randomk = RandomK(0.5)
        >>> y = randomk.decompress(randomk.compress(torch.ones(10)))
        >>> sorted(y.tolist()) == [0.0] * 5 + [2.0] * 5
        True
    """

    def select(self, x: Tensor, generator: Generator | None) -> Tensor:
        """Distinct indices, uniformly at random."""
        device = generator.device if generator is not None else x.device
        order = torch.randperm(x.numel(), generator=generator, device=device)
        return order[: self.count(x.numel())].to(x.device)

    def scale(self, d: int) -> float:
        """The d / k that makes it unbiased."""
        return d / max(self.count(d), 1)

    def omega(self, d: int) -> float:
        """The variance d / k − 1."""
        return d / self.count(d) - 1
