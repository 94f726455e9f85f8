"""Stochastic rounding to powers of two, alone or fused with packing into bytes.

Every entry t ≠ 0 goes to one of the two powers of two around it, unbiased: in the IEEE-754 bits of
t that is "add a random integer below one unit of the exponent, clear the mantissa". The random
integer is a hash of the entry's index and a seed, so that a kernel needs no random state, any
number of threads gives the same result, and every path below (kernel, plain torch, compiled) draws
the same numbers.

Layout of a packed float32 message of n entries, 9 bits an entry:

* ``codes`` (n bytes): the biased exponent 1 … 254; 0 is zero; 255 means "see ``extra``";
* ``signs`` (n / 8 bytes): the sign bits, entry i in bit i mod 8;
* ``extra`` (one byte for each code 255, in order): k in 0 … 23 is the subnormal range's power
  2^(k - 149), 254 is infinity, 255 is NaN. Empty for ordinary gradients.

A float64 message has 12 bits an entry: ``codes`` holds the low 8 bits of the 11-bit exponent,
``signs`` one nibble an entry (the 3 high bits of the exponent, then the sign) and ``extra`` counts
powers from 2^-1074. float16 and bfloat16 travel as float32: all their values are float32 values.

The numba kernels know only ordinary values; the rare others are counted in the same pass and set
right afterwards by the plain torch reference.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Packed",
    "largest_code",
    "natural_pack",
    "natural_round",
    "natural_round_reference",
    "natural_unpack",
    "random_integers",
]

INFINITY, NAN = 254, 255  # in `extra`
BLOCK = 8192  # entries packed at a time, so that the second loop finds them in the cache
THREAD_MINIMUM = 1 << 16  # entries below which a second thread costs more than it saves
STRETCH = 1 << 32  # entries that one 32-bit counter tells apart

_u8, _u32, _u64 = np.uint8, np.uint32, np.uint64


class Format(NamedTuple):
    """What the bit tricks need to know of an IEEE-754 format."""

    float: torch.dtype
    int: torch.dtype
    unsigned: type
    mantissa: int  # bits
    escape: int  # biased exponent of infinity and NaN
    subnormal: int  # log2 of the smallest subnormal number


FORMATS = {
    torch.float32: Format(torch.float32, torch.int32, _u32, 23, 255, -149),
    torch.float64: Format(torch.float64, torch.int64, _u64, 52, 2047, -1074),
}


class Packed(NamedTuple):
    """The bytes of a message: see the layout in the module's docstring."""

    codes: Tensor
    signs: Tensor
    extra: Tensor


def largest_code(dtype: torch.dtype) -> int:
    """Biased exponent (in float32, or float64 for float64) of the largest power of two in `dtype`.

    Values above that power can only round down: the one place where rounding is biased.
    """
    bias = 1023 if dtype == torch.float64 else 127
    return bias + math.frexp(torch.finfo(dtype).max)[1] - 1


# ------------------------------------------------------------------------------- random integers


def random_integers(index: Tensor, seed: int | Tensor, bits: int) -> Tensor:
    """Hash (index, seed) to integers uniform in [0, 2^bits), the ones the kernels use.

    Args:
        index: int64 indices of the entries.
        seed: 63 random bits (an int or a 0-dimensional int64 tensor).
        bits: how many bits, at most 52.

    Returns:
        int64 tensor of the shape of `index`.
    """
    k0, k1 = _keys(seed, index // STRETCH)
    high = _hash(index, k0, k1)
    if bits <= 32:
        return high >> (32 - bits)
    return (high << (bits - 32)) | (_hash(index, k1, k0) >> (64 - bits))


def _keys(seed, stretch):
    """Two 32-bit keys for the stretch of the index that the 32-bit counter runs through."""
    return seed & 0xFFFFFFFF, ((seed >> 32) + stretch * 0x9E3779B1) & 0xFFFFFFFF


def _hash(index: Tensor, k0, k1) -> Tensor:
    """32-bit hash in int64 arithmetic: the low 32 bits of a wrapped product are the right ones."""
    word = 0xFFFFFFFF
    x = (index * 0x9E3779B9 + k0) & word
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & word
    x = ((x ^ (x >> 15)) + k1) & word
    x = ((x ^ (x >> 16)) * 0x735A2D97) & word
    return x ^ (x >> 15)


@numba.njit(inline="always")
def _hash32(i, k0, k1):
    x = _u32(_u32(i) * _u32(0x9E3779B9) + k0)
    x = _u32((x ^ (x >> _u32(16))) * _u32(0x21F0AAAD))
    x = _u32((x ^ (x >> _u32(15))) + k1)
    x = _u32((x ^ (x >> _u32(16))) * _u32(0x735A2D97))
    return _u32(x ^ (x >> _u32(15)))


# --------------------------------------------------------------------------- plain torch reference


def natural_round_reference(x: Tensor, random: Tensor, largest: int) -> Tensor:
    """Round float32 or float64 `x` to powers of two with the given random integers.

    Args:
        x: float32 or float64 tensor.
        random: integers in [0, 2^23) for float32, [0, 2^52) for float64; broadcastable to `x`.
        largest: biased exponent that no finite result exceeds (see `largest_code`).
    """
    form = FORMATS[x.dtype]
    unit = 1 << form.mantissa
    magnitude = x.abs()
    bits = magnitude.view(form.int)
    subnormal = (bits > 0) & (bits < unit)
    # 2^64 times a subnormal is a normal number, and exact.
    bits = torch.where(subnormal, (magnitude * 2.0**64).view(form.int), bits)
    rounded = ((bits + random.to(form.int)) & -unit).clamp(max=largest * unit)
    value = rounded.view(form.float)
    value = torch.where(subnormal, value * 2.0**-64, value)
    return torch.where(x.isfinite(), value.copysign(x), x)


def _reference_at(x: Tensor, index: Tensor, seed: int | Tensor, largest: int) -> Tensor:
    random = random_integers(index, seed, FORMATS[x.dtype].mantissa)
    return natural_round_reference(x, random, largest)


# ----------------------------------------------------------------------------------------- kernels
# `odd` marks what the bit trick gets wrong: subnormal numbers, infinity and NaN. Written without
# branches, so that the loops vectorise.


@numba.njit(nogil=True, cache=True)
def _round32(bits, out, start, largest, k0, k1):
    count = _u32(0)
    for i in range(bits.size):
        b = bits[i]
        magnitude = _u32(b & _u32(0x7FFFFFFF))
        random = _u32(_hash32(_u32(start + _u32(i)), k0, k1) >> _u32(9))
        code = min(_u32(_u32(magnitude + random) >> _u32(23)), largest)
        odd = (_u32(magnitude - _u32(1)) < _u32(0x7FFFFF)) | (magnitude >= _u32(0x7F800000))
        rounded = _u32(_u32(b & _u32(0x80000000)) | _u32(code << _u32(23)))
        out[i] = b if odd else rounded
        count = _u32(count + _u32(odd))
    return count


@numba.njit(nogil=True, cache=True)
def _pack32(bits, codes, signs, start, largest, k0, k1):
    n, count = bits.size, _u32(0)
    for low in range(0, n, BLOCK):
        high = min(n, low + BLOCK)
        block, block_codes, first = bits[low:high], codes[low:high], _u32(start + _u32(low))
        for i in range(block.size):
            magnitude = _u32(block[i] & _u32(0x7FFFFFFF))
            random = _u32(_hash32(_u32(first + _u32(i)), k0, k1) >> _u32(9))
            code = min(_u32(_u32(magnitude + random) >> _u32(23)), largest)
            odd = _u32(
                (_u32(magnitude - _u32(1)) < _u32(0x7FFFFF)) | (magnitude >= _u32(0x7F800000))
            )
            block_codes[i] = _u8(code | _u32(_u32(0) - odd))
            count = _u32(count + odd)
        block_signs = signs[low // 8 : high // 8]
        for byte in range(block_signs.size):
            packed = _u32(0)
            for j in range(8):
                packed |= (block[byte * 8 + j] >> _u32(31)) << _u32(j)
            block_signs[byte] = _u8(packed)
    if n % 8:
        packed = _u32(0)
        for j in range(n % 8):
            packed |= (bits[n - n % 8 + j] >> _u32(31)) << _u32(j)
        signs[n // 8] = _u8(packed)
    return count


@numba.njit(nogil=True, cache=True)
def _unpack32(codes, signs, out):
    n = codes.size
    whole = n - n % 8
    head_codes, head = codes[:whole], out[:whole]
    for byte in range(whole // 8):
        packed = _u32(signs[byte])
        for j in range(8):
            sign = _u32(_u32(packed >> _u32(j)) << _u32(31))
            head[byte * 8 + j] = _u32(sign | _u32(_u32(head_codes[byte * 8 + j]) << _u32(23)))
    for i in range(whole, n):
        sign = _u32(_u32(_u32(signs[i // 8]) >> _u32(i % 8)) << _u32(31))
        out[i] = _u32(sign | _u32(_u32(codes[i]) << _u32(23)))


@numba.njit(inline="always")
def _code64(b, i, largest, k0, k1):
    """Biased exponent after rounding, and whether the entry is odd."""
    magnitude = _u64(b & _u64(0x7FFFFFFFFFFFFFFF))
    high, low = _u64(_hash32(i, k0, k1)), _u64(_hash32(i, k1, k0))
    random = _u64(_u64(high << _u64(20)) | _u64(low >> _u64(12)))
    code = min(_u64(_u64(magnitude + random) >> _u64(52)), largest)
    odd = (_u64(magnitude - _u64(1)) < _u64(0xFFFFFFFFFFFFF)) | (
        magnitude >= _u64(0x7FF0000000000000)
    )
    return code, odd


@numba.njit(nogil=True, cache=True)
def _round64(bits, out, start, largest, k0, k1):
    count = _u64(0)
    for i in range(bits.size):
        b = bits[i]
        code, odd = _code64(b, _u32(start + _u32(i)), largest, k0, k1)
        rounded = _u64(_u64(b & _u64(0x8000000000000000)) | _u64(code << _u64(52)))
        out[i] = b if odd else rounded
        count = _u64(count + _u64(odd))
    return count


@numba.njit(nogil=True, cache=True)
def _pack64(bits, codes, signs, start, largest, k0, k1):
    count = _u64(0)
    for i in range(bits.size):
        code, odd = _code64(bits[i], _u32(start + _u32(i)), largest, k0, k1)
        if odd:
            code = _u64(2047)
            count = _u64(count + _u64(1))
        codes[i] = _u8(code & _u64(255))
        nibble = _u8(_u64(code >> _u64(8)) | _u64(_u64(bits[i] >> _u64(63)) << _u64(3)))
        if i % 2:
            signs[i // 2] |= _u8(nibble << _u8(4))
        else:
            signs[i // 2] = nibble
    return count


@numba.njit(nogil=True, cache=True)
def _unpack64(codes, signs, out):
    for i in range(codes.size):
        nibble = _u64(_u64(signs[i // 2]) >> _u64(4 * (i % 2)))
        code = _u64(_u64(codes[i]) | _u64(_u64(nibble & _u64(7)) << _u64(8)))
        sign = _u64(_u64(_u64(nibble >> _u64(3)) & _u64(1)) << _u64(63))
        out[i] = _u64(sign | _u64(code << _u64(52)))


# ------------------------------------------------------------------------------------ torch's side


def natural_round(x: Tensor, seed: int | Tensor) -> Tensor:
    """Round `x` to powers of two, stochastically and without bias.

    NaN, infinities, signed zeros and powers of two come back unchanged; values above the largest
    power of two of the dtype round down to it. The gradient passes straight through.

    Args:
        x: float16, bfloat16, float32 or float64 tensor.
        seed: 63 random bits; the result is a function of `x` and `seed`.
    """
    return _NaturalRound.apply(x, seed)


class _NaturalRound(torch.autograd.Function):
    """Straight through backwards: E natural_round(x) = x has the identity as its derivative."""

    @staticmethod
    def forward(x: Tensor, seed: int | Tensor) -> Tensor:
        return _rounded(x, seed)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def vmap(info, in_dims, x: Tensor, seed: int | Tensor) -> tuple[Tensor, int]:
        # The numbers drawn differ along every dimension already, so one seed is enough.
        batched, seeds = in_dims
        one = seed.select(seeds, 0) if isinstance(seed, Tensor) and seeds is not None else seed
        if batched is None:
            x, batched = x.expand(info.batch_size, *x.shape), 0
        return _NaturalRound.apply(x, one), batched


def _rounded(x: Tensor, seed: int | Tensor) -> Tensor:
    wide, largest = _widened(x)
    if not _runs_kernels(wide):
        index = torch.arange(wide.numel(), device=wide.device).view(wide.shape)
        return _reference_at(wide, index, seed, largest).to(x.dtype)
    values = wide.contiguous().view(-1)
    out = torch.empty_like(values)
    form = FORMATS[wide.dtype]
    kernel = _round32 if wide.dtype == torch.float32 else _round64
    inputs, outputs = values.numpy().view(form.unsigned), out.numpy().view(form.unsigned)

    def run(low: int, high: int, *scalars) -> int:
        return int(kernel(inputs[low:high], outputs[low:high], *scalars))

    if _in_pieces(run, len(values), form.unsigned, largest, int(seed)):
        odd = (values.isfinite() & (values.abs() < torch.finfo(wide.dtype).tiny)).nonzero()[:, 0]
        out[odd] = _reference_at(values[odd], odd, int(seed), largest)
    return out.view(wide.shape).to(x.dtype)


def natural_pack(x: Tensor, seed: int) -> Packed:
    """Round as `natural_round` does, straight into 9 bits an entry (12 for float64).

    Args:
        x: float16, bfloat16, float32 or float64 tensor.
        seed: 63 random bits; ``natural_unpack(natural_pack(x, seed))`` is
            ``natural_round(x, seed)``.
    """
    wide, largest = _widened(x)
    values = wide.contiguous().view(-1)
    form, n = FORMATS[wide.dtype], values.numel()
    if not _runs_kernels(wide):
        index = torch.arange(n, device=x.device)
        return _pack_reference(values, _reference_at(values, index, seed, largest), form)
    kernel, per_byte = (_pack32, 8) if form.mantissa == 23 else (_pack64, 2)
    codes = torch.empty(n, dtype=torch.uint8)
    signs = torch.empty(-(-n // per_byte), dtype=torch.uint8)
    inputs, bytes_, packed = values.numpy().view(form.unsigned), codes.numpy(), signs.numpy()

    def run(low: int, high: int, *scalars) -> int:
        part = packed[low // per_byte : -(-high // per_byte)]
        return int(kernel(inputs[low:high], bytes_[low:high], part, *scalars))

    if not _in_pieces(run, n, form.unsigned, largest, seed):
        return Packed(codes, signs, codes.new_empty(0))
    odd = _escaped(codes, signs, form).nonzero()[:, 0]
    return Packed(codes, signs, _extra(_reference_at(values[odd], odd, seed, largest), form))


def natural_unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Give back the rounded values of `natural_pack` as a vector of `dtype`."""
    form = FORMATS[torch.float64 if dtype == torch.float64 else torch.float32]
    codes, signs, extra = packed
    if codes.device.type == "cpu":
        out = torch.empty(codes.numel(), dtype=form.float)
        kernel = _unpack32 if form.mantissa == 23 else _unpack64
        kernel(codes.numpy(), signs.numpy(), out.numpy().view(form.unsigned))
    else:
        out = _unpack_reference(codes, signs, form)
    if extra.numel():
        odd = _escaped(codes, signs, form)
        values = torch.full((256,), torch.nan, dtype=form.float)
        values[INFINITY] = torch.inf
        for k in range(form.mantissa + 1):
            values[k] = math.ldexp(1.0, k + form.subnormal)
        out[odd] = values.to(out.device)[extra.long()].copysign(out[odd])
    return out.to(dtype)


def _pack_reference(values: Tensor, rounded: Tensor, form: Format) -> Packed:
    """Lay rounded values out as a message, with plain torch operations on any device."""
    code = (rounded.abs().view(form.int) >> form.mantissa).long()
    odd = ~values.isfinite() | ((values != 0) & (values.abs() < torch.finfo(form.float).tiny))
    code[odd] = form.escape
    sign = values.signbit().long()
    if form.mantissa == 23:
        signs = _bytes(sign, 1)
    else:
        signs = _bytes((code >> 8) | (sign << 3), 4)
    return Packed((code & 255).to(torch.uint8), signs, _extra(rounded[odd], form))


def _unpack_reference(codes: Tensor, signs: Tensor, form: Format) -> Tensor:
    """Rounded values of a message, those with the escape code as infinities."""
    n, code = codes.numel(), codes.to(form.int)
    if form.mantissa == 23:
        sign = _fields(signs, 1)[:n]
    else:
        nibbles = _fields(signs, 4)[:n]
        code, sign = code | ((nibbles & 7).to(form.int) << 8), nibbles >> 3
    magnitude = (code << form.mantissa).view(form.float)
    return torch.where(sign.bool(), -magnitude, magnitude)


def _escaped(codes: Tensor, signs: Tensor, form: Format) -> Tensor:
    escaped = codes == 255
    if form.mantissa == 52:
        escaped &= _fields(signs, 4)[: codes.numel()] & 7 == 7
    return escaped


def _extra(rounded: Tensor, form: Format) -> Tensor:
    """One byte for each entry whose code is the escape."""
    power = torch.frexp(rounded).exponent - 1 - form.subnormal
    power = torch.where(rounded.isinf(), INFINITY, power)
    return torch.where(rounded.isnan(), NAN, power).to(torch.uint8)


def _bytes(fields: Tensor, width: int) -> Tensor:
    """Pack fields of 1 or 4 bits into bytes, the first in the lowest bits."""
    per_byte = 8 // width
    padded = torch.nn.functional.pad(fields, (0, -len(fields) % per_byte)).view(-1, per_byte)
    shifts = torch.arange(0, 8, width, device=fields.device)
    return (padded << shifts).sum(1).to(torch.uint8)


def _fields(packed: Tensor, width: int) -> Tensor:
    """Undo `_bytes` (with its padding)."""
    shifts = torch.arange(0, 8, width, device=packed.device, dtype=torch.uint8)
    return ((packed[:, None] >> shifts) & ((1 << width) - 1)).view(-1)


def _widened(x: Tensor) -> tuple[Tensor, int]:
    """`x` as float32 or float64, and the largest exponent its own dtype can hold."""
    largest = largest_code(x.dtype)
    return (x if x.dtype in FORMATS else x.float()).detach(), largest


def _runs_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _in_pieces(run: Callable, n: int, unsigned: type, largest: int, seed: int) -> int:
    """Run a kernel over n entries on torch's number of threads; the sum of what it returns."""
    threads = torch.get_num_threads() if n >= THREAD_MINIMUM else 1
    pieces = [
        (low, high, _u32(low % STRETCH), unsigned(largest), *keys)
        for low, high, keys in _pieces(n, threads, seed)
    ]
    if len(pieces) <= 1:
        return sum(run(*piece) for piece in pieces)
    return sum(_pool(threads, os.getpid()).map(lambda piece: run(*piece), pieces))


def _pieces(n: int, threads: int, seed: int) -> Iterator[tuple[int, int, tuple]]:
    """Ranges of entries, one a thread, each inside one stretch of the counter, and their keys."""
    size = -(-n // (threads * BLOCK)) * BLOCK
    for stretch in range(0, n, STRETCH):
        keys = tuple(_u32(key) for key in _keys(seed, stretch // STRETCH))
        end = min(n, stretch + STRETCH)
        for low in range(stretch, end, size):
            yield low, min(low + size, end), keys


@functools.lru_cache(maxsize=8)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process (a forked child inherits the object but not its threads)."""
    return ThreadPoolExecutor(threads, thread_name_prefix="assay-natural")
