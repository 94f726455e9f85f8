"""Compressors of gradients: the protocol, natural compression and the simplest others.

A compressor C is *unbiased with variance ω*, C ∈ B(ω), when E C(x) = x and
E‖C(x)‖² ≤ (1 + ω)‖x‖² for every x.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from assay.distributed.payload import Payload
from assay.kernels import natural

__all__ = [
    "Compressor",
    "Identity",
    "NaturalCompressor",
    "StochasticIntegerRounding",
    "natural_round",
    "BaseCompressor",
    "draw_seed",
    "check_floating",
]


@runtime_checkable
class Compressor(Protocol):
    """What hooks and simulations ask of a compressor.

    Example:
        >>> isinstance(NaturalCompressor(), Compressor)
        True
    """

    @property
    def unbiased(self) -> bool:
        """Whether E decompress(compress(x)) = x."""
        ...

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Turn a floating-point tensor of any shape into what is sent."""
        ...

    def decompress(self, payload: Payload) -> Tensor:
        """Give the receiver's tensor: shape and dtype of the one compressed."""
        ...

    def bits(self, payload: Payload) -> int:
        """Bits that `payload` occupies on the wire."""
        ...

    def omega(self, d: int) -> float:
        """Variance ω for vectors of d entries; infinity when C is in no B(ω)."""
        ...


class BaseCompressor:
    """What most compressors share: no bias, and payloads of real bytes that are simply counted."""

    unbiased = True

    def bits(self, payload: Payload) -> int:
        """Bits that `payload` occupies on the wire."""
        return 8 * payload.nbytes


def check_floating(x: Tensor, name: str = "x") -> None:
    """Raise a `TypeError` unless `x` is a real floating-point tensor of 16 to 64 bits."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(
            f"{name} must be a float16, bfloat16, float32 or float64 tensor, got {x.dtype}"
        )


def draw_seed(generator: Generator | None = None) -> Tensor:
    """Draw the 63 random bits that one compression uses.

    Args:
        generator: Where they come from; the global generator by default.

    Returns:
        A 0-dimensional int64 tensor on the generator's device.
    """
    device = generator.device if generator is not None else "cpu"
    return torch.randint(0, 2**63 - 1, (), generator=generator, device=device)


# ----------------------------------------------------------------------------- natural compression


def natural_round(
    x: Tensor, generator: Generator | None = None, out: Tensor | None = None
) -> Tensor:
    r"""Round every entry to one of the two powers of two around it, stochastically.

    With lo = 2^⌊log₂|t|⌋ and hi = 2 lo, an entry t ≠ 0 becomes

        sign(t) · hi   with probability (|t| − lo) / lo,   else   sign(t) · lo,

    so that E C(t) = t and E C(t)² ≤ 9/8 t², with equality at |t| = 4/3 lo. Powers of two (also
    subnormal ones), signed zeros, infinities and NaN come back unchanged. Values above the largest
    power of two of the dtype can only round down. Backwards it passes the gradient straight
    through. It works inside `torch.compile` and `torch.func.vmap`.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of any shape.
        generator: Source of the randomness (one draw a call, whatever the size of `x`).
        out: Where to write the result; may be `x` itself. Not differentiable.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not a real floating-point tensor.

    Example:
        >>> natural_round(torch.tensor([1.0, -0.25, 0.0, float("inf")]))
        tensor([ 1.0000, -0.2500,  0.0000,     inf])
        >>> y = natural_round(torch.full((10_000,), 3.0), torch.Generator().manual_seed(0))
        >>> y.unique().tolist(), abs(y.mean().item() - 3.0) < 0.05
        ([2.0, 4.0], True)

    Reference:
        Horváth, Ho, Horváth, Sahu, Canini, Richtárik, Natural Compression for Distributed Deep
        Learning, 2019, https://arxiv.org/abs/1905.10988.
    """
    check_floating(x)
    seed = draw_seed(generator).to(x.device)
    if out is None:
        return natural.natural_round(x, seed)
    return out.copy_(natural.natural_round(x.detach(), seed))


class NaturalCompressor(BaseCompressor):
    """Natural compression C_nat: only sign and exponent travel, 9 bits a float32.

    Rounds as `natural_round` and packs in the same pass: one byte for the exponent, one bit for
    the sign (float64: 12 bits in all; float16 and bfloat16: 9 as well). Unbiased, ω = 1/8. What an
    8-bit exponent cannot say (subnormal powers of two, infinities, NaN) costs 8 bits more for each
    such entry, so the round trip is exactly `natural_round` for every input.

    Args:
        integer: Ask `two_way_compression_hook` and the simulation to add integers rather than
            floats, as network switches can: see `assay.distributed.integer_aggregation`.

    Example:
        >>> compressor = NaturalCompressor()
        >>> payload = compressor.compress(torch.randn(1000))
        >>> compressor.bits(payload) / 1000
        9.0
        >>> compressor.decompress(payload).shape
        torch.Size([1000])

    Reference:
        Horváth et al., Natural Compression for Distributed Deep Learning, 2019,
        https://arxiv.org/abs/1905.10988.
    """

    def __init__(self, integer: bool = False) -> None:
        self.integer = integer

    def __repr__(self) -> str:
        return f"NaturalCompressor(integer={self.integer})"

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Round and pack; `TypeError` unless `x` is a real floating-point tensor."""
        check_floating(x)
        packed = natural.natural_pack(x, int(draw_seed(generator)))
        return Payload(tuple(packed), tuple(x.shape), x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        """Unpack; every entry is 0, a power of two, infinite or NaN."""
        packed = natural.Packed(*payload.tensors)
        return natural.natural_unpack(packed, payload.dtype).view(payload.shape)

    def omega(self, d: int) -> float:
        """1/8, whatever d is."""
        return 1 / 8


# -------------------------------------------------------------------------------- the simplest ones


class Identity(BaseCompressor):
    """Sends the tensor as it is: ω = 0.

    Example:
        >>> x = torch.randn(4)
        >>> identity = Identity()
        >>> torch.equal(identity.decompress(identity.compress(x)), x)
        True
    """

    def __repr__(self) -> str:
        return "Identity()"

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Copy nothing; `TypeError` unless `x` is a real floating-point tensor."""
        check_floating(x)
        return Payload((x.detach().reshape(-1),), tuple(x.shape), x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        """Give the tensor back."""
        return payload.tensors[0].view(payload.shape)

    def omega(self, d: int) -> float:
        """0."""
        return 0.0


class StochasticIntegerRounding(BaseCompressor):
    """Rounds to one of the two integers around each entry, unbiased.

    The counter-example of the paper: it is in no B(ω), since E C(t)² / t² = 1 / t for 0 < t < 1
    grows without bound as t → 0. Entries travel as int32.

    Example:
        >>> rounding = StochasticIntegerRounding()
        >>> rounding.decompress(rounding.compress(torch.tensor([3.0, -2.0])))
        tensor([ 3., -2.])
        >>> rounding.omega(10)
        inf

    Reference:
        Horváth et al., Natural Compression for Distributed Deep Learning, 2019,
        https://arxiv.org/abs/1905.10988.
    """

    def __repr__(self) -> str:
        return "StochasticIntegerRounding()"

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Round; `ValueError` when an entry is not finite or does not fit int32."""
        check_floating(x)
        if x.numel() and not bool((x.abs() < 2**31 - 1).all()):
            raise ValueError("x must be finite and below 2^31 - 1 in magnitude")
        uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        lower = x.double().floor()
        integers = lower + (uniform < x.double() - lower)
        return Payload((integers.to(torch.int32).reshape(-1),), tuple(x.shape), x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        """The integers, in the dtype of the input."""
        return payload.tensors[0].to(payload.dtype).view(payload.shape)

    def omega(self, d: int) -> float:
        """Infinity: no ω bounds the second moment."""
        return math.inf
