"""Dithering: the norm of a vector, and for each entry a sign and one of a few levels."""

import math

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from assay.distributed.compressors import BaseCompressor, Compressor, Identity, check_floating
from assay.distributed.payload import Payload, pack_fields, unpack_fields

__all__ = ["NaturalDithering", "RandomDithering"]


class Dithering(BaseCompressor):
    """Rounds |xᵢ| / ‖x‖_p stochastically to a level; subclasses say which levels there are."""

    def __init__(
        self,
        levels: int,
        p: float = 2,
        norm_compressor: Compressor | None = None,
    ) -> None:
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
            raise ValueError(f"levels must be an integer of at least 1, got {levels!r}")
        if not p >= 1:
            raise ValueError(f"p must be a norm's exponent, at least 1, got {p}")
        self.levels, self.p = levels, p
        self.norm_compressor = Identity() if norm_compressor is None else norm_compressor
        if not isinstance(self.norm_compressor, Compressor):
            raise TypeError(
                f"norm_compressor must be a compressor, got {type(norm_compressor).__name__}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.levels}, {self.p}, {self.norm_compressor!r})"

    @property
    def unbiased(self) -> bool:
        """Whether the norm is sent without bias; the levels are."""
        return self.norm_compressor.unbiased

    @property
    def width(self) -> int:
        """Bits of a level's number."""
        return self.levels.bit_length()

    def grid(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " points"]:
        """Levels in ascending order, from 0 to 1."""
        raise NotImplementedError

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Send norm, signs and levels; `TypeError` unless `x` is real floating point."""
        check_floating(x)
        wide = x.detach().reshape(-1).to(torch.promote_types(x.dtype, torch.float32))
        norm = _norm(wide, self.p)
        sent = self.norm_compressor.compress(norm, generator=generator)
        codes = self._round(wide, norm, generator)
        packed = (pack_fields(codes, self.width), pack_fields(wide.signbit().long(), 1))
        return Payload((*sent.tensors, *packed), tuple(x.shape), x.dtype)

    def _round(self, x: Tensor, norm: Tensor, generator: Generator | None) -> Int[Tensor, " n"]:
        grid = self.grid(x.dtype, x.device)
        y = torch.where(norm > 0, x.abs() / norm, 0.0).clamp(max=1.0)
        lower = torch.searchsorted(grid, y, right=True).sub(1).clamp(0, self.levels - 1)
        chance = (y - grid[lower]) / (grid[lower + 1] - grid[lower])
        uniform = torch.rand(y.shape, generator=generator, device=x.device, dtype=y.dtype)
        codes = lower + (uniform < chance)
        # With an infinite or NaN norm every entry is sent as the norm: overflow must be seen.
        return torch.where(norm.isfinite(), codes, self.levels)

    def decompress(self, payload: Payload) -> Tensor:
        """Norm times sign times level."""
        *sent, levels, signs = payload.tensors
        wide = torch.promote_types(payload.dtype, torch.float32)
        norm = self.norm_compressor.decompress(Payload(tuple(sent), (), wide))
        d = math.prod(payload.shape)
        values = norm * self.grid(wide, levels.device)[unpack_fields(levels, self.width, d)]
        negative = unpack_fields(signs, 1, d).bool()
        values = torch.where(negative, -values, values)
        return values.to(payload.dtype).view(payload.shape)

    def omega(self, d: int) -> float:
        """Variance of the levels, composed with that of the norm's compressor."""
        norm, levels = self.norm_compressor.omega(1), self._omega_levels(d)
        return math.inf if math.isinf(norm) else norm * levels + norm + levels

    def _omega_levels(self, d: int) -> float:
        raise NotImplementedError

    def variance(self, x: Tensor) -> Float[Tensor, ""]:
        """E‖C(x) − x‖² / ‖x‖² in closed form, the norm sent exactly.

        Args:
            x: Tensor that is not all zero.

        Returns:
            0-dimensional float64 tensor.
        """
        x = x.detach().reshape(-1).double()
        norm = _norm(x, self.p)
        grid = self.grid(x.dtype, x.device)
        y = (x.abs() / norm).clamp(max=1.0)
        lower = torch.searchsorted(grid, y, right=True).sub(1).clamp(0, self.levels - 1)
        spread = (y - grid[lower]) * (grid[lower + 1] - y)
        return spread.sum() * (norm / torch.linalg.vector_norm(x)) ** 2


def _norm(x: Float[Tensor, " d"], p: float) -> Float[Tensor, ""]:
    """The p-norm, scaled so that squares neither overflow nor vanish; 0 for no entries."""
    if x.numel() == 0:
        return x.new_zeros(())
    largest = x.abs().max()
    if not bool(largest.isfinite()) or largest == 0:
        return largest
    return largest * torch.linalg.vector_norm(x / largest, p)


class NaturalDithering(Dithering):
    r"""Dithering to the levels 2^(1−s), …, 1/4, 1/2, 1 and 0.

    With y = |x| / ‖x‖_p an entry becomes ‖x‖_p · sign(x) · (one of the two levels around y),
    unbiased. In B(ω) with

        ω = 1/8 + a · min(1, a),   a = d^(1/r) 2^(1−s),   r = min(p, 2):

    each further level halves a, where the uniform levels of `RandomDithering` need twice as many.

    Args:
        levels: s, the number of levels besides 0.
        p: Which norm, from 1 to infinity (default 2, as QSGD).
        norm_compressor: How the norm itself is sent; as it is by default.

    Raises:
        ValueError: `levels` < 1 or `p` < 1.
        TypeError: `norm_compressor` is not a compressor.

    Example:
        >>> x = torch.tensor([0.0, -0.5, 0.25, 1.0])
        >>> dithering = NaturalDithering(3, p=float("inf"))
        >>> dithering.decompress(dithering.compress(x))
        tensor([ 0.0000, -0.5000,  0.2500,  1.0000])

    Reference:
        Horváth et al., Natural Compression for Distributed Deep Learning, 2019,
        https://arxiv.org/abs/1905.10988.
    """

    def grid(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " points"]:
        """0 and the powers of two."""
        powers = [2.0**k for k in range(1 - self.levels, 1)]
        return torch.tensor([0.0, *powers], dtype=dtype, device=device)

    def _omega_levels(self, d: int) -> float:
        a = d ** (1 / min(self.p, 2)) * 2.0 ** (1 - self.levels)
        return 1 / 8 + a * min(1.0, a)


class RandomDithering(Dithering):
    r"""Dithering to the uniform levels 0, 1/u, 2/u, …, 1 (QSGD for p = 2).

    In B(ω) with ω = a · min(1, a), a = d^(1/r) / u, r = min(p, 2).

    Args:
        levels: u, the number of levels besides 0.
        p: Which norm, from 1 to infinity.
        norm_compressor: How the norm itself is sent; as it is by default.

    Raises:
        ValueError: `levels` < 1 or `p` < 1.
        TypeError: `norm_compressor` is not a compressor.

    Example:
        >>> x = torch.tensor([0.0, -0.5, 0.75, 1.0])
        >>> dithering = RandomDithering(4, p=float("inf"))
        >>> dithering.decompress(dithering.compress(x))
        tensor([ 0.0000, -0.5000,  0.7500,  1.0000])

    Reference:
        Alistarh, Grubic, Li, Tomioka, Vojnović, QSGD, 2017, https://arxiv.org/abs/1610.02132.
    """

    def grid(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " points"]:
        """Multiples of 1 / u."""
        return torch.arange(self.levels + 1, dtype=dtype, device=device) / self.levels

    def _omega_levels(self, d: int) -> float:
        a = d ** (1 / min(self.p, 2)) / self.levels
        return a * min(1.0, a)
