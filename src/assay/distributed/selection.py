"""Sparsifiers that compare with a threshold: a fixed one, or one that a sample suggests."""

import math

import torch
from torch import Generator, Tensor

from assay.distributed.compressors import BaseCompressor, check_floating
from assay.distributed.payload import Payload
from assay.distributed.sparsifiers import Sparsifier
from assay.kernels.threshold import select_at_least

__all__ = ["SampledTopK", "Threshold", "Cast"]

_SAMPLES = 64  # entries of a sample above its threshold: the count is then within 1/8 as a rule
_SHORTEST = 1024  # ranking so few takes less time than anything else here
_FEWEST, _MOST = 0.8, 1.3  # of the k asked for
_RETRIES = 10


class SampledTopK(Sparsifier):
    """Sends about the ⌈density · d⌉ entries of largest magnitude, without sorting them.

    A strided sample of the entries gives the threshold, one pass finds what reaches it. More than
    1.3 k entries are cut to the k largest of them, exactly (hierarchical selection); fewer than
    0.8 k lower the threshold by a fifth, at most ten times, and then all entries are ranked. So the
    count is always in [0.8 k, 1.3 k], unless fewer entries differ from zero: zeros are never sent.
    Vectors of which the sample would be a large part are ranked at once. NaN counts as largest.

    Args:
        density: Fraction of entries to send, in (0, 1].
        sample_ratio: Fraction of entries that the sample has at least, in (0, 1]. It is larger
            where needed to hold 64 entries above the threshold.

    Raises:
        ValueError: `density` or `sample_ratio` is outside (0, 1].

    Example:
        >>> x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
        >>> payload = SampledTopK(0.001).compress(x)
        >>> 800 <= len(payload.tensors[0]) <= 1300
        True

    Reference:
        Lin, Han, Mao, Wang, Dally, Deep Gradient Compression, ICLR 2018, section 5,
        https://arxiv.org/abs/1712.01887.
    """

    unbiased = False

    def __init__(self, density: float, sample_ratio: float = 0.01) -> None:
        super().__init__(density)
        if not 0 < sample_ratio <= 1:
            raise ValueError(f"sample_ratio must be in (0, 1], got {sample_ratio}")
        self.sample_ratio = sample_ratio

    def __repr__(self) -> str:
        return f"SampledTopK({self.density}, sample_ratio={self.sample_ratio})"

    def select(self, x: Tensor, generator: Generator | None) -> Tensor:
        """Indices of about k largest magnitudes."""
        d = x.numel()
        k = self.count(d)
        samples = math.ceil(max(self.sample_ratio * d, _SAMPLES / self.density, _SHORTEST))
        if 4 * samples >= d or k == d:
            return _largest(x, k)
        threshold = self._sampled_threshold(x, samples, generator)
        smallest = float(torch.finfo(x.dtype).smallest_normal)
        found = select_at_least(x, max(threshold, smallest))
        for _ in range(_RETRIES):
            if len(found) >= _FEWEST * k or threshold <= smallest:
                break
            threshold *= 0.8
            found = select_at_least(x, max(threshold, smallest))
        if len(found) < _FEWEST * k and threshold > smallest:
            return _largest(x, k)
        if len(found) > _MOST * k:
            return found[_largest(x[found], k)]
        return found

    def _sampled_threshold(self, x: Tensor, samples: int, generator: Generator | None) -> float:
        # A stride that shares no factor with the usual widths of a matrix visits all its columns.
        stride, period = x.numel() // samples, 32
        while period > stride:
            period //= 2
        stride = (stride - 1) // period * period + 1
        device = generator.device if generator is not None else "cpu"
        start = int(torch.randint(stride, (), generator=generator, device=device))
        sample = x[start::stride].abs()
        rank = max(1, round(self.density * len(sample)))
        top = sample.topk(rank, sorted=False).values
        return float(top.nan_to_num(nan=math.inf, posinf=math.inf).min())

    def omega(self, d: int) -> float:
        """Infinity, unless everything is sent: it is biased."""
        return 0.0 if self.count(d) == d else math.inf


def _largest(x: Tensor, k: int) -> Tensor:
    """Indices of at most k entries of largest magnitude, none of them zero."""
    magnitudes = x.abs()
    top = magnitudes.topk(k, sorted=False)
    return top.indices[top.values != 0]


class Threshold(Sparsifier):
    """Sends the entries whose magnitude reaches a fixed threshold.

    How many they are depends on the tensor; wrap it in `ErrorFeedback` to train with it. NaN is
    always sent.

    Args:
        threshold: A positive number.

    Raises:
        ValueError: `threshold` is not positive and finite.

    Example:
        >>> threshold = Threshold(2.0)
        >>> threshold.decompress(threshold.compress(torch.tensor([1.0, -4.0, 2.0])))
        tensor([ 0., -4.,  2.])

    Reference:
        Strom, Scalable Distributed DNN Training Using Commodity GPU Cloud Computing, 2015.
    """

    unbiased = False

    def __init__(self, threshold: float) -> None:
        super().__init__(density=1.0)  # the bound that is known beforehand
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold must be positive and finite, got {threshold}")
        self.threshold = threshold

    def __repr__(self) -> str:
        return f"Threshold({self.threshold})"

    def select(self, x: Tensor, generator: Generator | None) -> Tensor:
        """Indices of what reaches the threshold."""
        return select_at_least(x, self.threshold)

    def omega(self, d: int) -> float:
        """Infinity: it is biased."""
        return math.inf


class Cast(BaseCompressor):
    """Sends entries in a shorter floating-point format, rounded to nearest.

    What is too large for the format becomes its largest number; infinities and NaN stay.

    Args:
        dtype: The format, e.g. `torch.float16`.

    Raises:
        TypeError: `dtype` is not a floating-point dtype of 16 to 64 bits.

    Example:
        >>> half = Cast(torch.float16)
        >>> half.decompress(half.compress(torch.tensor([0.5, 1e6])))
        tensor([5.0000e-01, 6.5504e+04])
    """

    unbiased = False

    def __init__(self, dtype: torch.dtype) -> None:
        check_floating(torch.empty(0, dtype=dtype), "dtype")
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"Cast({self.dtype})"

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Round; `TypeError` unless `x` is a real floating-point tensor."""
        check_floating(x)
        flat, largest = x.detach().reshape(-1), torch.finfo(self.dtype).max
        fitting = torch.where(flat.isfinite(), flat.clamp(-largest, largest), flat)
        return Payload((fitting.to(self.dtype),), tuple(x.shape), x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        """The rounded entries in the dtype of the input."""
        return payload.tensors[0].to(payload.dtype).view(payload.shape)

    def omega(self, d: int) -> float:
        """Infinity: it is biased."""
        return math.inf
