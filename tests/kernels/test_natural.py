import itertools
import math
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy import stats

from assay.kernels import natural

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(x):
    return x.view(INTEGERS[x.element_size()])


def same(x, y):
    """Equal bit for bit, every NaN like any other."""
    return bool(((bits_of(x) == bits_of(y)) | (x.isnan() & y.isnan())).all())


def every_power(dtype):
    """All powers of two that `dtype` holds, subnormal ones included, with both signs."""
    info = torch.finfo(dtype)
    smallest = math.log2(info.tiny) + math.log2(info.eps)
    exponents = range(round(smallest), math.frexp(info.max)[1])
    powers = torch.tensor([2.0**e for e in exponents], dtype=torch.float64).to(dtype)
    assert (powers > 0).all()
    assert powers.isfinite().all()
    return torch.cat([powers, -powers])


def wide_range(n, dtype, seed=0):
    """Values from the subnormal range to near overflow."""
    g = torch.Generator().manual_seed(seed)
    low, high = (-1080, 1023) if dtype == torch.float64 else (-155, 127)
    exponents = torch.randint(low, high, (n,), generator=g)
    mantissas = torch.randn(n, generator=g, dtype=torch.float64)
    return torch.ldexp(mantissas, exponents).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_and_powers_of_two_are_exact(dtype):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype)
    x = torch.cat([special, every_power(dtype)])
    for seed in range(5):
        assert same(natural.natural_round(x, seed), x)
        assert same(natural.natural_unpack(natural.natural_pack(x, seed), dtype), x)


def rounded_by_hand(value, random, width, largest):
    """The definition, in exact rational arithmetic: hi when (|t| - lo) / lo + r / 2^width ≥ 1."""
    exponent = math.frexp(abs(value))[1] - 1
    lower = math.ldexp(1.0, exponent)
    fraction = Fraction(abs(value)) / Fraction(lower) - 1
    up = fraction + Fraction(random, 2**width) >= 1 and exponent < largest
    return math.copysign(math.ldexp(1.0, exponent + up), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_exact_arithmetic_on_the_same_random_integers(dtype):
    x = wide_range(500, dtype)
    x = x[(x != 0) & x.isfinite()]
    width = natural.FORMATS[dtype].mantissa
    random = natural.random_integers(torch.arange(len(x)), 99, width)
    largest = math.frexp(torch.finfo(dtype).max)[1] - 1
    expected = [
        rounded_by_hand(t, r, width, largest)
        for t, r in zip(x.tolist(), random.tolist(), strict=True)
    ]
    assert natural.natural_round(x, 99).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, natural.BLOCK + 3, 3 * natural.BLOCK])
def test_kernels_plain_torch_and_message_agree_bit_for_bit(dtype, n, monkeypatch):
    x = wide_range(n, dtype)
    x[::11] = torch.tensor(math.nan)
    x[::13] = torch.tensor(-math.inf)
    rounded, packed = natural.natural_round(x, 7), natural.natural_pack(x, 7)
    assert same(natural.natural_unpack(packed, dtype), rounded)
    monkeypatch.setattr(natural, "_runs_kernels", lambda x: False)
    assert same(natural.natural_round(x, 7), rounded)
    for kernel, reference in zip(packed, natural.natural_pack(x, 7), strict=True):
        assert torch.equal(kernel, reference)
    form = natural.FORMATS[torch.float64 if dtype == torch.float64 else torch.float32]
    ordinary = ~natural._escaped(packed.codes, packed.signs, form)
    unpacked = natural._unpack_reference(packed.codes, packed.signs, form).to(dtype)
    assert same(unpacked[ordinary], rounded[ordinary])


def test_number_of_threads_changes_nothing():
    x = wide_range(2 * natural.THREAD_MINIMUM + 5, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((natural.natural_round(x, 5), *natural.natural_pack(x, 5)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(
            bits_of(one) if one.is_floating_point() else one,
            bits_of(three) if three.is_floating_point() else three,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_above_the_largest_power_round_down(dtype):
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    power = 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] - 1)
    for seed in range(20):
        assert natural.natural_round(largest, seed) == power


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements={"allow_nan": False}))
def test_result_is_a_neighbouring_power_of_two(array):
    x = torch.from_numpy(array)
    y = natural.natural_round(x, 3)
    assert y.shape == x.shape
    finite = x.isfinite() & (x != 0)
    assert torch.equal(y[~finite], x[~finite])
    mantissa, exponent = torch.frexp(y[finite])
    assert (mantissa.abs() == 0.5).all()
    distance = exponent - torch.frexp(x[finite]).exponent
    assert ((distance == 0) | (distance == 1)).all()
    assert torch.equal(y.signbit(), x.signbit())


def test_non_contiguous_input():
    x = torch.randn(6, 4)
    assert torch.equal(natural.natural_round(x.T, 1), natural.natural_round(x.T.contiguous(), 1))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.float32, 9), (torch.float64, 12), (torch.float16, 9), (torch.bfloat16, 9)],
)
def test_message_of_ordinary_values_takes_exactly_its_bits(dtype, bits):
    packed = natural.natural_pack(torch.randn(8000).to(dtype) + 2, 0)
    assert sum(part.numel() * part.element_size() for part in packed) * 8 == bits * 8000


@pytest.mark.parametrize("width", [23, 52])
def test_random_integers_are_uniform_and_independent_of_neighbours(width):
    # 256 cells; a p-value below 1e-4 in one of the four tests would be a broken hash.
    r = natural.random_integers(torch.arange(1 << 18), 1234567890123456789, width)
    top, low = (r >> (width - 8)).numpy(), (r & 255).numpy()
    pairs = (top[:-1:2] >> 4) * 16 + (top[1::2] >> 4)
    for cells in (top, low, pairs):
        assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > 1e-4
    other = natural.random_integers(torch.arange(1 << 18), 987654321987654321, width)
    pairs = (top >> 4) * 16 + (other >> (width - 4)).numpy()
    assert stats.chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-4


def test_stretches_beyond_32_bits_of_index_are_covered_once_with_other_keys():
    n = 2 * natural.STRETCH + 5
    pieces = list(natural._pieces(n, 2, seed=2**40 + 1))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == n
    assert all(one[1] == two[0] for one, two in itertools.pairwise(pieces))
    for low, high, keys in pieces:
        assert low // natural.STRETCH == (high - 1) // natural.STRETCH
        assert tuple(map(int, keys)) == natural._keys(2**40 + 1, low // natural.STRETCH)
    index = torch.tensor([3, 3 + natural.STRETCH])
    first, second = natural.random_integers(index, 2**40 + 1, 23).tolist()
    assert first != second
