"""Compressors of gradients: the protocol, natural compression, and how compressors combine.

A compressor C is *unbiased with variance ω*, C ∈ B(ω), when E C(x) = x and
E‖C(x)‖² ≤ (1 + ω)‖x‖² for every x. Two of them composed are in B(ω₁ω₂ + ω₁ + ω₂).
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Generator, Tensor

from assay.distributed.payload import Payload
from assay.kernels import natural

__all__ = [
    "Compressor",
    "Identity",
    "NaturalCompressor",
    "StochasticIntegerRounding",
    "Compose",
    "ErrorFeedback",
    "natural_round",
    "draw_seed",
    "check_floating",
]


@runtime_checkable
class Compressor(Protocol):
    """What hooks and simulations ask of a compressor.

    Attributes:
        unbiased: Whether E decompress(compress(x)) = x.

    Example:
        >>> isinstance(NaturalCompressor(), Compressor)
        True
    """

    unbiased: bool

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


class _Compressor:
    """Real bytes are the bits counted, whatever the compressor."""

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


def draw_seed(generator: Generator | None = None) -> Shaped[Tensor, ""]:
    """Draw the 63 random bits that one compression uses.

    Args:
        generator: Where they come from; the global generator by default.

    Returns:
        A 0-dimensional int64 tensor on the generator's device.
    """
    device = generator.device if generator is not None else "cpu"
    return torch.randint(0, 2**63 - 1, (), generator=generator, device=device)


# ----------------------------------------------------------------------------- natural compression


class _NaturalRound(torch.autograd.Function):
    """Straight through backwards: E natural_round(x) = x has the identity as its derivative."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor) -> Tensor:
        return natural.natural_round(x, seed)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def vmap(info, in_dims, x: Tensor, seed: Tensor) -> tuple[Tensor, int]:
        return _NaturalRound.apply(x, seed), in_dims[0]


def natural_round(
    x: Tensor, generator: Generator | None = None, out: Tensor | None = None
) -> Shaped[Tensor, "..."]:
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
        return _NaturalRound.apply(x, seed)
    return out.copy_(natural.natural_round(x.detach(), seed))


class NaturalCompressor(_Compressor):
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


class Identity(_Compressor):
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


class StochasticIntegerRounding(_Compressor):
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
        return Payload((integers.to(torch.int32).view(-1),), tuple(x.shape), x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        """The integers, in the dtype of the input."""
        return payload.tensors[0].to(payload.dtype).view(payload.shape)

    def omega(self, d: int) -> float:
        """Infinity: no ω bounds the second moment."""
        return math.inf


# ------------------------------------------------------------------------------------ combinations


class Compose(_Compressor):
    """The composition C_outer ∘ C_inner.

    If both are unbiased with ω₁, ω₂ then so is the composition, with ω₁ω₂ + ω₁ + ω₂. When the
    inner compressor selects entries (`TopK`, `RandomK`) the outer one works on the selected values
    alone and the indices travel beside them.

    Args:
        outer: Applied to what the inner compressor keeps.
        inner: Applied first, to the tensor.

    Raises:
        TypeError: An argument is not a compressor.

    Example:
        >>> from assay.distributed import TopK
        >>> x = torch.tensor([0.1, 3.0, -0.2, -8.0])
        >>> both = Compose(NaturalCompressor(), TopK(0.25))
        >>> both.decompress(both.compress(x))
        tensor([ 0.,  0.,  0., -8.])
    """

    def __init__(self, outer: Compressor, inner: Compressor) -> None:
        for name, compressor in (("outer", outer), ("inner", inner)):
            if not isinstance(compressor, Compressor):
                raise TypeError(f"{name} must be a compressor, got {type(compressor).__name__}")
        self.outer, self.inner = outer, inner

    def __repr__(self) -> str:
        return f"Compose({self.outer!r}, {self.inner!r})"

    @property
    def unbiased(self) -> bool:
        """Whether both are unbiased."""
        return self.outer.unbiased and self.inner.unbiased

    @property
    def _sparse(self) -> bool:
        return hasattr(self.inner, "select")

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Compress with the inner compressor, and what it keeps with the outer one."""
        inner = self.inner.compress(x, generator=generator)
        if self._sparse:
            indices, values = inner.tensors
            kept = self.outer.compress(values, generator=generator)
            return Payload((indices, *kept.tensors), inner.shape, inner.dtype)
        return self.outer.compress(self.inner.decompress(inner), generator=generator)

    def decompress(self, payload: Payload) -> Tensor:
        """Undo the outer compressor, then put selected values where they belong."""
        if not self._sparse:
            return self.outer.decompress(payload)
        indices, *kept = payload.tensors
        values = self.outer.decompress(Payload(tuple(kept), (len(indices),), payload.dtype))
        return self.inner.decompress(Payload((indices, values), payload.shape, payload.dtype))

    def omega(self, d: int) -> float:
        """ω₁ω₂ + ω₁ + ω₂, or infinity if either is infinite."""
        inner = self.inner.omega(d)
        outer = self.outer.omega(self.inner.count(d) if self._sparse else d)
        if math.isinf(inner) or math.isinf(outer):
            return math.inf
        return inner * outer + inner + outer


class ErrorFeedback(_Compressor):
    """Adds what earlier messages left out to the next one before it is compressed.

    Keeps e, the error so far: sends C(x + e) and sets e ← x + e − C(x + e). It turns biased
    compressors such as `TopK` into ones that training survives. It remembers one tensor, so each
    worker needs its own instance (`copy.deepcopy`), and all its messages have one shape.

    Args:
        compressor: Any compressor.

    Raises:
        TypeError: `compressor` is not a compressor.
        ValueError: A tensor has another shape than the one before (call `reset` in between).

    Example:
        >>> from assay.distributed import TopK
        >>> feedback = ErrorFeedback(TopK(0.5))
        >>> x = torch.tensor([2.0, 3.0])
        >>> [feedback.decompress(feedback.compress(x)).tolist() for _ in range(2)]
        [[0.0, 3.0], [4.0, 0.0]]

    Reference:
        Stich, Cordonnier, Jaggi, Sparsified SGD with Memory, 2018,
        https://arxiv.org/abs/1809.07599.
    """

    unbiased = False

    def __init__(self, compressor: Compressor) -> None:
        if not isinstance(compressor, Compressor):
            raise TypeError(f"compressor must be a compressor, got {type(compressor).__name__}")
        self.compressor = compressor
        self.error: Tensor | None = None

    def __repr__(self) -> str:
        return f"ErrorFeedback({self.compressor!r})"

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Compress `x` plus the error so far, and remember the new error.

        Where that sum is not finite nothing is remembered, so one overflow does not stay for ever.
        """
        check_floating(x)
        if self.error is not None and self.error.shape != x.shape:
            raise ValueError(
                f"x must have shape {tuple(self.error.shape)} as the tensors before it, got "
                f"{tuple(x.shape)}"
            )
        corrected = x.detach() if self.error is None else x.detach() + self.error
        payload = self.compressor.compress(corrected, generator=generator)
        error = corrected - self.compressor.decompress(payload)
        self.error = torch.where(error.isfinite(), error, torch.zeros_like(error))
        return payload

    def decompress(self, payload: Payload) -> Tensor:
        """What the compressor inside gives."""
        return self.compressor.decompress(payload)

    def omega(self, d: int) -> float:
        """Infinity: a single message is biased."""
        return math.inf

    def reset(self) -> None:
        """Forget the error."""
        self.error = None

    def state_dict(self) -> dict[str, Tensor]:
        """The error, if there is one."""
        return {} if self.error is None else {"error": self.error}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the error of `state_dict`."""
        error = state.get("error")
        self.error = None if error is None else error.clone()
