r"""Sums of naturally compressed vectors in integer arithmetic, as a network switch can do them.

Every naturally compressed value is 0 or ±2^e. The n workers agree on E, the largest exponent of
all, and each sends the integers ±2^(e − E + F) with F = 30 − ⌈log₂ n⌉ fraction bits: their sum
fits 32 bits. Values below 2^(E − F) are rounded stochastically to 0 or one unit, so the sum stays
unbiased; all others are exact. The sum is rounded to powers of two again from the position of its
leading bit, and scaled by 2^(E − F).
"""

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from assay.kernels import natural

__all__ = [
    "NOT_FINITE",
    "fraction_bits",
    "largest_exponent",
    "to_integers",
    "integer_natural_round",
    "from_integers",
]

NOT_FINITE = 1 << 20  # in the place of an exponent; the maximum over workers keeps it
_ALL_ZERO = -(1 << 20)


def fraction_bits(workers: int) -> int:
    """Bits below the largest exponent that leave room for the sum of all workers.

    Args:
        workers: Number of workers, at least 1.

    Returns:
        F = 30 − ⌈log₂ workers⌉.

    Raises:
        ValueError: `workers` is below 1.

    Example:
        >>> fraction_bits(4)
        28
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return 30 - (workers - 1).bit_length()


def largest_exponent(x: Tensor) -> Int[Tensor, ""]:
    """Exponent of the largest entry, in a form whose maximum over workers is right.

    Args:
        x: Naturally rounded tensor: every entry 0, ±2^e, infinite or NaN.

    Returns:
        0-dimensional int64 tensor; `NOT_FINITE` if any entry is infinite or NaN, and a very small
        number if all are zero.

    Example:
        >>> largest_exponent(torch.tensor([0.5, -4.0, 0.0]))
        tensor(2)
    """
    largest = x.abs().max() if x.numel() else x.new_zeros(())
    exponent = torch.frexp(largest).exponent.long() - 1
    exponent = torch.where(largest == 0, _ALL_ZERO, exponent)
    return torch.where(largest.isfinite(), exponent, NOT_FINITE)


def to_integers(
    x: Float[Tensor, "*shape"],
    exponent: int,
    workers: int,
    generator: Generator | None = None,
) -> Int[Tensor, "*shape"]:
    """Write ±2^e as the int32 ±2^(e − exponent + F), small ones as 0 or ±1 without bias.

    Args:
        x: Naturally rounded finite tensor.
        exponent: The largest exponent over all workers.
        workers: Number of workers whose integers will be added.
        generator: Source of the randomness for entries below one unit.

    Returns:
        int32 tensor of the shape of `x`.

    Example:
        >>> to_integers(torch.tensor([4.0, -1.0]), exponent=2, workers=2)
        tensor([ 536870912, -134217728], dtype=torch.int32)
    """
    # Scaled in two exact steps: 2^(F - exponent) alone may overflow the dtype.
    scaled = torch.ldexp(x.double(), torch.tensor(fraction_bits(workers) - exponent))
    uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
    small = (uniform < scaled.abs()) * scaled.sign()
    return torch.where(scaled.abs() < 1, small, scaled).to(torch.int32)


def integer_natural_round(
    total: Int[Tensor, "*shape"], random: Int[Tensor, "*shape"]
) -> Int[Tensor, "*shape"]:
    """Round integers to powers of two by the position p of their leading bit.

    |S| = 2^p + m becomes 2^(p+1) if m · 2^(52 − p) + random ≥ 2^52, else 2^p: the decision that
    floating-point natural compression takes on S in float64 with the same random bits.

    Args:
        total: int32 sums.
        random: Integers in [0, 2^52).

    Returns:
        int64 tensor of 0 and signed powers of two.

    Example:
        >>> integer_natural_round(torch.tensor([0, -8, 5]), torch.tensor([0, 2**52 - 1, 0]))
        tensor([ 0, -8,  4])
    """
    magnitude = total.long().abs()
    position = (torch.frexp(magnitude.double()).exponent.long() - 1).clamp(min=0)
    remainder = magnitude - (1 << position)
    position = position + (((remainder << (52 - position)) + random) >> 52)
    return total.long().sign() << position


def from_integers(
    total: Int[Tensor, "*shape"],
    exponent: int,
    workers: int,
    dtype: torch.dtype,
    seed: int | None = None,
) -> Float[Tensor, "*shape"]:
    """Turn the sum of the workers' integers into floating point.

    Args:
        total: int32 sums.
        exponent: The largest exponent over all workers.
        workers: Number of workers.
        dtype: dtype of the result.
        seed: Round the sums naturally with these 63 random bits; None leaves them as they are.

    Returns:
        The sums times 2^(exponent − F).

    Example:
        >>> from_integers(torch.tensor([536870912]), 2, 2, torch.float32)
        tensor([4.])
    """
    if seed is not None:
        index = torch.arange(total.numel(), device=total.device).view(total.shape)
        total = integer_natural_round(total, natural.random_integers(index, seed, 52))
    scale = torch.tensor(exponent - fraction_bits(workers))
    return torch.ldexp(total.double(), scale).to(dtype)
